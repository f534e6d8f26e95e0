package command

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
	"kvserver/kvstore/storetest/world"
)

// Talker is kvserver -c and -ping in the process of a test, where time can be that of a bubble.
type Talker struct {
	// Talk has a conversation. It returns whether all is good, and through which line of its input
	// all requests were answered; the error is nil if what the server has said is all that there is
	// to say.
	Talk func(Talk) (good bool, through int, err error)

	// Dial connects to addr. With an error it returns the connection that it has closed.
	Dial func(addr string) (net.Conn, error)

	// What a conversation may end with.
	Gone, NoPlace, Output, Quiet, Silent, Stopped, Stranger, Unanswered, Unasked, UTF16 error
}

// Talk is what a conversation is given: a connection, the outputs, and the command line.
type Talk struct {
	Conn     net.Conn
	In       io.Reader // lines to send, if there are no Requests
	Out      io.WriteCloser
	Errs     io.Writer
	IsTyped  bool // somebody types In
	Requests []string
	Ping     bool
	Stop     bool
	Timeout  time.Duration
}

// ClientHearsTheServer ensures that a line that the server sends unasked is shown, and is an error,
// whether an answer is owed or not.
func ClientHearsTheServer(t *testing.T, talker Talker) {
	for _, c := range []struct {
		in, answers string
		want        error // nil: what the server says is all
	}{
		{"", ":OK 0\n:ERROR line 0: it stops\n", nil},
		{"", ":OK 0\n:ERROR line 1: it stops\n", nil},
		{"Put:a:b\n", ":OK 0\n:OK 1\n:ERROR line 2: it stops\n", nil},
		{"Put:a:b\n", ":OK 0\n:ERROR line 0: it stops\n", talker.Unanswered},
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
			go func() {
				io.WriteString(theirs, c.answers[:len(":OK 0\n")])
				<-time.After(1) // by then all requests are sent
				io.WriteString(theirs, c.answers[len(":OK 0\n"):])
				io.Copy(io.Discard, theirs)
				theirs.Close()
			}()

			var errs bytes.Buffer
			if good, _, err := talker.Talk(Talk{Conn: ours, In: strings.NewReader(c.in),
				Out: Closing(io.Discard), Errs: &errs}); good || !errors.Is(err, c.want) ||
				errs.String() != "the server says: it stops\n" {
				t.Errorf("after %q: %v, %v, and it says %q", c.answers, good, err, &errs)
			}

			ours.Close()
			world.Pass(2)
		})
	}
}

// ClientLosesItsServer ensures that a missing answer is an error, wherever the server was lost;
// that an answer to no request is one; and that a program other than kvserver is recognized. With
// -stop, where each answer lets one request go, the same holds.
func ClientLosesItsServer(t *testing.T, talker Talker) {
	for _, c := range []struct {
		in      string // it ends, unless want is Gone
		answers string
		want    error
		text    string
		stops   bool
	}{
		{"Put:a:b\nPut:a:c\n", ":OK 0\n:OK 1\n", talker.Unanswered, "", false},
		{"Get:a\n", ":OK 0\na:b\na:c", talker.Unanswered, "", false},
		{"", ":OK 0\n", talker.Gone, "", false},
		{"Quit:a\n", ":OK 0\n:ERROR line 2: Quit needs nothing behind it\n", talker.Gone, "", false},
		{"Get:a\n", "\x15\x03\x01\x00\x02\x02\x46", talker.Silent,
			"", false}, // a TLS server's protocol_version
		{"Get:a\n", "\x15\x03\x01\x00\x02\x02\n", talker.Silent, "", false}, // its unexpected_message
		{strings.Repeat("Put:a:b\n", 100_000), ":OK 0\n" + strings.Repeat(":OK 1\n", 10),
			talker.Unanswered, "", false},
		{"Get:a\n", "", talker.Silent, "", false},
		{"Get:a\n", "", syscall.ECONNRESET, "", false}, // because the Ack was not read
		{"Get:a\n", ":ERROR line 0: server is full (3 clients)\n", talker.NoPlace,
			"server is full (3 clients)", false},
		{"Get:a\n", "HTTP/1.1 400 Bad Request\r\n", talker.Stranger,
			`this is no kvserver: it says "HTTP/1.1 400 Bad Request\r\n"`, false},
		{"Get:a\n", strings.Repeat("a", 1<<20), talker.Stranger, "this is no kvserver", false},
		{"Put:a:b\n", strings.Repeat(":OK 0\n", 5), talker.Unasked, "", false},
		{"Put:a:b\n", strings.Repeat(":OK 0\n", 5), talker.Unasked, "", true},
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
			go answerAndGo(theirs, c.answers, c.want == talker.Silent)
			in, end := io.Pipe()
			go func() {
				if io.WriteString(end, c.in); c.want != talker.Gone {
					end.Close()
				}
			}()

			var out bytes.Buffer
			good, _, err := talker.Talk(Talk{Conn: ours, In: in, Out: Closing(&out),
				Errs: io.Discard, Stop: c.stops})
			is.Equal(t, "whole lines of data are shown", out.String() == "a:b\n",
				strings.Contains(c.answers, "\na:b\n"))
			if good || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("after %q: %v, %v, want %v %s", c.answers, good, err, c.want, c.text)
			}

			ours.Close()
			end.Close()
			in.Close()
			world.Pass(2)
		})
	}
}

