package protocol

import (
	"bytes"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// FullMemoryRefusesWhatAdds ensures that a server whose memory is full refuses the writes that
// would add a value, a byte or a deadline, and no others. What a write would add is seen on a
// server that has memory.
func FullMemoryRefusesWhatAdds(t *testing.T, roomy, full StartOn) {
	synctest.Test(t, func(t *testing.T) {
		dbs := [2]*kvstore.Memory{kvstore.NewMemory(), kvstore.NewMemory()}
		for _, db := range dbs {
			for i := range writesOfAKey {
				db.Put(fmt.Sprint("one", i), "22")
				db.Put(fmt.Sprint("two", i), "22")
				db.Put(fmt.Sprint("two", i), "4444")
				db.PutUntil(fmt.Sprint("leased", i), "22", time.Now().Add(time.Hour).UnixMilli())
			}
		}
		a, b := roomy.on(t, dbs[0]).DialAck(t), full.on(t, dbs[1]).DialAck(t)

		for i, write := range writesOfAKey {
			for _, key := range []string{"none", "one", "two", "leased"} {
				request := fmt.Sprintf(write, fmt.Sprint(key, i))
				before := sizeOf(dbs[0])
				want := a.answer(request)
				if after := sizeOf(dbs[0]); after.exceeds(before) {
					want = "memory is full"
				}

				before = sizeOf(dbs[1])
				got := b.answer(request)
				is.In(t, request, got, want)
				if want == "memory is full" {
					is.Equal(t, request+" has changed the size", sizeOf(dbs[1]), before)
				}
			}
		}
	})
}

// writesOfAKey are writes of a key that may hold 22, or 22 and 4444.
var writesOfAKey = []string{"Put:%s:", "Put:%s:1", "Set:%s:", "Set:%s:1", "Set:%s:22", "Set:%s:666666",
	"Set:%s:7777777", "Add:%s:", "Add:%s:1", "Lease:%s:9:1", "Update:%s:22:", "Update:%s:22:22",
	"Update:%s:22:333", "Update:%s:no:1", "Swap:%s:22:", "Swap:%s:22:22", "Swap:%s:22:333", "Swap:%s:no:1",
	"Expire:%s:9", "Expire:%s:0", "Remove:%s:22", "Remove:%s:no", "Take:%s", "Delete:%s"}

// size is how much a store holds.
type size struct {
	keys, values, deadlines int
	bytes                   int64
}

func sizeOf(db *kvstore.Memory) (s size) {
	synctest.Wait() // nobody changes it any more
	s.keys, s.values, s.bytes = db.Size()
	s.deadlines = db.Expiring()
	return s
}

// exceeds reports whether s is more than before in any way.
func (s size) exceeds(before size) bool {
	return s.keys > before.keys || s.values > before.values || s.deadlines > before.deadlines ||
		s.bytes > before.bytes
}

// answer returns the reply to a request.
func (c *Client) answer(request string) string {
	var lines []string
	for c.Send(request + "\nPing\n"); len(lines) == 0 || lines[len(lines)-1] != ":PONG"; {
		lines = append(lines, c.Read())
	}
	return strings.Join(lines[:len(lines)-1], "\n")
}

// FullMemoryIsUsedAgain ensures that memory freed by Deletes is used again when the memory is full:
// the room of every fourth of many short values is filled with longer ones.
func FullMemoryIsUsedAgain(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)

		put := func(name string, size int) (stored int) {
			value := strings.Repeat("v", size)
			for ; ; stored += 100 {
				var b strings.Builder
				for i := range 100 {
					fmt.Fprintf(&b, "Put:%s%d:%s\n", name, stored+i, value)
				}

				a.Send(b.String() + "Ping\n")
				refused := false
				for line := a.Read(); line != ":PONG"; line = a.Read() {
					refused = true
				}

				if refused {
					return stored
				}
			}
		}

		stored := put("short", 100)
		var b strings.Builder
		for i := 0; i < stored; i += 4 {
			fmt.Fprintf(&b, "Delete:short%d\n", i)
		}

		a.Send(b.String() + "Ping\n")
		a.Want(":PONG")

		// A quarter of the room holds half as many values of twice the size. Some may be lost.
		if again := put("longer", 200); again < stored/4/2*3/4 {
			t.Errorf("of %d values every fourth is deleted, and then %d of twice the size fit", stored, again)
		}
	})
}

// FullMemoryCollectsSeldom ensures that refused writes, however many, start one collection of
// garbage in interval.
func FullMemoryCollectsSeldom(t *testing.T, full StartOn, interval time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		a := full.on(t, kvstore.NewMemory()).DialAck(t)
		collections := func() (all, started uint32) {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.NumGC, m.NumForcedGC
		}

		const rounds = 20
		_, before := collections()
		for range rounds {
			done, _ := collections()
			is.In(t, "the reply", a.answer("Put:k:v"), "memory is full")
			for all := done; all == done; all, _ = collections() { // it runs outside of the bubble
				runtime.Gosched()
			}

			for range 100 {
				a.answer("Put:k:v")
			}
			world.Pass(interval)
		}

		_, started := collections()
		most := uint32(rounds * 3 / 2) // some of an earlier test may end during this one
		is.Between(t, "collections because of refused writes", started-before, 1, most)
	})
}

