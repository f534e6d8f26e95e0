package protocol

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// StartOn starts a server on a store, as Start does.
type StartOn func(t *testing.T, db kvstore.Store) *Net

// on starts a server on db in a test's bubble. At the test's end the clients that are left hang up.
func (start StartOn) on(t *testing.T, db kvstore.Store) *Net {
	n := start(t, db)
	t.Cleanup(func() {
		if !t.Failed() {
			n.HangUp()
		}
	})
	return n
}

// LazyStore is a Memory whose Updates take a while, as those of huge lists do.
type LazyStore struct {
	*kvstore.Memory
	Takes func() time.Duration
}

func (l LazyStore) Update(key, oldValue, newValue string) bool {
	<-time.After(l.Takes())
	return l.Memory.Update(key, oldValue, newValue)
}

// SlowStore is a Memory whose Commit takes a while if something was Put.
type SlowStore struct {
	*kvstore.Memory
	Takes   time.Duration
	isNew   bool         // something was Put
	Commits atomic.Int64 // that took a while
}

func (s *SlowStore) Put(key, value string) {
	s.isNew = true
	s.Memory.Put(key, value)
}

func (s *SlowStore) Commit() error {
	if s.isNew {
		s.isNew = false
		s.Commits.Add(1)
		<-time.After(s.Takes)
	}
	return nil
}

// GatedStore is a Memory whose Commit waits for its result.
type GatedStore struct {
	*kvstore.Memory
	Gate chan error
}

func (g GatedStore) Commit() error { return <-g.Gate }

// Roomless is a Memory on a disk that has no room for anything while Full is set. It counts how
// often it was asked for room for a request that frees.
type Roomless struct {
	*kvstore.Memory
	Full  atomic.Bool
	Keeps atomic.Bool // there is no room for a request that frees
	Why   error       // why there is no room; nil: no space
	Frees atomic.Int64
}

func (r *Roomless) Room(_ string, _ int64, removes int) error {
	if removes > 0 {
		r.Frees.Add(1)
	}
	if r.Full.Load() || r.Keeps.Load() && removes > 0 {
		return cmp.Or(r.Why, error(syscall.ENOSPC))
	}
	return nil
}

// PlainStore is a KVStore that is no Store, and whose Commit fails when told to.
type PlainStore struct {
	kvstore.KVStore
	Commits int
	Fail    error
	Last    []string // the last result of Get
}

func (p *PlainStore) Get(key string) []string {
	p.Last = p.KVStore.Get(key)
	return p.Last
}

func (p *PlainStore) Commit() error {
	p.Commits++
	return p.Fail
}

// listedStore is a Store made from a KVStore, with the Snapshot of the Memory behind it.
type listedStore struct {
	kvstore.Store
	held *kvstore.Memory
}

func (l listedStore) Snapshot() kvstore.Snapshot { return l.held.Snapshot() }

// StoreOfAnyKind ensures that the server needs only the KVStore interface from a store, and a
// Snapshot for Keys and Dump.
func StoreOfAnyKind(t *testing.T, start StartOn, help []string) {
	for _, c := range All(help) {
		synctest.Test(t, func(t *testing.T) {
			held := kvstore.NewMemory()
			n := start.on(t, listedStore{kvstore.StoreOf(struct{ kvstore.KVStore }{held}), held})

			a := n.Dial(t)
			go a.SendAll(c.Send)
			got := a.ReadAll()

			keeps := strings.Contains(got, ": this store keeps every key until somebody deletes it\n")
			if got != c.Want && !(keeps && strings.Contains(c.Send, "Expire:")) {
				t.Errorf("%s: got %.600q\nwant %.600q", c.Name, got, c.Want)
			}

			b := n.Dial(t)
			b.Send("Stats\n")
			for line := b.Read(); !strings.HasPrefix(line, ":OK "); line = b.Read() {
				if strings.HasPrefix(line, ": keys ") {
					t.Errorf("Stats says %q of a store that cannot know", line)
				}
			}
		})
	}
}

// SnapshotStore is a store that knows whether its last snapshot is still in memory.
type SnapshotStore struct {
	kvstore.Store
	Last weak.Pointer[snapshot]
}

type snapshot struct{ kvstore.Snapshot }

func (s *SnapshotStore) Snapshot() kvstore.Snapshot {
	made := &snapshot{s.Store.Snapshot()}
	s.Last = weak.Make(made)
	return made
}

// touched is a Memory that counts the keys that it is to prepare for (Touch).
type touched struct {
	*kvstore.Memory
	keys int
}

