package protocol

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// InputAtEverySplitPoint ensures that it does not matter where the network cuts a client's
// bytes.
func InputAtEverySplitPoint(t *testing.T, start Start) {
	const script = "Put:k:a:b\r\nAck\n\nGet:k\r\x00\n\x16\nUpdate:k:a:b\n" +
		"Update:k:x:c\nPing:t\nDelete:k\nGet:k\nPut:k:torn"
	const want = ":OK 0\nk:a:b\n:OK 1\n:ERROR line 5: unknown request \"\\x16\"; Help lists the " +
		"requests\n" +
		":OK 0\n:OK 0\n:PONG t\n:OK 3\n:OK 0\n:ERROR line 11: the last line has no newline at " +
		"its end, so it was not run\n"

	// The server reads each piece alone.
	play := func(t *testing.T, pieces ...string) {
		start.inBubble(t, func(t *testing.T, n *Net) {
			a := n.Dial(t)
			go func() {
				for _, p := range pieces {
					a.Send(p)
					synctest.Wait() // until the server has read it and waits for more
				}
				a.Conn.CloseWrite()
			}()
			is.Equal(t, fmt.Sprintf("in pieces %q", pieces), a.ReadAll(), want)
		})
	}

	// In two pieces, and byte by byte.
	for i := range script {
		play(t, script[:i], script[i:])
	}
	play(t, strings.Split(script, "")...)
}

// InputLimitAtEverySplitPoint ensures that a line just at the limit is accepted, and one byte
// more is not, wherever the network cuts its end.
func InputLimitAtEverySplitPoint(t *testing.T, start Start) {
	for _, end := range []string{"\n", "\r\n", "\r\x00\n"} {
		for over := range 2 {
			line := "Put:k:" + strings.Repeat("v", MaxLine-6+over) + end
			for cut := len(line) - 4; cut < len(line); cut++ {
				start.inBubble(t, func(t *testing.T, n *Net) {
					a := n.Dial(t)
					a.Post(line[:cut])
					a.Send(line[cut:])
					if over > 0 {
						a.Want(":ERROR line 1: longer than 20000 bytes, skipped")
						a.Ask("Count:k", ":OK 0")
					} else {
						a.Ask("Get:k", "k:"+strings.Repeat("v", MaxLine-6))
					}
				})
			}
		}
	}
}

// SlowLine ensures that a line that was begun must end in time, however slowly it comes, and
// that a client may be silent between lines for any time.
func SlowLine(t *testing.T, start Start) {
	for _, trickle := range []string{"", "x"} { // silence, and a byte a second
		start.inBubble(t, func(t *testing.T, n *Net) {
			a := n.Dial(t)
			a.Ask("Ping", ":PONG")
			<-time.After(time.Hour)
			a.Ask("Ping", ":PONG")

			for range 3 { // lines that take long, but end
				a.Send("Pi")
				world.Pass(lineTime - time.Second)
				a.Send("ng\n")
				a.Want(":PONG")
			}

			// This line does not end.
			a.Send("Put:k:")
			var sender sync.WaitGroup
			sender.Go(func() {
				for range 100 {
					<-time.After(time.Second)
					a.SendSome(trickle)
				}
			})

			is.Within(t, lineTime, lineTime+2*lookTime, func() {
				a.Want(":ERROR line 6: the line was begun but not ended within 30s")
			})

			a.WantClosed()
			a.Close()
			sender.Wait()
		})
	}
}

// SlowLineAfterSkippedOne ensures that a line's time does not begin with a skipped line before
// it.
func SlowLineAfterSkippedOne(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)
		a.SendSome("Put:k:" + strings.Repeat("x", 2*MaxLine))
		world.Pass(lineTime - 5*time.Second)

		a.SendSome("\nPing:")
		world.Pass(lineTime - 5*time.Second)
		a.Ask("x", ":ERROR line 1: longer than 20000 bytes, skipped", ":PONG x")
	})
}