// MemoryOfAnEndlessLine ensures that a line that is far too long takes no more memory than the
// limit.
func MemoryOfAnEndlessLine(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a, b := n.Dial(t), n.Dial(t)
		big := bytes.Repeat([]byte("x"), 1<<20)
		before := HeapBytes()
		a.SendSome("Put:k:")
		for range 4 {
			a.Conn.Write(big)
		}
		b.Ask("Ping", ":PONG")
		is.Between(t, "bytes of 4 MiB of a line", HeapBytes()-before, math.MinInt,
			world.StreamSize+4*MaxLine)

		a.Send("\n")
		a.Ask("Ping", ":ERROR line 1: longer than 20000 bytes, skipped", ":PONG")
	})
}

// MemoryOfAnUnfinishedLine ensures that a line that fills a Read of size bytes, and does not end,
// takes no more than most bytes, however long it waits.
func MemoryOfAnUnfinishedLine(t *testing.T, start Start, size, most int, wait time.Duration) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		n.run(t, "Delete:none\n") // which starts the server
		before := HeapBytes()
		clients := n.DialMany(t, 10, func(_ int, a *Client) {
			a.Send("Put:k:" + strings.Repeat("v", size-len("Put:k:")))
		})

		world.Pass(wait)
		is.Between(t, "bytes of a client with a part of a line",
			(HeapBytes()-before)/len(clients), math.MinInt, most)

		for _, a := range clients {
			a.Send("\n")
			a.HangUp()
		}
	})
}

// MemoryOfABusyClient ensures that a client that goes on keeps one burst alive, and not every
// earlier one. A chain has maxChain requests at most.
func MemoryOfABusyClient(t *testing.T, start Start, maxChain int) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)
		a.Ask("Ping", ":PONG")
		before := HeapBytes()

		// Each chain is shorter than the last: its spare queries must keep no earlier burst.
		for lines := maxChain; lines > 0; lines -= 8 {
			a.Send("Get:" + strings.Repeat("x", MaxLine-10) + strings.Repeat("\nGet:a", lines-1) + "\n")
			a.Ask("Ping", ":PONG")
		}
		is.Between(t, "bytes more of a busy client", HeapBytes()-before, math.MinInt, 10*MaxLine)
	})
}

// TakeIsSmallWhileItWaits ensures that a client whose Take waits takes little more memory than a
// quiet one, whatever it has sent before it, such as a burst of so many bytes.
func TakeIsSmallWhileItWaits(t *testing.T, start Start, burst int, quietAfter time.Duration) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		const takers = 100
		clients := n.DialMany(t, takers, func(_ int, a *Client) { a.Ask("Ping", ":PONG") })
		requests := strings.Repeat("Delete:k\n", burst/16)

		before := HeapOfQuiet(quietAfter)
		for i, a := range clients {
			go func() {
				a.Send(requests)
				a.Send(fmt.Sprintf("Take:k%d:3600\n", i))
			}()
		}

		is.Between(t, "bytes of a Take that waits", (HeapOfQuiet(quietAfter)-before)/takers, math.MinInt, 1<<10)

		for i, a := range clients {
			a.Ask(fmt.Sprintf("Put:k%d:v", i+1)) // the next one's
			a.Close()
		}
	})
}

// MemoryOfQuietClients ensures that clients that were busy, with bursts of so many requests, and
// are quiet now, give back their memory. The largest burst is to be read at once, in several
// chains, into large buffers.
func MemoryOfQuietClients(t *testing.T, start Start, quietAfter time.Duration, bursts ...int) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		n.run(t, "Put:k:v\n")
		speak := func(a *Client, times int) {
			go a.Send(strings.Repeat("Get:k\n", times))
			for range times {
				a.Want("k:v")
			}
		}

		clients := n.DialMany(t, storetest.Fewer(20, 2), func(_ int, a *Client) { speak(a, 1) })
		before := HeapOfQuiet(quietAfter)

		for _, burst := range bursts {
			for _, a := range clients {
				speak(a, burst)
			}
			is.Between(t, fmt.Sprint("bytes more of a quiet client after a burst of ", burst),
				(HeapOfQuiet(quietAfter)-before)/len(clients), math.MinInt, 2<<10)
		}
	})
}

// HeapOfQuiet is HeapBytes once all clients are quiet, and have given back what they can.
func HeapOfQuiet(quietAfter time.Duration) int {
	world.Pass(3 * quietAfter)
	return HeapBytes()
}

// HeapBytes returns how many bytes of memory are in use.
func HeapBytes() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // frees what the pools had
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