func (t *touched) TouchPays() bool     { return true }
func (t *touched) Touch(keys []string) { t.keys += len(keys) }

// StoreIsTouched ensures that a store is told all keys of each chain with so many or more, and none
// of shorter ones.
func StoreIsTouched(t *testing.T, start StartOn, least int) {
	synctest.Test(t, func(t *testing.T) {
		db := &touched{Memory: kvstore.NewMemory()}
		a, want := start.on(t, db).Dial(t), 0
		for _, keys := range []int{least + 1, least - 1, least} {
			a.Ask(strings.Repeat("Get:k\n", keys)+"Ping", ":PONG")
			if keys >= least {
				want += keys
			}
			is.Equal(t, "keys that the store was told", db.keys, want)
		}
	})
}

// DumpOfAStoreThatCannotList ensures that a store that cannot list its keys, or let them expire,
// says so.
func DumpOfAStoreThatCannotList(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		held := kvstore.NewMemory()
		a := start.on(t, kvstore.StoreOf(struct{ kvstore.KVStore }{held})).Dial(t)
		a.Ask("Keys", ":ERROR line 1: this store cannot list its keys")
		a.Ask("Dump", ":ERROR line 2: this store cannot list its keys")
		a.Ask("Lease:k:5:v", ":ERROR line 3: this store keeps every key until somebody deletes it")
		a.Ask("Add:k:v\nExpire:k:5", ":ERROR line 5: this store keeps every key until somebody deletes it")
		a.Ask("Ack\nCount:k", ":OK 0", ":OK 1")
		keys, _, _ := held.Size()
		is.Equal(t, "keys", keys, 1)
	})
}

// TurnsOfLightClients ensures that a client that asks for little waits for one or two turns of
// other clients, not for one of each, whether they send one long request at a time, a short one
// between two long ones, or many in one chain, and most often for none behind it; and that the
// others get equal shares.
func TurnsOfLightClients(t *testing.T, start StartOn) {
	t.Parallel()
	const others, takes = 100, 2 * time.Millisecond
	for _, script := range []string{"Update:k:a:b\nPing\n",
		"Get:none\nPing\n|Update:k:a:b\nPing\n", strings.Repeat("Update:k:a:b\n", 10) + "Ping\n"} {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			n := start.on(t, LazyStore{kvstore.NewMemory(), func() time.Duration {
				return world.Between(random, takes/2, takes)
			}})

			victim := n.Dial(t)
			victim.Ask("Ping", ":PONG")
			parts := strings.Split(script, "|")

			var stop atomic.Bool
			var all sync.WaitGroup
			rounds := make([]atomic.Int64, others)
			clients := n.DialMany(t, others, func(int, *Client) {})
			for i, c := range clients {
				all.Go(func() {
					defer c.HangUp()
					for ; !stop.Load(); rounds[i].Add(1) {
						for _, part := range parts {
							c.Ask(strings.TrimSuffix(part, "\n"), ":PONG")
						}
					}
				})
			}

			updates := strings.Count(script, "Update")
			for least := int64(0); len(parts) > 1 && least == 0; least, _ = span(rounds) {
				world.Pass(takes) // until each is known to ask for more than a little
			}

			const asks = 200
			began := time.Now()
			for range asks {
				// Its requests come at all moments of the others' turns.
				world.Pass(3 * takes / 7)
				is.Within(t, 0, 2*takes, func() { victim.Ask("Put:x:y\nDelete:x\nPing", ":PONG") })
			}
			is.Between(t, "time that it has waited", time.Since(began)-asks*(3*takes/7), 0, asks*takes*3/4)

			// This is time for five rounds of each.
			world.Pass(time.Duration(5*others*updates) * takes)
			least, most := span(rounds)
			if least < 4 || most > 3*least { // none starves
				t.Errorf("others have had from %d to %d replies (%q)", least, most, script)
			}

			stop.Store(true)
			all.Wait()
		})
	}
}

// TurnsAfterALongRequest ensures that a client whose request took very long waits for hardly more
// than a round of each other client, and not until each has had as much.
func TurnsAfterALongRequest(t *testing.T, start StartOn, round time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		takes := time.Second
		n := start.on(t, LazyStore{kvstore.NewMemory(), func() time.Duration { return takes }})
		a := n.DialAck(t)
		a.Ask("Update:k:a:b", ":OK 0")

		takes = time.Millisecond
		others := n.DialMany(t, 5, func(_ int, o *Client) {
			go o.SendSome(strings.Repeat("Update:k:a:b\n", 2000) + "Ping\n")
		})

		world.Pass(10 * takes)
		is.Within(t, 0, 2*round*time.Duration(len(others)), func() { a.Ask("Update:k:a:b", ":OK 0") })
		for _, o := range others {
			o.Want(":PONG")
		}
	})
}