// answerAndGo is a server that sends these answers and ends the connection: in order if it has read
// the Ack, otherwise it resets it.
func answerAndGo(conn net.Conn, answers string, reads bool) {
	for _, some := range strings.SplitAfterN(answers, "\n", 2) { // welcome, rest
		<-time.After(1) // by then all is sent: fake time passes only while nobody works
		io.WriteString(conn, some)
	}

	synctest.Wait()
	if reads {
		conn.Read(make([]byte, 100))
	}
	conn.Close()
}

// ClientLeavesAStranger ensures that -c closes its connection to a program other than kvserver.
func ClientLeavesAStranger(t *testing.T, talker Talker) {
	stranger, err := net.Listen("tcp", "127.0.0.1:0")
	is.OK(t, err)
	defer stranger.Close()
	go func() {
		if conn, err := stranger.Accept(); err == nil {
			io.WriteString(conn, "220 ready\r\n")
			io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()

	conn, err := talker.Dial(stranger.Addr().String())
	is.Equal(t, "it is a stranger", errors.Is(err, talker.Stranger), true)
	_, err = conn.Write(nil)
	is.Equal(t, "the connection is closed", errors.Is(err, net.ErrClosed), true)
}

// ClientResumes ensures that -c says up to which line of its input all requests were answered,
// whatever ended it, so that a load can be resumed: blank lines count, and answered requests need
// not be sent again. With -stop nothing after an error is sent.
func ClientResumes(t *testing.T, talker Talker, start protocol.Start) {
	load := "Put:k:1\n\n\nPut:k:2\nPut:k\n\nPut:k:3\nPut:k:4\n\n"
	for _, c := range []struct {
		answers int // that come before the connection ends; -1: all, and it does not end
		stops   bool
		want    error
		through int
		errs    string
	}{
		{0, false, talker.Unanswered, 0, ""},
		{1, false, talker.Unanswered, 1, ""},
		{3, false, talker.Unanswered, 3, ""},
		{4, false, talker.Unanswered, 4, ""},
		{7, false, talker.Unanswered, 7, "line 5: Put needs"},
		{-1, false, nil, 9, "line 5: Put needs"},
		{-1, true, talker.Stopped, 4, "line 5: Put needs"}, // this line has to be sent again
	} {
		synctest.Test(t, func(t *testing.T) {
			n := start(t)
			ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
			go relay(n.Dial(t), theirs, c.answers)

			var errs bytes.Buffer
			good, through, err := talker.Talk(Talk{Conn: ours, In: strings.NewReader(load),
				Out: Closing(io.Discard), Errs: &errs, Stop: c.stops})
			if good || !(errors.Is(err, c.want) || c.want == talker.Unanswered &&
				errors.Is(err, syscall.ECONNRESET)) || through != c.through ||
				!strings.HasPrefix(errs.String(), c.errs) {
				t.Errorf("after %d answers: %v, %v through line %d, and %q; want %v through line "+
					"%d", c.answers, good, err, through, &errs, c.want, c.through)
			}

			ours.Close()
			synctest.Wait()
			if c.stops {
				n.Dial(t).Ask("Get:k\nPing", "k:1", "k:2", ":PONG") // what came before the error
			}

			n.HangUp()
		})
	}
}

// relay carries requests from conn to the server, and so many answers back, besides that to an Ack.
// Then it ends the connection, and later answers are lost; -1: all answers.
func relay(a *protocol.Client, conn *world.Conn, answers int) {
	go func() {
		io.Copy(a.Conn, conn)
		a.Conn.CloseWrite()
	}()

	for sent := 0; answers < 0 || sent <= answers; sent++ {
		line, err := a.R.ReadString('\n')
		if err != nil {
			break
		}
		io.WriteString(conn, line)
	}

	if answers >= 0 {
		<-time.After(1) // by then all is sent: fake time passes only while nobody works
	}
	conn.Close()
	a.Close()
}

// ClientRefusesUTF16 ensures that text in UTF-16, as PowerShell writes it, is reported as such, and
// is not run.
func ClientRefusesUTF16(t *testing.T, talker Talker, start protocol.Start) {
	for in, want := range map[string]error{
		"\xff\xfeP\x00u\x00t\x00:\x00a\x00:\x00b\x00\r\x00\n\x00": talker.UTF16,
		"\xfe\xff\x00P\x00u\x00t\x00:\x00a\x00:\x00b\x00\r\x00\n": talker.UTF16,
		"P\x00i\x00n\x00g\x00\n\x00":                              talker.UTF16,
		"\x00P\x00i\x00n\x00g\x00\n":                              talker.UTF16,
		"\xff\xfe":                                                talker.UTF16,
		"\xff\xfe\n\x00Put:a:b\n":                                 talker.UTF16,
		"A\x00c\x00k\x00\n\x00":                                   talker.UTF16,

		"\r\x00\nPut:a:b\n": nil, "\n": nil, "a\n": nil,
	} {
		synctest.Test(t, func(t *testing.T) {
			n := start(t)
			var said bytes.Buffer
			good, _, err := talker.Talk(Talk{Conn: n.Dial(t).Conn, In: strings.NewReader(in),
				Out: Closing(&said), Errs: &said})
			if !errors.Is(err, want) || want != nil && (good || said.Len() > 0) {
				t.Errorf("%q: %v, %v, want %v, and it says %q", in, good, err, want, &said)
			}

			synctest.Wait()
			n.Dial(t).WantStat("clients", 1)
			n.HangUp()
		})
	}
}

// ClientSendsLongLines ensures that -c sends a line before all of it has come, so that it keeps
// only a piece of a long one, and that it counts as one line. most is how many bytes it sends at
// once.
func ClientSendsLongLines(t *testing.T, talker Talker, most int) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
		in, end := io.Pipe()
		answered := make(chan int, 1)
		go func() {
			good, through, err := talker.Talk(Talk{Conn: ours, In: in, Out: Closing(io.Discard),
				Errs: io.Discard})
			if !good {
				t.Error(err)
			}
			answered <- through
		}()

		r := bufio.NewReader(theirs)
		r.ReadString('\n')
		io.WriteString(theirs, ":OK 0\n")

		line := "Put:k:" + strings.Repeat("v\x00", 4*most) // a part of it looks like UTF-16
		go io.WriteString(end, line)
		start := make([]byte, 7*most)
		io.ReadFull(r, start) // without the end of the line

		go func() {
			io.WriteString(end, "\n")
			end.Close()
		}()

		rest, _ := io.ReadAll(r)
		if got := string(start) + string(rest); got != line+"\n" {
			t.Errorf("%d bytes are sent, want %d", len(got), len(line)+1)
		}

		io.WriteString(theirs, ":OK 1\n")
		theirs.Close()
		is.Equal(t, "answered lines", <-answered, 1)
		ours.Close()
	})
}

