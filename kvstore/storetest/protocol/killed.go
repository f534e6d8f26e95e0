package protocol

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// KilledServer ensures that one order of all requests explains the answers, and the data after
// kill -9 and after a clean stop, again and again in one directory. `make soak` does this for
// longer than five starts.
func KilledServer(t *testing.T, program Program) {
	t.Parallel()
	starts, length := 5, time.Hour
	if text := os.Getenv("KVSERVER_SOAK"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		is.OK(t, err)
		starts = math.MaxInt
	}

	// Each start checks what the last kill or stop has left.
	k := killed{t: t, program: program, dir: t.TempDir(), asked: map[string][]storetest.Operation{}}
	for began := time.Now(); starts > 0 && time.Since(began) < length && !t.Failed(); starts-- {
		k.start()
		k.check()
		if k.round++; k.round%2 == 0 { // a history is of two rounds, so that it stays short
			k.forget()
		}
		k.work()
	}

	// After the last clean stop nothing is torn.
	k.start()
	k.check()
	k.stop()
	if out, err := program("check", k.dir).CombinedOutput(); err != nil ||
		bytes.Contains(out, []byte("torn")) {
		t.Errorf("check after a clean stop: %v, %s", err, out)
	}
	t.Logf("%d starts, %d requests", k.round, k.requests)
}

// killed is a server that is killed and stopped again and again, and what its clients know.
type killed struct {
	t       *testing.T
	program Program
	dir     string
	round   int
	cmd     *exec.Cmd
	addr    string

	clock atomic.Int64
	mu    sync.Mutex
	asked map[string][]storetest.Operation // by list
	burst int                              // number of values in the list that is written in bursts

	requests int // in all
}

// start starts the server.
func (k *killed) start() {
	cmd, addr, log := k.program.Start(k.t, "-addr", "127.0.0.1:0", "-data", k.dir)
	go io.Copy(io.Discard, log)
	k.cmd, k.addr = cmd, addr
}

// stop stops the server cleanly.
func (k *killed) stop() {
	k.cmd.Process.Signal(os.Interrupt)
	if err := k.cmd.Wait(); err != nil {
		k.t.Errorf("a clean stop: %v", err)
	}
}

// check checks the data after a start.
func (k *killed) check() {
	c := DialTCP(k.t, k.addr)
	c.Ask("Ack", ":OK 0")

	for key, history := range k.asked {
		final := storetest.Operation{Request: storetest.Request{Verb: "Get"}}
		is.OK(k.t, world.Ask(c.Conn, c.R, key, &final, k.tick))
		if err := storetest.CheckLinearizable(history, final.Got); err != nil {
			k.t.Errorf("%s, of which %d things were asked: %v", key, len(history), err)
		}
	}

	c.Send("Get:burst\n")
	for i, line := range c.ReadList() {
		if line != fmt.Sprintf("burst:%d", i) {
			k.t.Fatalf("round %d: value %d is %q", k.round, i, line)
		}
		k.burst = max(k.burst, i+1) // a value whose Put was not answered may be there
	}

	c.Ask("Count:burst", fmt.Sprint(":OK ", k.burst))
	c.HangUp()
}

// forget begins new lists.
func (k *killed) forget() {
	for _, operations := range k.asked {
		k.requests += len(operations)
	}
	k.requests += k.burst
	clear(k.asked)

	c := DialTCP(k.t, k.addr)
	c.Ask("Delete:burst\nCount:burst", ":OK 0")
	c.HangUp()
	k.burst = 0
}

func (k *killed) tick() int64 { return k.clock.Add(1) }

// work has clients send requests until the server is killed, or until they are done and it is
// stopped.
func (k *killed) work() {
	// All clients are connected before one of them kills the server.
	var clients []*Client
	for range 9 {
		clients = append(clients, DialTCP(k.t, k.addr))
	}
	for _, c := range clients[:8] {
		c.Ask("Ack", ":OK 0")
	}

	var all sync.WaitGroup
	for id, c := range clients[:8] {
		all.Go(func() { k.mix(c, id) })
	}

	ends := make(chan struct{})
	go func() {
		k.sendBursts(clients[8])
		close(ends)
	}()

	all.Wait()
	if k.round%3 == 0 {
		k.stop()
	} else {
		k.cmd.Process.Kill()
		k.cmd.Wait()
	}
	<-ends
}

// mix changes and reads lists that other clients change as well. In two of three rounds one client
// kills the server in the middle. Some hang up in the middle of a request, which must not be run.
func (k *killed) mix(c *Client, id int) {
	defer c.Close()
	random := rand.New(rand.NewPCG(uint64(k.round), uint64(id)))
	for i := range 60 {
		key := fmt.Sprintf("mixed%d-%d", k.round/2, random.IntN(3))
		o := storetest.Operation{Request: world.DrawRequest(random, fmt.Sprintf("%d-%d-%d", k.round, id, i))}
		err := world.Ask(c.Conn, c.R, key, &o, k.tick)

		k.mu.Lock()
		k.asked[key] = append(k.asked[key], o)
		k.mu.Unlock()
		if err != nil {
			return
		}

		if id == 0 && i == 20+k.round%30 && k.round%3 > 0 {
			k.cmd.Process.Kill()
		}
		if world.Chance(random, 200) {
			c.SendSome("Delete:other\nSet:" + key)
			return
		}
	}
}

// sendBursts puts 0, 1, 2 and so on under one key, many at once, and counts the answers.
func (k *killed) sendBursts(c *Client) {
	defer c.Close()
	go func(n int) {
		c.SendSome("Ack\n")
		for range 200 {
			var burst strings.Builder
			for range 100 {
				fmt.Fprintf(&burst, "Put:burst:%d\n", n)
				n++
			}
			if _, err := io.WriteString(c.Conn, burst.String()); err != nil {
				return
			}
		}
	}(k.burst)

	want := ":OK 0\n"
	for {
		line, err := c.R.ReadString('\n')
		if err != nil {
			return
		}
		if line != want {
			k.t.Errorf("a burst is answered with %q", line)
		}
		if want == ":OK 1\n" {
			k.burst++
		}
		want = ":OK 1\n"
	}
}
