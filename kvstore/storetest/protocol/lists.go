package protocol

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// Expire ensures that a key is there until its time is over, and not longer, for every request.
func Expire(t *testing.T, start Start) {
	for _, ask := range []struct{ request, before, after string }{
		{"Get:k\nPing", "k:v\n:PONG", ":PONG"},
		{"Count:k", ":OK 1", ":OK 0"},
		{"Expire:k", ": 1\n:OK 1", ":OK 0"},
		{"Ack\nExpire:k:5", ":OK 0\n:OK 1", ":OK 0\n:OK 0"},
		{"Ack\nAdd:k:w", ":OK 0\n:OK 0", ":OK 0\n:OK 1"},
		{"Ack\nLease:k:5:w", ":OK 0\n:OK 0", ":OK 0\n:OK 1"},
		{"Ack\nSwap:k:v:w", ":OK 0\n:OK 1", ":OK 0\n:OK 0"},
		{"Ack\nRemove:k:v", ":OK 0\n:OK 1", ":OK 0\n:OK 0"},
		{"Put:k:w\nGet:k\nExpire:k", "k:v\nk:w\n: 1\n:OK 1", "k:w\n:OK 1"},
		{"Keys", ": k\n:OK 1", ":OK 0"},
		{"Dump", ": Put:k:v\n: Expire:k:1\n:OK 2", ":OK 0"},
	} {
		// Just before the key's time is over, and just after.
		start.inBubble(t, func(t *testing.T, n *Net) {
			for _, when := range []struct {
				after time.Duration
				want  string
			}{{5*time.Second - time.Microsecond, ask.before}, {5*time.Second + time.Millisecond, ask.after}} {
				a := n.Dial(t)
				world.Pass(300 * time.Microsecond)

				a.Ask("Set:k:v\nExpire:k:5\nPing", ":PONG")
				world.Pass(when.after)
				a.Ask(ask.request, strings.Split(when.want, "\n")...)
				a.HangUp()
			}
		})
	}
}

// ExpireWhileTheClockJumps ensures that a deadline is a time of the wall clock, and follows its
// jumps.
func ExpireWhileTheClockJumps(t *testing.T, start func(now func() time.Time) Start) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64
		n := start(func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) })(t)
		by := func(d time.Duration) { ahead.Add(int64(d)) }
		a := n.Dial(t)
		a.Ask("Lease:k:3600:v\nLease:l:9000:v\nExpire:k", ": 3600", ":OK 1")
		world.Pass(600 * time.Millisecond)
		a.Ask("Expire:k", ": 3600", ":OK 1") // rounded up

		by(-time.Hour)
		a.Ask("Expire:k", ": 7200", ":OK 1")
		world.Pass(time.Hour + time.Minute)
		a.Ask("Expire:k", ": 3540", ":OK 1")

		by(time.Hour)
		a.Ask("Get:k\nExpire:k", ":OK 0")
		a.Ask("Expire:l", ": 5340", ":OK 1")

		by(-2 * time.Hour)
		a.Ask("Get:k\nExpire:l", ": 12540", ":OK 1") // a key that has gone does not come back

		by(4 * time.Hour)
		world.Pass(2 * expireTime)
		a.Ask("Keys", ":OK 0")
		a.HangUp()
	})
}

// TakeWaitsInLine ensures that the first of the Takes that wait for a key gets the next value,
// whatever request brings it, and that nobody else gets that value.
func TakeWaitsInLine(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		const takers = 6
		clients := n.DialMany(t, takers, func(_ int, c *Client) {
			c.Ask("Ack", ":OK 0")
			c.Post("Take:k:60\n")
		})
		giver := n.Dial(t)
		giver.WantStat("waiting_takes", takers)
		giver.Ask("Ack", ":OK 0")

		// The giver cannot get its own value back, because a client waits for it.
		for i, give := range []struct{ request, reply string }{{"Put:k:a", ":OK 1"},
			{"Set:k:b:c", ":OK 0"}, {"Add:k:", ":OK 1"}, {"Update:k:x:d", ":OK 0"},
			{"Lease:k:5:e", ":OK 1"}, {"Put:k:f", ":OK 1"}} {
			giver.Send(give.request + "\nCount:k\nTake:k\nExpire:k\n")
			giver.Want(give.reply, ":OK 0", ":OK 0", ":OK 0")
			clients[i].Want("k:"+[]string{"a", "b:c", "", "d", "e", "f"}[i], ":OK 1")
		}

		// Nobody waits any more.
		giver.Ask("Put:k:g\nPut:k:h\nTake:k:60\nGet:k", ":OK 1", ":OK 1", "k:g", ":OK 1", "k:h", ":OK 1")
	})
}