// ClientTimeout ensures that -timeout ends a conversation with a server that has stopped answering,
// or does not close the connection when the input has ended, but counts neither a pause between
// requests nor an answer that comes in parts.
func ClientTimeout(t *testing.T, talker Talker) {
	for _, ends := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) { clientTimeout(t, talker, ends) })
	}
}

// clientTimeout is ClientTimeout with a server that goes silent when a request comes, or when the
// input ends.
func clientTimeout(t *testing.T, talker Talker, ends bool) {
	ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
	in, typed := io.Pipe()
	go func() {
		r := bufio.NewReader(theirs)
		r.ReadString('\n')
		io.WriteString(theirs, ":OK 0\n")

		// A request comes a minute after the last answer, and its own answer some seconds
		// later.
		for range 3 {
			<-time.After(time.Minute)
			io.WriteString(typed, "Ping\n")
			r.ReadString('\n')
			<-time.After(4 * time.Second)
			io.WriteString(theirs, ":PONG\n")
		}
		<-time.After(time.Minute)
		if ends {
			typed.Close()
		}
		for range 3 { // the first one counts
			io.WriteString(typed, "Ping\n")
			<-time.After(2 * time.Second)
		}
	}()

	began := time.Now()
	good, _, err := talker.Talk(Talk{Conn: ours, In: in, Out: Closing(io.Discard), Errs: io.Discard,
		Timeout: 5 * time.Second})
	if took := time.Since(began); good != ends || !ends && !errors.Is(err, talker.Quiet) ||
		took != 3*64*time.Second+time.Minute+5*time.Second {
		t.Errorf("%v after %v", err, took)
	}

	ours.Close()
	theirs.Close()
	in.Close()
	world.Pass(6 * time.Second) // until nothing is typed any more
}