// SlowLineIsAnsweredOnce ensures that a line that is too long and does not end is answered once.
func SlowLineIsAnsweredOnce(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)
		go a.SendSome("Ack\n" + strings.Repeat("x", 3*MaxLine))
		a.Want(":OK 0", ":ERROR line 2: longer than 20000 bytes, skipped")
		a.WantRest("")
		a.Close()
	})
}

// SlowLineEndsInTime ensures that the time of a line is what its error says, to the tick, and that
// its client has a moment to read the error.
func SlowLineEndsInTime(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)
		a.Send("Put:k:")
		is.Within(t, lineTime, lineTime, func() {
			a.Want(":ERROR line 1: the line was begun but not ended within 30s")
		})
		a.WantClosed()
		world.Pass(drainTime / 2)
		a.Send("v") // its client may hear of the end late
		a.Close()
	})
}

// SlowLineBehindReplies ensures that a line's time does not run while the replies before it wait
// for their client to read.
func SlowLineBehindReplies(t *testing.T, start Start) {
	for _, trickle := range []string{"", "x"} {
		start.inBubble(t, func(t *testing.T, n *Net) {
			value := strings.Repeat("v", 1200)
			n.run(t, strings.Repeat("Put:big:"+value+"\n", 4000)) // more than the queue holds

			// The line begins behind a reply that its client does not read.
			a := n.Dial(t)
			go a.Send("Get:big\nPut:late:")
			for range 2 * lineTime / lookTime {
				world.Pass(lookTime)
				a.Send(trickle)
			}

			// Much later the client reads, and the line ends.
			for range 4000 {
				a.Want("big:" + value)
			}
			a.Send("\n")
			a.Ask("Get:late", "late:"+strings.Repeat(trickle, int(2*lineTime/lookTime)))
		})
	}
}

// EndByQuit ensures that after Quit the server ends its side, and waits for the client to end its
// own, but not for long.
func EndByQuit(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a := n.Dial(t)
		a.Send("Ping\nQuit\nPut:k:v\n")
		a.Want(":PONG")
		is.Within(t, 0, 0, a.WantClosed)

		a.Send("Put:k:v\nGet:k\n") // read, but not run
		world.Pass(drainTime)
		if _, err := a.Conn.Write([]byte("x")); err == nil {
			t.Errorf("the connection is open %v after Quit", drainTime)
		}

		a.Close()
		b := n.Dial(t)
		b.WantStat("clients", 1)
		b.WantStat("keys", 0)
		b.Ask("Get:k\nPing", ":PONG")
	})
}

// EndAnswersNothingMore ensures that bytes after a goodbye are not even looked at. The server takes
// lines of 20 bytes.
func EndAnswersNothingMore(t *testing.T, start Start) {
	const tooLongFor20 = ":ERROR line 1: longer than 20 bytes, skipped\n"
	for send, want := range map[string]string{
		"Ack\nQuit\n" + strings.Repeat("a", 40):                     ":OK 0\n:OK 0\n",
		"GET / HTTP/1.1\r\n" + strings.Repeat("a", 40):              badRequest,
		"GET /aaaaaaaa HTTP/1.1\r\nPut:k:v\nPing\n":                 tooLongFor20,
		"GET / HTTP/1.1\r\n" + strings.Repeat("a", 40) + "\nPing\n": badRequest,
	} {
		start.inBubble(t, func(t *testing.T, n *Net) {
			a := n.Dial(t)
			go a.SendAll(send)
			is.Equal(t, fmt.Sprintf("sent %q", send), a.ReadAll(), want)
		})
	}
}

// EndByHalfClose ensures that requests that were read are run and answered when the client
// half-closes a real connection.
func EndByHalfClose(t *testing.T, addr string) {
	a := DialTCP(t, addr)
	var send, want strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&send, "Put:h:%d\n", i)
		fmt.Fprintf(&want, "h:%d\n", i)
	}

	go a.SendAll(send.String() + "Get:h\n")
	a.WantRest(want.String())
}