// TakeWaitsItsTime ensures that a Take waits exactly as long as it says, whether or not a line has
// begun behind it, and that it delays no other client, no other key, and no earlier request of its
// own client. A client whose Take waits is not one that accepts nothing.
func TakeWaitsItsTime(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a, b := n.Dial(t), n.Dial(t)
		a.Ask("Ack", ":OK 0")

		for i, seconds := range []int{1, 30, 3600} {
			// The line is begun before, so that a tick is under way when the Take comes.
			a.Send("Pu")
			world.Pass(300 * time.Millisecond)
			start, next := time.Now(), "Delete:j"
			a.Send(fmt.Sprintf("t:j:1\nGet:j\nTake:k:%d\n%s", seconds, next[:i]))
			a.Want(":OK 1", "j:1", ":OK 1")

			synctest.Wait()
			b.Ask("Get:j\nPut:l:v\nTake:l:5\nTake:k\nPing", "j:1", "l:v", ":PONG")
			is.Equal(t, "the wait of others", time.Since(start), 0)

			a.Want(":OK 0")
			is.Equal(t, "the wait of a Take", time.Since(start), time.Duration(seconds)*time.Second)

			a.Ask(next[i:], ":OK 1")
			b.Ask("Put:k:v\nTake:k\nPing", "k:v", ":PONG") // no Take waits any more
		}

		b.WantStat("waiting_takes", 0)
	})
}

// TakeOfClientsThatGo ensures that the Take of a client that has gone leaves the line, and that
// the Take of a client that has only half-closed stays.
func TakeOfClientsThatGo(t *testing.T, start Start) {
	for what, end := range map[string]func(c *Client){
		"breaks": func(c *Client) { c.BreakOff() },
		"breaks behind a half-close": func(c *Client) {
			c.Conn.CloseWrite()
			world.Pass(time.Second)
			c.BreakOff()
			world.Pass(lookTime)
		},
		"breaks with a request behind it": func(c *Client) {
			c.Send("Put:late:v\nPing\n")
			world.Pass(time.Second)
			c.BreakOff()
			world.Pass(lookTime)
		},
		"waits too long": func(c *Client) { world.Pass(time.Minute) },
	} {
		// The value goes past a, which has gone, to b.
		start.inBubble(t, func(t *testing.T, n *Net) {
			a, b, c := n.Dial(t), n.Dial(t), n.Dial(t)
			a.Ask("Ping", ":PONG") // it is long ago that anything was written to it
			world.Pass(time.Minute)
			a.Post("Get:none\nTake:k:60\n")
			b.Send("Take:k:600\n")
			b.Conn.CloseWrite()
			synctest.Wait()

			end(a)
			synctest.Wait()
			is.Equal(t, "a client "+what+": waiting Takes", c.Stat("waiting_takes"), 1)

			c.Ask("Put:k:v\nCount:k", ":OK 0")
			b.Want("k:v")
			b.WantClosed()
			a.Close()
		})
	}
}

// TakeWaitsWhileItsClientSends ensures that requests that a client sends while its Take waits are
// run after it, in order and whatever their size, and that a line that is begun meanwhile may be
// ended later. The server takes lines of 300 kB.
func TakeWaitsWhileItsClientSends(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a, b := n.Dial(t), n.Dial(t)
		a.Post(strings.Repeat("Put:burst:v\n", 5000) + "Take:k:600\n")

		c := n.Dial(t)
		c.Send("Take:m:600\nPut:m:be")

		long := strings.Repeat("x", 200*kilo)
		go a.Send("Put:l:a\nPut:l:" + long + "\nPut:l:b\nGet:l\nPut:l:be")
		world.Pass(lineTime + 5*time.Second)
		b.Ask("Count:burst\nCount:l", ":OK 5000", ":OK 0")

		b.Send("Put:k:v\n")
		a.Want("k:v", "l:a", "l:"+long, "l:b")

		// A line that was begun during the wait has its time from the Take's end.
		world.Pass(lineTime - 5*time.Second)
		a.Ask("gun\nTake:l\nPing", "l:a", ":PONG")

		b.Ask("Count:l\nPut:m:v", ":OK 3")
		c.Want("m:v")
		c.Ask("hind\nTake:m\nPing", "m:behind", ":PONG")
	})
}

// TakeBeforeASlowLine ensures that a line that does not end is refused in its time, also after a
// Take that could have waited longer.
func TakeBeforeASlowLine(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		a, b := n.Dial(t), n.Dial(t)
		a.Send("Take:k:3600\n")
		world.Pass(5 * time.Second)
		b.Send("Put:k:v\n")
		a.Want("k:v")

		a.Send("Put:x")
		is.Within(t, lineTime, lineTime+2*lookTime, func() {
			a.Want(":ERROR line 2: the line was begun but not ended within 30s")
		})
		a.WantClosed()
	})
}