// ClientBesideASilentServer ensures that -timeout limits silence, not an answer that takes long
// while its bytes flow, and that -ping has a limit by itself if a server stalls after its welcome.
// What was answered is good, though the server does not close the connection: for that, and for the
// welcome, it has connectTime.
func ClientBesideASilentServer(t *testing.T, talker Talker, connectTime time.Duration) {
	for _, c := range []struct {
		talk    Talk
		answers []string // one every 4 s
		closes  bool     // the server, behind them
		good    bool
		took    time.Duration
	}{
		{Talk{Requests: []string{"Keys"}, Timeout: 5 * time.Second},
			[]string{":OK 0\n", ": a", "bc\n", ": d\n", ":OK 2\n"}, true, true, 20 * time.Second},
		{Talk{Requests: []string{"Keys"}, Timeout: 5 * time.Second},
			[]string{":OK 0\n", ": a"}, false, false, 13 * time.Second},
		{Talk{Ping: true}, []string{":OK 0\n"}, false, false, 9 * time.Second},
		{Talk{Ping: true}, []string{":OK 0\n", ":PONG\n"}, true, true, 8 * time.Second},
		{Talk{Ping: true}, []string{":OK 0\n", ":PONG\n"}, false, true, 8*time.Second + connectTime},
		{Talk{Requests: []string{"Put:a:b"}, Timeout: time.Minute},
			[]string{":OK 0\n", ":OK 1\n"}, false, true, 68 * time.Second},
		{Talk{Requests: []string{"Keys"}}, nil, false, false, connectTime},
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
			go io.Copy(io.Discard, theirs)
			go func() {
				for _, answer := range c.answers {
					<-time.After(4 * time.Second)
					io.WriteString(theirs, answer)
				}
				if c.closes {
					theirs.Close()
				}
			}()

			c.talk.Conn, c.talk.Out, c.talk.Errs = ours, Closing(io.Discard), io.Discard
			began := time.Now()
			good, _, err := talker.Talk(c.talk)
			if took := time.Since(began); good != c.good || took != c.took ||
				!good && !errors.Is(err, talker.Quiet) {
				t.Errorf("after %q: %v, %v after %v, want %v after %v", c.answers, good, err, took,
					c.good, c.took)
			}

			ours.Close()
			theirs.Close()
		})
	}
}