// span returns the least and the most of numbers.
func span(numbers []atomic.Int64) (least, most int64) {
	least = math.MaxInt64
	for i := range numbers {
		n := numbers[i].Load()
		least, most = min(least, n), max(most, n)
	}
	return least, most
}

// ExpireIsCommitted ensures that nobody learns that a key has gone before its removal is committed.
func ExpireIsCommitted(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		store := GatedStore{kvstore.NewMemory(), make(chan error, 9)}
		store.PutUntil("k", "v", time.Now().Add(time.Second).UnixMilli())
		n := start.on(t, store)
		a := n.Dial(t)
		store.Gate <- nil
		a.Ask("Get:k", "k:v")

		world.Pass(time.Second + 2*expireTime)
		// The key is removed, and the Commit of that waits.
		a.Send("Get:k\nPing\n")
		a.WantNothing()
		store.Gate <- nil
		a.Want(":PONG")
		a.Close()
	})
}

// ExpireOnAFullDisk ensures that a key whose time is over is not shown if the disk has no room for
// its Delete, and is removed once it has.
func ExpireOnAFullDisk(t *testing.T, start StartOn) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db := &Roomless{Memory: kvstore.NewMemory()}
		db.PutUntil("k", "v", time.Now().Add(time.Second).UnixMilli())
		db.Full.Store(true)

		n := start.on(t, db)
		a := n.Dial(t)
		a.Ask("Get:k", "k:v")
		world.Pass(5 * time.Minute)
		a.Ask("Get:k\nKeys", ":ERROR line 2: the key's time is over, but it cannot be deleted: "+
			syscall.ENOSPC.Error(), ":OK 0")

		db.Full.Store(false)
		world.Pass(2 * expireTime)
		keys, _, _ := db.Size()
		is.Equal(t, "keys that are there still", keys, 0)

		a.Ask("Get:k\nPing", ":PONG")
		a.WantStat("expired_keys_total", 1)
	})
}

// TakeThatComesLate ensures that a Take that the server runs only after its time is over still
// looks for a value, but takes none for a client that has gone.
func TakeThatComesLate(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		n := start.on(t, LazyStore{kvstore.NewMemory(), func() time.Duration { return 3 * time.Second }})
		a, b, c, d, e := n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t)
		d.Ask("Put:k:1\nPut:k:2\nPing", ":PONG")
		e.Ask("Ack", ":OK 0")

		// This Update holds the server up for three seconds, and the Takes come behind it.
		c.Post("Update:x:a:b\nPing\n")
		b.Post("Take:k:600\n")
		a.Send("Take:k:1\n")
		e.Send("Take:none:1\n")
		e.Conn.CloseWrite()

		world.Pass(time.Second)
		b.BreakOff()
		a.Want("k:1")
		e.Want(":OK 0")
		e.WantClosed()

		d.Ask("Get:k\nPing", "k:2", ":PONG")
		c.Want(":PONG")
		b.Close()
	})
}

// TakeOnAFullDisk ensures that a write without room on the disk is told why, the files or the room,
// and wakes no Take; and that a Take that has waited asks for room, because on a full disk a
// request that frees needs some.
func TakeOnAFullDisk(t *testing.T, start StartOn) {
	for why, refusal := range map[error]string{
		syscall.ENOSPC:     "the disk is full",
		durable.ErrSpoiled: "the data cannot be saved",
	} {
		synctest.Test(t, func(t *testing.T) {
			db := &Roomless{Memory: kvstore.NewMemory(), Why: why}
			n := start.on(t, db)
			a, b := n.DialAck(t), n.Dial(t)

			a.Post("Take:k:60\n")
			db.Full.Store(true)
			b.Ask("Put:k:v\nPing", ":ERROR line 1: "+refusal+", nothing was changed: "+why.Error(), ":PONG")

			db.Full.Store(false)
			before := db.Frees.Load()
			b.Ask("Put:k:w\nPing", ":PONG")
			a.Want("k:w", ":OK 1")
			is.Equal(t, "how often the Take asks for room", db.Frees.Load()-before, 1)

			// A Take that is refused leaves the value.
			a.Post("Take:k:60\n")
			db.Keeps.Store(true)
			b.Ask("Put:k:x\nCount:k", ":OK 1")
			a.Want(":ERROR line 3: " + refusal + ", nothing was changed: " + why.Error())
		})
	}
}