// TakeOfALateReader ensures that a taken value is not lost because its client reads late.
func TakeOfALateReader(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		value := strings.Repeat("v", 1000)
		n.run(t, "Put:k:"+value+"\n")

		slow, giver := n.Dial(t), n.Dial(t)
		go slow.Send(strings.Repeat("Get:k\n", 5000))
		world.Pass(time.Minute)

		go slow.Send("Take:job:60\nTake:job\nPing\n")
		world.Pass(time.Second)
		giver.Send("Put:job:1\nPut:job:2\n")
		world.Pass(time.Minute)

		// Replies of Gets may be lost, but not those of Takes.
		jobs := ""
		for line := slow.Read(); !strings.HasPrefix(line, ":PONG dropped "); line = slow.Read() {
			if strings.HasPrefix(line, "job:") {
				jobs += line
			} else if line != "k:"+value {
				t.Fatalf("got %.60q", line)
			}
		}
		is.Equal(t, "what the slow reader was given", jobs, "job:1job:2")
	})
}

// TakeOnRealSockets ensures that the Take of a client on a real connection leaves the line when the
// connection breaks, and on a unix socket when it is closed, even after the client's own
// half-close.
func TakeOnRealSockets(t *testing.T, serve func(listeners ...net.Listener)) {
	t.Parallel()
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "sock"))
	is.OK(t, err)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	is.OK(t, err)
	serve(tcp, unix)

	a := DialTCP(t, tcp.Addr().String())
	var takers []net.Conn
	for _, half := range []bool{false, true} {
		for _, addr := range []net.Addr{tcp.Addr(), unix.Addr()} {
			conn, err := net.Dial(addr.Network(), addr.String())
			is.OK(t, err)
			io.WriteString(conn, "Take:k:600\n") // longer than Await waits
			if half {
				conn.(world.HalfConn).CloseWrite()
			}
			takers = append(takers, conn)
		}
	}
	Await(t, "the Takes", func() bool { return a.Stat("waiting_takes") == len(takers) })

	for _, conn := range takers {
		if c, isTCP := conn.(*net.TCPConn); isTCP {
			c.SetLinger(0) // so that Close resets it
		}
		conn.Close()
	}
	Await(t, "the ends of the Takes", func() bool { return a.Stat("waiting_takes") == 0 })

	a.Ask("Put:k:v\nTake:k", "k:v")
	a.HangUp()
}

// DumpIsOneMoment ensures that a Dump is one exact moment, even if it is read slowly while
// others write: no coin is seen in two purses, or in none, while it moves.
func DumpIsOneMoment(t *testing.T, start Start) {
	start.inBubble(t, func(t *testing.T, n *Net) {
		const purses, coins = 3000, 1000
		var begin strings.Builder
		for i := range purses { // short lists and long ones
			begin.WriteString(strings.Repeat(fmt.Sprintf("Put:purse%d:begin\n", i), 1+i%20))
		}
		for i := range coins {
			fmt.Fprintf(&begin, "Put:purse%d:coin%[1]d\n", i)
		}
		n.run(t, begin.String())

		// The Dump has begun once its first line is there.
		a, b := n.Dial(t), n.Dial(t)
		a.Ask("Ack", ":OK 0")
		b.Ask("Ack", ":OK 0")
		a.Send("Put:begun:1\nDump\n")
		a.Want(":OK 1")
		a.Want(": Put:begun:1")
		synctest.Wait()

		// Coins move while the Dump waits for its reader.
		for i := range coins {
			to := fmt.Sprint("purse", (i*7)%purses)
			b.Send(fmt.Sprintf("Update:purse%d:coin%d:gone\nPut:%s:coin%d\nPut:new%d:v\n"+
				"Delete:purse%d\n", i, i, to, i, i, purses-1-i))
			for range 4 {
				b.Read()
			}
		}

		// The reader goes on. Keys come in order.
		lists, last := map[string][]string{}, ""
		line := a.Read()
		for ; !strings.HasPrefix(line, ":OK "); line = a.Read() {
			f := strings.Split(line, ":")
			if f[2] < last {
				t.Fatalf("%q comes after %q", f[2], last)
			}
			last = f[2]
			lists[f[2]] = append(lists[f[2]], f[3])
		}

		// Each coin is where it was when the Dump began.
		for i := range purses {
			want := slices.Repeat([]string{"begin"}, 1+i%20)
			if i < coins {
				want = append(want, fmt.Sprint("coin", i))
			}
			if got := lists[fmt.Sprint("purse", i)]; !slices.Equal(got, want) {
				t.Fatalf("purse%d held %q, want %q", i, got, want)
			}
		}
		is.Equal(t, "keys", len(lists), purses)
	})
}