// ClientOnATerminal ensures that a user at a terminal sees the answer to each request, also to a
// write, in their order, and that a Quit ends the conversation at once.
func ClientOnATerminal(t *testing.T, talker Talker, start protocol.Start) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var screen Screen
		in, typed := io.Pipe()
		go func() {
			for _, line := range []string{"Put:k:v\n", "\n", "Get:k\nget k\n", "Quit\n"} {
				<-time.After(time.Second)
				io.WriteString(typed, line)
			}
		}()

		n := start(t)
		is.Within(t, 4*time.Second, 4*time.Second, func() {
			if good, _, err := talker.Talk(Talk{Conn: n.Dial(t).Conn, In: in, Out: Closing(&screen),
				Errs: &screen, IsTyped: true}); good || err != nil ||
				screen.String() != ":OK 1\n:OK 0\nk:v\n:OK 1\n"+
					"line 4: unknown request \"get k\"; did you mean Get:k ?\n:OK 0\n" {
				t.Errorf("%v, %v, the screen shows %q", good, err, &screen)
			}
		})

		in.Close()
		n.HangUp()
	})
}

// ClientFailsWithItsFiles ensures that an output that cannot be written, and an input that cannot
// be read, are errors.
func ClientFailsWithItsFiles(t *testing.T, talker Talker, start protocol.Start) {
	synctest.Test(t, func(t *testing.T) {
		n := start(t)
		n.Dial(t).Ask("Put:k:v\nPing", ":PONG")

		broken := errors.New("broken")
		in, end := io.Pipe()
		go func() {
			io.WriteString(end, "Get:k\n")
			end.CloseWithError(broken)
		}()

		a := n.Dial(t)
		if _, _, err := talker.Talk(Talk{Conn: a.Conn, In: in, Out: Closing(io.Discard),
			Errs: io.Discard}); !errors.Is(err, broken) || err.Error() != "reading the requests: broken" {
			t.Errorf("the input fails: %v", err)
		}
		a.Close()

		none, out := io.Pipe()
		none.CloseWithError(broken)
		a = n.Dial(t)
		if _, _, err := talker.Talk(Talk{Conn: a.Conn, Requests: []string{"Get:k"}, Out: Closing(out),
			Errs: io.Discard}); !errors.Is(err, broken) {
			t.Errorf("the output fails: %v", err)
		}
		a.Close()

		// The output may fail only when it is closed, as with a network file system, also after an
		// error.
		for _, request := range []string{"Get:k", "get k"} {
			a = n.Dial(t)
			_, _, err := talker.Talk(Talk{Conn: a.Conn, Requests: []string{request},
				Out: closesWith{io.Discard, broken}, Errs: io.Discard})
			if !errors.Is(err, broken) || !errors.Is(err, talker.Output) {
				t.Errorf("the output fails when it is closed: %v", err)
			}
			a.Close()
		}

		// That the server was lost counts more.
		ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
		go answerAndGo(theirs, ":OK 0\n", true)
		if _, _, err := talker.Talk(Talk{Conn: ours, Requests: []string{"Get:k"}, Errs: io.Discard,
			Out: closesWith{io.Discard, broken}}); !errors.Is(err, talker.Unanswered) {
			t.Errorf("the server is lost, and the output fails: %v", err)
		}
		ours.Close()

		n.HangUp()
	})
}

// closesWith is a file that reports only in Close what happened to its data.
type closesWith struct {
	io.Writer
	err error
}

func (c closesWith) Close() error { return c.err }

// Closing returns w as a file whose Close does nothing.
func Closing(w io.Writer) io.WriteCloser { return closesWith{w, nil} }