// MemoryOfALastRequest ensures that a client between two requests keeps nothing of the last one
// alive.
func MemoryOfALastRequest(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		store := &PlainStore{KVStore: kvstore.NewMemory()}
		store.Put("k", "v")
		n := start.on(t, kvstore.StoreOf(store))
		a := n.Dial(t)
		a.Ask("Get:k", "k:v")

		synctest.Wait()
		list := weak.Make(&store.Last[0])
		store.Last = nil
		runtime.GC()
		is.Equal(t, "the list of the last Get in memory", list.Value(), nil)
	})
}

// ExpireManyAtOnce ensures that many keys that end at once are deleted in turns with the clients'
// requests, and that nobody sees those that are still there. A round of turns may take this long
// beside so many Deletes.
func ExpireManyAtOnce(t *testing.T, start StartOn, round time.Duration, deletes int) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const many, takes = 6000, 10 * time.Microsecond
		db := slowDeletes{kvstore.NewMemory(), takes}
		for i := range many {
			db.PutUntil(fmt.Sprint("k", i), "v", time.Now().Add(time.Second).UnixMilli())
		}
		db.Put("stays", "v")

		a := start.on(t, db).Dial(t)
		world.Pass(time.Second - time.Millisecond)
		a.Ask("Count:k1", ":OK 1")
		a.WantStat("expiring_keys", many)
		<-time.After(time.Millisecond)

		most := round + time.Duration(deletes+2)*takes
		left, turns := many, 0
		for ; left > 0; turns++ {
			start := time.Now()

			left = a.Stat("expiring_keys")
			key := fmt.Sprint("k", many-1-turns)
			a.Ask("Get:"+key+"\nCount:"+key+"\nAdd:"+key+":w\nGet:"+key+"\nDelete:"+key, ":OK 0", key+":w")
			a.Ask("Keys\nDump", ": stays", ":OK 1", ": Put:stays:v", ":OK 1")

			const chains = 4
			if took := time.Since(start); took > 2*chains*most { // for one under way, and its own
				t.Fatalf("with %d keys to go a client waits %v", left, took)
			}
		}

		is.Between(t, "turns in which the keys went", turns, 10, 100)

		// Nobody has to ask for them.
		var leases strings.Builder
		for i := range many {
			fmt.Fprintf(&leases, "Lease:k%d:1:v\n", i)
		}
		a.Ask(leases.String()+"Ping", ":PONG")
		world.Pass(time.Second + 2*many*takes)
		a.WantStat("expiring_keys", 0)
	})
}

// slowDeletes is a Memory whose Deletes take a while.
type slowDeletes struct {
	*kvstore.Memory
	takes time.Duration
}

func (s slowDeletes) Delete(key string) int {
	<-time.After(s.takes)
	return s.Memory.Delete(key)
}

// RoomForEveryWrite ensures that a store is asked for room for all that a write adds to its log, and
// is told how much it removes.
func RoomForEveryWrite(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		dir.Reserve = 0 // so that the log ends with what was written
		store, err := durable.Open(t.Context(), dir, durable.Options{})
		is.OK(t, err)
		t.Cleanup(func() { is.OK(t, store.Close()) })
		db := &roomCounter{Store: store}

		long := func(of string) string { return strings.Repeat(of, kilo) }
		c, size := start.on(t, db).DialAck(t), 0
		for _, verb := range []string{"Put:k:v", "Set:k:v", "Update:k:v:w", "Swap:k:w:v", "Add:l:v",
			"Expire:k:9", "Lease:m:9:v", "Remove:k:v", "Take:l", "Delete:m"} {
			name, arguments, _ := strings.Cut(verb, ":")
			c.Send(name + ":" + regexp.MustCompile("[a-z]").ReplaceAllStringFunc(arguments, long) + "\nPing\n")
			for c.Read() != ":PONG" {
			}

			data, _ := dir.Read("seg-1.log")
			if size > 0 {
				is.Between(t, "bytes in the log of "+verb, int64(len(data)-size), 1, db.asked+100)
			}
			size = len(data)
			is.Equal(t, "values that are removed by "+name, db.removes,
				map[string]int{"Remove": 1, "Take": 1, "Delete": math.MaxInt}[name])
		}
	})
}

// roomCounter is a store that notes for how many bytes it was asked last, and how many values the
// request may remove.
type roomCounter struct {
	*durable.Store
	asked   int64
	removes int
}

func (r *roomCounter) Room(key string, bytes int64, removes int) error {
	r.asked, r.removes = bytes, removes
	return r.Store.Room(key, bytes, removes)
}
