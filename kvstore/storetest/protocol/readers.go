package protocol

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// SlowReaderDelaysOnlyItself ensures that a client that reads nothing keeps at least the promised
// queue, and hardly more than the bytes that may be on the way to it, loses the rest, is told how
// much, and delays nobody.
func SlowReaderDelaysOnlyItself(t *testing.T, start Start, onTheWay int) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		value := strings.Repeat("v", 625)
		n.run(t, "Put:k:"+value+"\n")

		other, slow := n.Dial(t), n.Dial(t)
		const owed = 10 * kilo // more than the queue holds
		go slow.Send(strings.Repeat("Get:k\n", owed) + "Put:after:1\nPing:end\n")

		is.Within(t, 0, 0, func() {
			for i := range 100 {
				other.Ask(fmt.Sprintf("Ping:%d", i), fmt.Sprintf(":PONG %d", i))
			}
		})

		synctest.Wait()
		other.Ask("Get:after") // not run yet: the slow client waits for itself
		other.Ask("Ping", ":PONG")
		world.Pass(slowAfter - 1)
		other.Ask("Get:after")
		world.Pass(1 + seenSlow - slowAfter)
		other.Ask("Get:after", "after:1") // its writes take effect

		delivered, line := 0, slow.Read()
		for ; line == "k:"+value; line = slow.Read() {
			delivered++
		}
		is.Equal(t, "the line behind the replies", line, fmt.Sprintf(":PONG end dropped %d", owed-delivered))
		is.Between(t, "replies that were kept", delivered, kept, kept+onTheWay/len(value))

		slow.Ask("Ping", ":PONG") // counted once
		other.WantStat("replies_dropped_total", owed-delivered)
		slow.Ask("Get:after", "after:1")
	})
}

// SlowReaderRecovers ensures that a slow reader that begins to read again loses nothing more.
func SlowReaderRecovers(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		n.run(t, strings.Repeat("Put:list:"+strings.Repeat("v", 625)+"\n", 30)) // three messages
		a := n.Dial(t)
		ask := func() { a.Send(strings.Repeat("Get:list\n", 300) + "Ping\n") }
		go ask()
		world.Pass(2 * slowAfter)

		delivered := a.Count("list:")
		if delivered == 0 || delivered%30 != 0 || delivered == 300*30 {
			t.Errorf("%d lines were delivered, want whole replies of 30, and not all", delivered)
		}

		go ask()
		is.Equal(t, "reading at once, lines", a.Count("list:"), 300*30)
	})
}

// SlowReaderOfProject0 ensures that clients that do not read for some seconds get what the queue
// keeps for them, and the others everything, as Project 0's own tests require: six clients on
// one goroutine, four of them slow, Gets of lists of large values.
func SlowReaderOfProject0(t *testing.T, start Start) {
	t.Parallel()
	start.inBubble(t, func(t *testing.T, n *Net) {
		const clients, slow, gets, values = 6, 4, 1900, 3
		value := strings.Repeat("v", 4096)
		n.run(t, strings.Repeat("Put:list:"+value+"\n", values))
		all := n.DialMany(t, clients, func(int, *Client) {})

		// Four clients begin to read only after some seconds.
		var lines [clients]int
		var readers sync.WaitGroup
		for i, c := range all {
			readers.Go(func() {
				if i < slow {
					<-time.After(5 * time.Second)
				}

				// A minute without a line means that no more come.
				c.Conn.SetReadDeadline(time.Now().Add(time.Minute))
				for ; ; lines[i]++ {
					line, err := c.R.ReadString('\n')
					if err != nil {
						return
					}
					if line != "list:"+value+"\n" {
						t.Errorf("client %d got %.40q", i, line)
					}
				}
			})
		}

		// All clients send one Get after the other.
		for range gets {
			for _, c := range all {
				c.Send("Get:list\n")
			}
			synctest.Wait()
		}

		readers.Wait()
		for i, got := range lines {
			switch {
			case i >= slow && got != gets*values:
				t.Errorf("client %d, which reads, got %d lines of %d", i, got, gets*values)
			case i < slow && (got < kept || got >= gets*values || got%values != 0):
				t.Errorf("slow client %d got %d lines of %d, want at least %d, whole replies, "+
					"and not all", i, got, gets*values, kept)
			}
		}

		for _, c := range all {
			c.Close()
		}
	})
}

// SlowReaderIsToldAtTheEnd ensures that a client that lost replies, and does not ask with Ping,
// is told in the last line, after a half-close or a Quit, and once.
func SlowReaderIsToldAtTheEnd(t *testing.T, start Start) {
	for end, want := range map[string]string{
		"": ":ERROR line %[2]d: %[1]d replies were dropped, for nothing was " +
			"read for over a second; after Ack none is\n",
		"Quit\n": ":ERROR line %[3]d: %[1]d replies were dropped, for nothing was " +
			"read for over a second; after Ack none is\n",
		"Ack\nQuit\n": ":OK 0\n:OK 0\n:ERROR line %[4]d: %[1]d replies were dropped, for " +
			"nothing was read for over a second; after Ack none is\n",
		"Ping\n":              ":PONG dropped %[1]d\n",
		"Ping\nGet:k\nQuit\n": ":PONG dropped %[1]d\nk:v\n",
	} {
		start.inBubble(t, func(t *testing.T, n *Net) {
			n.run(t, "Put:big:"+strings.Repeat("v", 1200)+"\n")
			n.run(t, "Put:k:v\n")

			// It loses replies, and reads those that were kept.
			a, other := n.Dial(t), n.Dial(t)
			const gets = 2000
			go a.Send(strings.Repeat("Get:big\n", gets))
			world.Pass(2 * seenSlow)
			dropped := other.Stat("replies_dropped_total")
			got := 0
			for ; got < gets-dropped; got++ {
				a.Read()
			}

			// The last line says how many were dropped.
			go a.SendAll(end)
			if rest, want := a.ReadAll(), fmt.Sprintf(want, dropped, gets, gets+1,
				gets+2); rest != want || dropped == 0 {
				t.Errorf("%q: %d replies of %d came, then %q, want %q", end, got, gets, rest, want)
			}
			a.Close()
		})
	}
}

