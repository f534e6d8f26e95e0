package protocol

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// CommitBeforeGets ensures that a Get that sees another client's Put is not answered before the Put
// is committed.
func CommitBeforeGets(t *testing.T, start StartOn) {
	for _, failure := range []error{nil, errors.New("disk on fire")} {
		synctest.Test(t, func(t *testing.T) {
			store := GatedStore{kvstore.NewMemory(), make(chan error, 3)}
			n := start.on(t, kvstore.StoreOf(store))
			a, b, c := n.Dial(t), n.Dial(t), n.Dial(t)
			for _, x := range []*Client{a, b, c} {
				store.Gate <- nil
				x.Ask("Ping", ":PONG")
			}

			c.Post("Ping\n") // workLoop waits, and the next two are committed together
			a.Post("Put:k:v\n")
			b.Post("Get:k\n")

			store.Gate <- nil
			c.Want(":PONG")
			b.WantNothing()

			c.Post("Put:late:v\nKeys\n") // they are not run if that Commit fails
			store.Gate <- failure
			if failure == nil {
				b.Want("k:v")
			}

			for range cap(store.Gate) {
				store.Gate <- nil
			}
			if failure == nil {
				c.Want(": k", ": late", ":OK 2")
			}
			synctest.Wait()
			is.Equal(t, fmt.Sprint("a Put after a Commit has run, ", failure), store.Count("late") > 0, failure == nil)
		})
	}
}

// crowded is a Memory whose Commits find no room while isFull is set; if once is set, the next one.
type crowded struct {
	LazyStore
	isFull, once atomic.Bool
}

func (c *crowded) Commit() error {
	if c.once.Swap(false) || c.isFull.Load() {
		return storage.ErrNoRoom
	}
	return nil
}

// takesLong is how long an Update of a crowded store takes.
func takesLong() time.Duration { return 10 * time.Millisecond }

// CommitWithoutRoom ensures that while Commits find no room, what was written has no answer, nor
// has what may tell of it, and that all else is answered; and that once there is room nothing is
// owed.
func CommitWithoutRoom(t *testing.T, start StartOn) {
	synctest.Test(t, func(t *testing.T) {
		db := &crowded{LazyStore: LazyStore{kvstore.NewMemory(), takesLong}}
		n := start.on(t, db)
		reader, writer, other, lister, taker := n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t)
		slow, late, timer, patient := n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t)
		reader.Ask("Put:old:1\nPut:gone:1\nPing", ":PONG")
		taker.Post("Take:job:600\n")
		db.isFull.Store(true)
		defer db.isFull.Store(false) // or a test that fails would never end

		// Chains that write wait as a whole, and so do Takes that they serve.
		writer.Post("Get:old\nSet:new:1\nPut:job:1\n")
		other.Post("Count:new\n")
		lister.Post("Keys\n")
		timer.Post("Expire:new\n")
		patient.Post("Ack\nTake:void:2\nDelete:void\n") // these change nothing
		for range 3 {
			world.Pass(time.Second) // later Commits try again
			for _, c := range []*Client{writer, other, lister, taker, timer} {
				c.WantNothing()
			}
			reader.Ask("Get:old\nGet:none\nPing", "old:1", ":PONG")
		}
		is.Equal(t, "bytes for who changed nothing", patient.Conn.(*world.Conn).Unread(), 3*len(":OK 0\n"))

		// A chain that waits for its turn has written, too.
		slow.Post("Delete:gone\nUpdate:x:a:b\nPing\n")
		late.Post("Count:x\n")
		world.Pass(2 * takesLong())
		late.WantNothing()
		reader.Ask("Get:old", "old:1")
		if t.Failed() { // what came too early would be waited for below
			return
		}

		// Nobody sends anything: the server itself tries again.
		db.isFull.Store(false)
		world.Pass(2 * time.Second)
		writer.Want("old:1")
		other.Want(":OK 1")
		lister.Want(": gone", ": new", ": old", ":OK 3")
		taker.Want("job:1")
		timer.Want(":OK 1")
		patient.Want(":OK 0", ":OK 0", ":OK 0")
		slow.Want(":PONG")
		late.Want(":OK 1")

		// What is durable by now is not held the next time, also if only a chain that waited for its
		// turn had changed it.
		db.once.Store(true)
		slow.Post("Put:gone:2\nUpdate:x:a:b\nPing\n")
		late.Post("Ping\n")
		slow.Want(":PONG")
		late.Want(":PONG")
		db.isFull.Store(true)
		writer.Post("Put:new:2\n")
		reader.Ask("Count:gone", ":OK 1")
	})
}

// CommitGathers ensures that clients that come back soon share a slow Commit, whenever they came
// first, and that no batch waits for long for clients that have left, come later, only read, or
// wait for a value.
func CommitGathers(t *testing.T, start StartOn) {
	for _, cases := range []map[string]gathers{gathersAlone, gathersBeside, gathersReaders} {
		for what, test := range cases {
			t.Run(what, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store := &SlowStore{Memory: kvstore.NewMemory(), Takes: commitTakes}
					test(t, start.on(t, store), store)
				})
			})
		}
	}
}

// commitTakes is how long a Commit takes. aSecond is how many of them take a second.
const commitTakes, aSecond = 10 * time.Millisecond, 100

// gathers tries how n's server gathers writes for the slow Commits of store.
type gathers func(t *testing.T, n *Net, store *SlowStore)

