// Package world has worlds for anything that serves a store on a net.Listener. A world is drawn
// from a seed: a data directory, a server that is started on it again and again, and clients on a
// network that does what networks may do. What the server promised is judged on the way and at the
// end. (After FoundationDB's simulation: Zhou et al., SIGMOD 2021.) All of it happens in fake time.
//
//	world.go    what the server has to provide, seeds, the story
//	process.go  the server from its start to its end
//	faults.go   what befalls the server, except by its clients
//	network.go  a network in memory, as unkind as a real one
//	draw.go     random choices, and waiting
//	clients.go  clients, and the kinds of them that know nothing of the data:
//	lists.go    clients that know what lists must hold,
//	takes.go    clients that wait for values, and whose keys expire,
//	readers.go  and clients that read slowly, or not at all
//	judge.go    what was promised
//
// To add a fault of the disk, see process.before; of the network, wire; of the process,
// process.operate. A kind of client is a method like (*visitor).ping and its line in kinds.
package world

import (
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Program is the program that worlds test.
type Program struct {
	// Log returns a log that writes to w, and whose callers never wait for w: so many lines may
	// wait to be written. flush is called when nobody logs any more, and returns when all lines are
	// written.
	Log func(w io.Writer, lines int) (log *slog.Logger, flush func())

	// Start serves a store on a listener. It does not block.
	Start func(listener net.Listener, store kvstore.KVStore, with Settings) (Server, error)

	TLS *tls.Config // for the servers that use TLS
}

// Settings of a server are drawn again for each start.
type Settings struct {
	Log                  *slog.Logger
	MaxLine, MaxMessage  int // bytes
	MaxClients           int
	Handshakes           int           // TLS handshakes under way at a time
	FewKeys              int           // a list of fewer needs no leave, and is not broken off
	Snapshots            int           // at a time
	MaxQueues, MaxMemory int64         // bytes; MaxMemory 0: no limit
	Other                int64         // bytes of MaxMemory that are not data
	Pinned               int64         // of Other: values that were removed, and replies keep
	WriteTimeout         time.Duration // 0: none
	TLS                  *tls.Config   // nil: none
}

// Server is a server that was started.
type Server interface {
	CountActive() int
	Failed() <-chan error
	Close()

	// Queued returns how many bytes of replies wait for all clients.
	Queued() (bytes int64)

	// Look has the server check that its files are still there and unchanged, as it does when
	// somebody asks for its health.
	Look()

	// After Close: how many replies slow readers have lost, and what the server still holds though
	// it should hold nothing.
	Lost() (replies int)
	Left() (what []string)
}

// maxLine is the MaxLine of all servers.
const maxLine = 20_000

// Run looks at the worlds of storetest.Seeds (0: until the run is stopped), and reports where a
// promise is broken. The whole story is printed if there is only one.
func Run(t *testing.T, program Program) {
	first, seeds := storetest.Seeds(t, 15, 3)
	const group = 200
	for done := uint64(0); (seeds == 0 || done < seeds) && !t.Failed(); done += group {
		// Worlds of a group run side by side. A run without an end prints its progress after each
		// group.
		t.Run("seeds", func(t *testing.T) {
			for i := range uint64(group) {
				if seed := first + done + i; seeds == 0 || done+i < seeds {
					t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
						t.Parallel()
						run(t, seed, seeds == 1, program)
					})
				}
			}
		})

		if seeds == 0 {
			fmt.Fprintf(os.Stderr, "%d to %d\n", first+done, first+done+group-1)
		}
	}
}

// world is one simulated run.
type world struct {
	t       *testing.T
	program Program
	seed    uint64
	random  *rand.Rand // the world's own choices; clients and wires have sources of their own
	began   time.Time
	dir     *storetest.Dir
	fsync   time.Duration
	quiet   bool // dir is all on disk, and nobody has written for over two seconds

	// What was answered after this time may be lost if the machine fails now, because a killed
	// process has left it to the kernel. Zero: nothing can be lost.
	exposed time.Time

	ids   atomic.Int64
	clock atomic.Int64 // of all clients: it counts what was begun and answered

	mu      sync.Mutex // guards the fields below
	story   []string
	history map[string][]heard   // of each list of which all requests are known
	ends    map[string]time.Time // latest time at which a key may be there
	sent    map[string]bool      // all values that a request has carried
	refused map[string]bool      // the values whose request got an error

	failures int // number of power failures that may have cost answered writes
}

// run looks at one world. If tell is true, it prints the world's story even if nothing fails.
func run(t *testing.T, seed uint64, tell bool, program Program) {
	synctest.Test(t, func(t *testing.T) {
		// Clients that change lists of others all send the values 0 and 1.
		w := &world{
			t: t, program: program, seed: seed, random: rand.New(rand.NewPCG(seed, 1)),
			began: time.Now(), dir: storetest.New(), history: map[string][]heard{},
			ends: map[string]time.Time{}, sent: map[string]bool{"0": true, "1": true},
			refused: map[string]bool{},
		}

		// Fake time passes only while all wait, so a whole hour means that something never comes.
		hangs := time.AfterFunc(time.Hour, func() {
			panic(fmt.Sprintf("seed %d hangs\n%s", seed, strings.Join(w.story, "\n")))
		})
		w.run()
		hangs.Stop()

		if tell && !t.Failed() {
			fmt.Printf("the story of seed %d:\n%s\n", seed, strings.Join(w.story, "\n"))
		}
		if t.Failed() {
			t.Logf("the story of seed %d (again: make simulate SEED=%d SEEDS=1):\n%s", seed, seed,
				strings.Join(w.story, "\n"))
		}
	})
}

// run lets servers live one after the other, and judges what they leave.
func (w *world) run() {
	r := w.random

	// Files are so small that even a short life has many of them, and compactions.
	w.dir.Segment = int64(pick(r, 3, 10, 100) * kilo)
	w.dir.Compact, w.dir.Reserve = int64(pick(r, 5, 20)*kilo), pick(r, 1, 8, 32)*kilo
	w.dir.Plain = Chance(r, 2)
	w.fsync = pick(r, durable.FsyncAlways, durable.FsyncAlways, time.Second, durable.FsyncNever)
	w.tell("-fsync %v, files of %d bytes, only LOCK is locked: %v", w.fsync, w.dir.Segment,
		w.dir.Plain)

	for range 1 + r.IntN(4) {
		// A start that dies leaves its work to later starts, which may die as well.
		for w.live(false); Chance(r, 2) && !w.t.Failed(); {
			w.live(true)
		}

		if w.t.Failed() {
			return
		}

		wait(Between(r, 0, 5*time.Second))
	}
	w.judge()
}

// tell adds a line to the story.
func (w *world) tell(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.story = append(w.story, fmt.Sprintf("%9.3fs %s", time.Since(w.began).Seconds(),
		fmt.Sprintf(format, args...)))
}

// fail reports that a promise was broken.
func (w *world) fail(format string, args ...any) {
	w.tell("BROKEN: "+format, args...)
	w.t.Errorf("seed %d: "+format, append([]any{w.seed}, args...)...)
}

// refuse notes whether a value was refused: if so, no store may hold it.
func (w *world) refuse(value string, was bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused[value] = was
}

// id returns a number that nobody else has.
func (w *world) id() int { return int(w.ids.Add(1)) }

// tick returns a new moment of the clock of all clients.
func (w *world) tick() int64 { return w.clock.Add(1) }