// SlowReaderIsCountedAtOnce ensures that a dropped reply is counted at once, and not with its
// client's next request.
func SlowReaderIsCountedAtOnce(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		n.run(t, "Put:k:"+strings.Repeat("v", 1200)+"\n")
		n.run(t, strings.Repeat("Put:huge:"+strings.Repeat("v", 1200)+"\n", 4000))

		a, other := n.Dial(t), n.Dial(t)
		const gets = 1000
		go a.Send(strings.Repeat("Get:k\n", gets) + "Get:huge\nPing\n")
		world.Pass(2 * seenSlow) // the Ping waits for room, and with it the chain

		dropped := other.Stat("replies_dropped_total")
		delivered := a.Count("k:")
		is.Equal(t, "replies delivered and dropped", delivered+dropped, gets+1)
		is.Between(t, "replies dropped", dropped, 1, gets)
	})
}

// SlowReaderWithAck ensures that after Ack nothing is dropped, however long a client does not
// read, and that its later requests wait.
func SlowReaderWithAck(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		value := strings.Repeat("v", 1200)
		n.run(t, "Put:k:"+value+"\n")
		a, other := n.Dial(t), n.Dial(t)
		a.Ask("Ack", ":OK 0")

		// It sends many requests and reads nothing.
		const owed = 5000
		go a.Send(strings.Repeat("Get:k\n", owed) + "Put:after:1\n")
		world.Pass(time.Minute)
		other.Ask("Get:after")
		other.Ask("Ping", ":PONG")

		// Then it reads, and everything is there.
		for i := range owed {
			a.Want("k:"+value, ":OK 1")
			if t.Failed() {
				t.Fatalf("at reply %d", i)
			}
		}
		a.Want(":OK 1")
		a.Ask("Ping", ":PONG")
	})
}

// SteadyReaderOnRealSocket ensures that a steady reader on a real socket, where receive windows
// open late and in lumps, loses nothing while it pipelines, in whatever pieces it reads.
func SteadyReaderOnRealSocket(t *testing.T, addr string) {
	t.Parallel()
	const size, gets = kilo, 12 * kilo
	fill := DialTCP(t, addr)
	reply := "k:" + strings.Repeat("v", size-len("k:\n"))
	fill.Ask("Put:"+reply+"\nPing", ":PONG")
	fill.HangUp()

	// Each reader takes about 300 kB a second, in pieces of a size of its own.
	var wg sync.WaitGroup
	for _, p := range []struct {
		piece int
		every time.Duration
	}{
		{30 * kilo, 100 * time.Millisecond}, {60 * kilo, 200 * time.Millisecond},
		{150 * kilo, 500 * time.Millisecond}, {180 * kilo, 600 * time.Millisecond},
		{240 * kilo, 800 * time.Millisecond}, {270 * kilo, 900 * time.Millisecond},
	} {
		wg.Go(func() {
			a := DialTCP(t, addr)
			go a.SendSome(strings.Repeat("Get:k\n", gets) + "Ping:end\n")
			ticks := time.NewTicker(p.every)
			defer ticks.Stop()

			piece := make([]byte, p.piece) // at once, so that the kernel enlarges its buffer
			for passed := time.Duration(0); passed < 21*time.Second/10; passed += p.every {
				<-ticks.C
				io.ReadFull(a.Conn, piece)
			}

			// Now it reads the rest, as fast as it can.
			last := ""
			for !strings.HasPrefix(last, ":") {
				last = a.Read()
			}
			is.Equal(t, fmt.Sprint(p.piece, " bytes every ", p.every), last, ":PONG end")
			a.HangUp()
		})
	}
	wg.Wait()
}

// SteadyReaderOfAPausedServer ensures that a pause of the whole server is not taken for a pause
// of its clients.
func SteadyReaderOfAPausedServer(t *testing.T, program Program) {
	t.Parallel()
	cmd, addr, log := program.Start(t, "-addr", "127.0.0.1:0")
	go io.Copy(io.Discard, log)
	a := DialTCP(t, addr)
	const gets = 3 * kilo
	reply := "k:" + strings.Repeat("v", 16*kilo)
	a.Ask("Put:"+reply+"\nPing", ":PONG")

	// The server stands still in the middle of its replies.
	go a.SendSome(strings.Repeat("Get:k\n", gets) + "Ping:end\n")
	var pause sync.WaitGroup
	defer pause.Wait()
	for i := range gets {
		if i == gets/2 {
			SignalTo(t, cmd, "STOP")
			pause.Go(func() {
				<-time.After(slowAfter * 5 / 4)
				SignalTo(t, cmd, "CONT")
			})
		}
		is.Equal(t, fmt.Sprint("reply ", i), a.Read(), reply)
	}
	a.Want(":PONG end")
	a.HangUp()
}
