// Package kvstore keeps lists of values under keys.
//
// kvstore.go says what is asked of a store: KVStore is the least, and Store is what a fast server
// asks. Memory is a Store that ends with its process: memory.go (what it does), index.go (how it
// finds a key), slab.go (how a key and its list lie in memory), large.go (what is too large for
// that), deadlines.go (which key ends next) and table.go (arrays that snapshots share), most with
// a drawing. Other packages build on it:
//
//	durable       a Memory with a log, from which Open makes it again
//	storage       where such a log is kept: a directory of the file system
//	storage/etcd  or one in an etcd cluster
//	storetest     for tests: the model of a store, and a disk that is as unkind as a real one
package kvstore

import (
	"iter"
	"slices"
)

// KVStore holds, under each key, a list of values in the order in which they
// were put. One goroutine at a time may call it: the server's workLoop owns
// its store, so a store needs no lock.
//
// Keys and values are any bytes. They are the caller's: once a call has returned, their
// memory may be used for something else. So a store that keeps one clones it.
type KVStore interface {
	// Put appends value to key's list.
	Put(key, value string)

	// Get returns key's list, oldest first, or nothing. The caller may keep
	// the list and hand it to other goroutines: nobody changes it any more.
	Get(key string) []string

	// Delete removes key and returns how many values it had.
	Delete(key string) (removed int)

	// Update removes the first value equal to oldValue, if there is one, and
	// appends newValue. It returns whether it removed one.
	Update(key, oldValue, newValue string) (replaced bool)

	// Set makes value key's only one, and returns how many there were.
	Set(key, value string) (removed int)

	// Remove removes the first value equal to value, and returns whether there was one.
	// With its last value the key goes.
	Remove(key, value string) (removed bool)

	// Commit returns once everything above is as durable as this store makes
	// it. After an error nothing can be promised any more: the caller answers
	// none of the calls since the last Commit, and stops.
	Commit() error
}

// Store is what a fast server asks of a store: KVStore, and what would cost it more to find
// out with that. Memory and durable.Store are Stores; StoreOf makes one of any KVStore.
type Store interface {
	KVStore

	// Size returns the number of keys, of values, and the bytes of both: each key counts once
	// and each value once. All three are negative if the store does not know.
	Size() (keys, values int, bytes int64)

	// Footprint returns about how many bytes of memory the store takes, 0 if it does not know.
	Footprint() int64

	// Reclaim tells the store that memory is short. It returns how many bytes of the Footprint are
	// dead and can be counted as free, for what is written next gets them.
	Reclaim() (bytes int64)

	// Room returns an error, and has changed nothing, if there is no room for one more record
	// of so many bytes of key and values, or if it could not be saved now. A request that frees, a
	// Delete or a Remove, may use the last room that there is.
	Room(bytes int64, frees bool) error

	// View returns key's list, for a short time: a short one may be made in scratch, and may
	// share a piece of memory with others, which it keeps from being given back. A caller that
	// keeps a list of up to ViewMost bytes for long clones it (CloneAll); a larger one keeps
	// nothing but its own memory.
	View(scratch []string, key string) []string

	// Measure returns how many bytes key's values have together.
	Measure(key string) (bytes int64)

	// Has tells whether key's list has value. It hands nothing out.
	Has(key, value string) bool

	// Take removes key's oldest value, and the key with its last. Of a list of any length it takes
	// a constant time, on the average of many.
	Take(key string) (value string, ok bool)

	// Count returns how many values key has.
	Count(key string) int

	// Expire has key go at a time, in milliseconds of Unix time; 0: it stays. It returns whether
	// key is there. A Set, a Delete, and what removes a key's last value end its deadline. The
	// store does nothing when the time has come: its owner asks NextDue, and deletes the key.
	Expire(key string, at int64) (ok bool)

	// PutUntil is Put and Expire in one step: a crash leaves both or neither.
	PutUntil(key, value string, at int64)

	// Deadline returns when key goes; ok is false if it stays.
	Deadline(key string) (at int64, ok bool)

	// Expiring returns how many keys have a deadline; it is negative if none can have one.
	Expiring() int

	// NextDue returns the key that goes first, if its time is not after now.
	NextDue(now int64) (key string, ok bool)

	// TouchPays tells whether the store is faster if it is told which keys it will be asked
	// for: not while it is small.
	TouchPays() bool

	// Touch prepares for requests of these keys. It changes nothing.
	Touch(keys []string)

	// Snapshot returns what the store holds now; nil: it cannot list its keys. It takes little
	// time, and from then on memory for what the owner changes, as long as somebody has the
	// snapshot.
	Snapshot() Snapshot
}

// ViewMost is how many bytes of values a list that shares memory has at most.
const ViewMost = ownSize

// Snapshot is what a store held at one moment. Any goroutine may have one, while the
// store's owner goes on.
type Snapshot interface {
	// All yields every key with its list, in no order. A list is good until the
	// next one is yielded.
	All() iter.Seq2[string, []string]

	// View is Store's.
	View(scratch []string, key string) []string

	// Deadline is Store's.
	Deadline(key string) (at int64, ok bool)
}

// StoreOf returns db as a Store: db itself if it is one, nil if it is nil.
func StoreOf(db KVStore) Store {
	// A Store is taken as it is; what is less than that gets the rest from plain.
	switch store, isStore := db.(Store); {
	case isStore:
		return store
	case db == nil:
		return nil
	}

	return plain{db}
}

// plain is a Store made of a KVStore, which can neither count nor list what it holds, and in which
// every key stays.
type plain struct{ KVStore }

func (plain) Size() (keys, values int, bytes int64)  { return -1, -1, -1 }
func (plain) Footprint() int64                       { return 0 }
func (plain) Reclaim() int64                         { return 0 }
func (plain) Room(int64, bool) error                 { return nil }
func (p plain) View(_ []string, key string) []string { return p.Get(key) }
func (p plain) Measure(key string) (bytes int64)     { return int64(SizeOf(p.Get(key))) }
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

	// Remove removes the first value that is equal, and that is this one.
	return values[0], p.Remove(key, values[0])
}

func (p plain) Count(key string) int                { return len(p.Get(key)) }
func (p plain) Expire(key string, _ int64) bool     { return len(p.Get(key)) > 0 }
func (p plain) PutUntil(key, value string, _ int64) { p.Put(key, value) }
func (plain) Deadline(string) (int64, bool)         { return 0, false }
func (plain) Expiring() int                         { return -1 }
func (plain) NextDue(int64) (string, bool)          { return "", false }
