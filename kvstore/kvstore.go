// Package kvstore keeps lists of values under keys.
//
// KVStore is what the server asks of a store. Memory lives and dies with the process: memory.go
// (what it does), index.go (how it finds a key) and slab.go (how a key and its list lie in
// memory), each with a drawing. Other packages build on it:
//
//	durable       a Memory with a log, from which Open makes it again
//	storage       where such a log is kept: a directory of the file system
//	storage/etcd  or one in an etcd cluster
//	storetest     for tests: the model of a store, and a disk that is as unkind as a real one
package kvstore

import "iter"

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

// Sizer is a KVStore that knows how much it holds.
type Sizer interface {
	// Size returns the number of keys, of values, and the bytes of both: each
	// key counts once and each value once.
	Size() (keys, values int, bytes int64)
}

// Measurer is a KVStore that knows how large its lists are.
type Measurer interface {
	// Measure returns how many bytes key's values have together. It does not walk
	// through them.
	Measure(key string) (bytes int64)
}

// Roomer is a KVStore that can run out of room.
type Roomer interface {
	// Room returns an error, and has changed nothing, if there is no room for one
	// more record of so many bytes of key and values. A request that frees, a Delete or a
	// Remove, may use the last room that there is.
	Room(bytes int64, frees bool) error
}

// Viewer is a KVStore whose lists can be had without copies.
type Viewer interface {
	// View returns key's list, for a short time: a short one may be made in scratch, and
	// may share a piece of memory with others, which it keeps from being given back. Who
	// keeps one of up to ViewMost bytes for long clones it (CloneAll); a larger one keeps
	// nothing but its own memory.
	View(scratch []string, key string) []string
}

// ViewMost is how many bytes of values a list has at most that shares memory.
const ViewMost = ownSize

// Haser is a KVStore that can look for a value without handing its list out.
type Haser interface {
	// Has tells whether key's list has value.
	Has(key, value string) bool
}

// Toucher is a KVStore that is faster if it is told what it will be asked.
type Toucher interface {
	// TouchPays tells whether it is, now: not while the store is small.
	TouchPays() bool
	// Touch prepares for requests of these keys. It changes nothing.
	Touch(keys []string)
}

// Snapshotter is a KVStore that can show what it holds at one moment.
type Snapshotter interface {
	// Snapshot returns what the store holds now. It takes little time, and from then on
	// memory for what the owner changes, as long as somebody has the snapshot.
	Snapshot() Snapshot
}

// Snapshot is what a store held at one moment. Any goroutine may have one, while the
// store's owner goes on.
type Snapshot interface {
	// All yields every key with its list, in no order. A list is good until the next.
	All() iter.Seq2[string, []string]
	// View is Viewer's.
	View(scratch []string, key string) []string
}

// Footprinter is a KVStore that knows how much memory it takes.
type Footprinter interface {
	// Footprint returns that in bytes, about.
	Footprint() int64
}