// gathersBeside has tests of ten clients that come each time, beside others.
var gathersBeside = map[string]gathers{
	"one that reads in between": beside(aSecond*3/2, func(t *testing.T, n *Net, ended <-chan struct{}) {
		for both := n.DialAck(t); ; {
			select {
			case <-ended:
				return
			default:
			}
			both.Ask("Get:none", ":OK 0")
			both.Ask("Put:k:v", ":OK 1")
		}
	}),
	"some that come seldom": beside(140, func(t *testing.T, n *Net, _ <-chan struct{}) {
		n.repeat(t, 8, 9*commitTakes/8, 9*commitTakes, aSecond/5)
	}),
	"one that pauses": beside(127, func(t *testing.T, n *Net, _ <-chan struct{}) {
		c := n.DialAck(t)
		for i := range aSecond / 2 { // it comes for a while, pauses, and comes again
			c.Ask("Put:k:v", ":OK 1")
			<-time.After(commitTakes/10 + commitTakes*time.Duration(i%5/4*5))
		}
	}),
}

// gathersAlone has tests of clients that all do the same.
var gathersAlone = map[string]gathers{
	"halves": func(t *testing.T, n *Net, store *SlowStore) {
		n.repeat(t, 10, commitTakes/2, time.Millisecond, 20)
		is.Between(t, "Commits for 20 rounds of all clients", store.Commits.Load(), 0, 35)
	},
	"halves, on a fast disk": func(t *testing.T, n *Net, store *SlowStore) {
		store.Takes = commitTakes / 100
		n.repeat(t, 10, store.Takes/2, store.Takes/10, 20)
		is.Between(t, "Commits for 20 rounds of all clients", store.Commits.Load(), 0, 35)
	},
	"one that came before all others": func(t *testing.T, n *Net, store *SlowStore) {
		clients := n.DialMany(t, 20, func(_ int, c *Client) { c.Ask("Ack", ":OK 0") })
		began := store.Commits.Load()
		var all sync.WaitGroup
		for i, c := range clients {
			all.Go(func() {
				<-time.After(min(time.Duration(i), 1) * commitTakes / 2)
				for range aSecond {
					c.Ask("Put:k:v", ":OK 1")
					<-time.After(commitTakes / 5)
				}
				c.HangUp()
			})
		}

		all.Wait()
		is.Between(t, "Commits for 100 rounds of all", store.Commits.Load()-began, 0, 150)
	},
	"gone, so that one is alone": func(t *testing.T, n *Net, _ *SlowStore) {
		clients := n.DialMany(t, 10, func(_ int, c *Client) { c.Ask("Ack", ":OK 0") })

		for range 5 { // all come each time
			for _, c := range clients {
				c.Send("Put:k:v\n")
			}
			for _, c := range clients {
				c.Want(":OK 1")
			}
		}

		for _, c := range clients {
			c.HangUp()
		}

		alone := n.Dial(t)
		for range 3 {
			began := time.Now()
			alone.Ask("Put:k:v\nPing", ":PONG")
			is.Between(t, "the wait of a client that is alone", time.Since(began), 0, commitTakes)
		}
	},
	"late": func(t *testing.T, n *Net, store *SlowStore) {
		began := time.Now()
		n.repeat(t, 2, commitTakes/70, commitTakes*7/10, aSecond)
		is.Between(t, "Commits of clients that come late", store.Commits.Load(),
			int64(time.Since(began)/commitTakes)*95/100, math.MaxInt64)
	},
}

// gathersReaders has tests of clients that read, or take, beside one that writes.
var gathersReaders = map[string]gathers{
	"readers": func(t *testing.T, n *Net, store *SlowStore) {
		reader, gets := n.DialAck(t), 0
		go n.repeat(t, 1, 0, commitTakes*4/10, aSecond)

		for end := time.Now().Add(aSecond * commitTakes); time.Now().Before(end); gets++ {
			reader.Ask("Get:none", ":OK 0")
			<-time.After(commitTakes / 200)
		}

		is.Between(t, "Gets where over a quarter of the time is without a Commit", gets, 2000, math.MaxInt)
		world.Pass(time.Second)
	},
	"Takes": func(t *testing.T, n *Net, store *SlowStore) {
		for range 2 {
			worker := n.DialAck(t)
			go func() {
				for worker.Send("Take:k:2\n"); len(worker.ReadList()) > 0; {
					worker.Send("Take:k:2\n")
				}
			}()
		}

		began := time.Now()
		n.repeat(t, 1, 0, commitTakes/100, aSecond)
		is.Between(t, "time of 100 values for two workers", time.Since(began), 0,
			aSecond*(commitTakes+commitTakes/50))
		world.Pass(3 * time.Second)
	},
}

// beside returns a test of ten clients that come each time while others do something else until
// ended is closed: there may be most Commits for 100 rounds.
func beside(most int64, others func(t *testing.T, n *Net, ended <-chan struct{})) gathers {
	return func(t *testing.T, n *Net, store *SlowStore) {
		ended := make(chan struct{})
		var all sync.WaitGroup
		all.Go(func() { others(t, n, ended) })
		n.repeat(t, 10, commitTakes/10, commitTakes/10, aSecond)

		got := store.Commits.Load()
		close(ended)
		all.Wait()
		is.Between(t, "Commits for 100 rounds of all who come each time", got, 0, most)
	}
}

// repeat has clients Put so many rounds, and think between two Puts. Each client begins so long
// after the one before it.
func (n *Net) repeat(t *testing.T, clients int, after, thinks time.Duration, rounds int) {
	var all sync.WaitGroup
	for i := range clients {
		c := n.DialAck(t)
		all.Go(func() {
			<-time.After(after * time.Duration(i))
			for range rounds {
				c.Ask("Put:k:v", ":OK 1")
				<-time.After(thinks)
			}
			c.HangUp()
		})
	}
	all.Wait()
}
