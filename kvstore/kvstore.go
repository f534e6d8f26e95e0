// Package kvstore keeps lists of values under keys.
//
// kvstore.go is the contract: KVStore is the minimum, and Store is what a fast server needs.
// Memory is a Store that ends with its process: memory.go (what it does), index.go (how it finds
// a key), slab.go (how a key and its list lie in memory), large.go (entries of over 2 KiB, and long
// lists), deadlines.go (which key expires next) and table.go (arrays that snapshots share). Most
// of these files begin with a drawing. In the directories below are:
//
//	durable       a Memory with a log, from which Open restores it
//	storage       where such a log is kept: a directory of the file system
//	storage/etcd  the same in an etcd cluster
//	storetest     for tests: the model of a store, and a disk that fails as real ones do
package kvstore

import (
	"iter"
	"slices"
)

// KVStore holds, under each key, a list of values in the order in which they
// were put. One goroutine at a time may call it: the server's workLoop owns
// its store, so a store needs no lock.
//
// Keys and values are any bytes. They belong to the caller, who may use their memory for something
// else once a call has returned. So a store clones what it keeps.
type KVStore interface {
	// Put appends value to key's list.
	Put(key, value string)

	// Get returns key's list, oldest value first; nil if there is no such key. The caller may
	// keep the list and hand it to other goroutines: nobody changes it any more.
	Get(key string) []string

	// Delete removes key and returns how many values it had.
	Delete(key string) (removed int)

	// Update removes the first value equal to oldValue, if there is one, and
	// appends newValue. It reports whether it removed one.
	Update(key, oldValue, newValue string) (replaced bool)

	// Set makes value key's only one, and returns how many there were.
	Set(key, value string) (removed int)

	// Remove removes the first value equal to value, and reports whether there was one.
	// A key that loses its last value is gone.
	Remove(key, value string) (removed bool)

	// Commit returns once all earlier calls are as durable as this store makes
	// them. After an ErrNoRoom of package storage the caller may go on, and call
	// Commit again. Until a Commit succeeds it sends no reply that tells of a
	// change since the last one that succeeded. After any other error nothing can
	// be promised any more: the caller sends no reply for the calls since the last
	// Commit, and stops.
	Commit() error
}

// Store is what a fast server needs from a store: KVStore, methods that answer cheaply what KVStore
// answers at a higher cost, and methods for what it cannot do, such as deadlines. Memory and
// durable.Store are Stores; StoreOf makes a Store of any KVStore.
type Store interface {
	KVStore

	// Size returns the number of keys, the number of values, and the bytes of both: each key and
	// each value counts once. All three are negative if the store does not know.
	Size() (keys, values int, bytes int64)

	// Footprint returns roughly how many bytes of memory the store takes, 0 if it does not know.
	Footprint() int64

	// Reclaim tells the store that memory is short. It returns how many bytes of the Footprint are
	// dead. They can be counted as free, because the next writes reuse them.
	Reclaim() (bytes int64)

	// Room returns an error, and has changed nothing, if there is no room for one more record with
	// this many bytes of key and values, or if the record could not be saved now. removes is how
	// many values of key the request removes, at most; 0: it may add something. A request that
	// removes all values (Delete) may use the last room that there is. Another one that only
	// removes (Remove, Take) leaves as much as it takes to delete every key.
	Room(key string, bytes int64, removes int) error

	// View returns key's list for a short time. A short list may be made in scratch, and its
	// values may be parts of a larger piece of memory, which cannot be freed while one of them is
	// in use. So a caller that keeps a list of up to ViewMost bytes for long clones it (CloneAll).
	// A larger list keeps no memory but its own.
	View(scratch []string, key string) []string

	// Measure returns the total bytes of key's values.
	Measure(key string) (bytes int64)

	// Has reports whether key's list has value. It hands no memory out.
	Has(key, value string) bool

	// Take removes and returns key's oldest value; a key that loses its last value is gone. It
	// takes amortized constant time, however long the list is.
	Take(key string) (value string, ok bool)

	// Count returns how many values key has.
	Count(key string) int

	// Expire gives key a deadline, in milliseconds of Unix time; 0 takes it away. It reports
	// whether key is there. A Set, a Delete and the removal of a key's last value end its deadline.
	// The store itself does nothing when the time has come: its owner asks NextDue and deletes the
	// key.
	Expire(key string, at int64) (ok bool)

	// PutUntil is Put and Expire in one step: a crash leaves both or neither.
	PutUntil(key, value string, at int64)

	// Deadline returns key's deadline; ok is false if it has none.
	Deadline(key string) (at int64, ok bool)

	// Expiring returns how many keys have a deadline; it is negative if none can have one.
	Expiring() int

	// NextDue returns the key with the earliest deadline, if that is not after now.
	NextDue(now int64) (key string, ok bool)

	// TouchPays reports whether a Touch makes later requests faster: not while the store is small.
	TouchPays() bool

	// Touch prepares the store for requests for these keys. It changes nothing that they see.
	Touch(keys []string)

	// Snapshot returns what the store holds now; nil if the store cannot list its keys. It takes
	// little time. While somebody has the snapshot, what the owner changes takes extra memory.
	Snapshot() Snapshot
}

// ViewMost is how many bytes of values a list that shares memory has, at most.
const ViewMost = ownSize

// Snapshot is what a store held at one moment. Any goroutine may read one while the
// store's owner goes on.
type Snapshot interface {
	// All yields every key with its list, in no particular order. A list is valid until the
	// next one is yielded.
	All() iter.Seq2[string, []string]

	// View is as in Store.
	View(scratch []string, key string) []string

	// Deadline is as in Store.
	Deadline(key string) (at int64, ok bool)
}

// StoreOf returns db as a Store: db itself if it is one, nil if it is nil.
func StoreOf(db KVStore) Store {
	switch store, isStore := db.(Store); {
	case isStore:
		return store
	case db == nil:
		return nil
	}

	// plain adds what a mere KVStore lacks.
	return plain{db}
}

// plain makes a Store of a KVStore. It can neither count nor list what it holds, and its keys have
// no deadlines.
type plain struct{ KVStore }

func (plain) Size() (keys, values int, bytes int64)  { return -1, -1, -1 }
func (plain) Footprint() int64                       { return 0 }
func (plain) Reclaim() int64                         { return 0 }
func (plain) Room(string, int64, int) error          { return nil }
func (p plain) View(_ []string, key string) []string { return p.Get(key) }
func (p plain) Measure(key string) (bytes int64)     { return SizeOf(p.Get(key)) }
func (p plain) Has(key, value string) bool           { return slices.Contains(p.Get(key), value) }
func (plain) TouchPays() bool                        { return false }
func (plain) Touch([]string)                         {}
func (plain) Snapshot() Snapshot                     { return nil }

// Take is a Get and a Remove.
func (p plain) Take(key string) (value string, ok bool) {
	values := p.Get(key)
	if len(values) == 0 {
		return "", false
	}

	// Remove takes out the first equal value, and the oldest one comes first.
	return values[0], p.Remove(key, values[0])
}

func (p plain) Count(key string) int                { return len(p.Get(key)) }
func (p plain) Expire(key string, _ int64) bool     { return len(p.Get(key)) > 0 }
func (p plain) PutUntil(key, value string, _ int64) { p.Put(key, value) }
func (plain) Deadline(string) (int64, bool)         { return 0, false }
func (plain) Expiring() int                         { return -1 }
func (plain) NextDue(int64) (string, bool)          { return "", false }
