package world

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// visitor is a client.
type visitor struct {
	*process
	id     string
	random *rand.Rand
	conn   HalfConn
	raw    *Conn // the client's side below TLS
	theirs *Conn // the server's side
	r      *bufio.Reader
	calm   bool // its network neither stalls nor breaks
	narrow bool // its network holds next to nothing
	far    bool // all that it is sent comes late
	plain  bool // it speaks no TLS, whatever the server does
	junk   int  // lines that it may send after a Quit: none if they would take over a second
}

// kind is a kind of client.
type kind struct {
	name string
	do   func(*visitor)
	calm bool // it needs a network that neither stalls nor breaks

	little bool // it leaves little data in the store
}

var kinds = []kind{
	{"shares lists", (*visitor).share, false, false},
	{"shares lists", (*visitor).share, false, false},
	{"owns a list", (*visitor).own, false, false},
	{"owns a list", (*visitor).own, false, false},
	{"pipelines", (*visitor).pipeline, false, true},
	{"pipelines and reads", (*visitor).pipeline, true, true},
	{"pings", (*visitor).ping, true, true},
	{"lists", func(v *visitor) { v.list("Keys:none", 0) }, false, false},
	{"lists side by side", (*visitor).listMany, false, false},
	{"mixes lists", (*visitor).mix, false, false},
	{"stops reading", (*visitor).stop, true, true},
	{"drips", (*visitor).drip, true, false},
	{"reads and sends", (*visitor).readAndSend, true, true},
	{"takes", (*visitor).take, true, true},
	{"ends keys", (*visitor).end, false, true},
	{"sends garbage", (*visitor).garbage, false, true},
}

// visit starts a client.
func (p *process) visit(all *sync.WaitGroup, kind kind) {
	// A client has a source of random numbers of its own, so that it does not depend on other
	// clients.
	number := p.id()
	r := rand.New(rand.NewPCG(p.seed, uint64(number)))
	v := &visitor{process: p, id: fmt.Sprint("c", number), random: r,
		calm: kind.calm || Chance(r, 2), plain: kind.name == "sends garbage" && Chance(r, 2)}

	all.Go(func() {
		// Clients do not come all at once: some meet a server that is busy, or that ends.
		wait(Between(r, 0, pick(r, 0, time.Second, 10*time.Second)))
		if !v.dial() {
			return
		}

		p.tell("%s %s", v.id, kind.name)
		kind.do(v)
		v.conn.Close()
	})
}

// drawWires draws what the network does with the client's bytes, and with the replies.
func (v *visitor) drawWires() (out, back wire) {
	r := v.random

	// Bytes are cut, come late, and may stop.
	out = wire{random: rand.New(rand.NewPCG(r.Uint64(), 1)),
		piece: pick(r, 3, 500, 16*kilo, 64*kilo)}

	// A wire that carries three bytes at a time is never late as well: that would take minutes.
	if out.piece > 3 {
		out.late = pick(r, 0, time.Millisecond, 30*time.Millisecond)
	}

	if out.late == 0 || out.piece >= 16*kilo {
		v.junk = r.IntN(20_000)
	}

	// On a calm network every fault is the server's.
	if !v.calm {
		out.stall = pick(r, 0, Between(r, 0, 10*time.Second))
		out.cut = pick(r, 0, 0, 1+r.IntN(20*kilo))
	}

	// Replies have up to 12 MB, which would take too long in pieces of three bytes.
	back = out
	back.random, back.piece = rand.New(rand.NewPCG(r.Uint64(), 2)), max(out.piece, 4*kilo)

	// Otherwise the network itself would be slower than a client that reads steadily.
	if v.calm {
		back.late = min(back.late, 5*time.Millisecond)
	}

	switch {
	case v.far:
		back.late = 3 * time.Second / 2
	case v.narrow:
		back.piece = kilo
	}
	return out, back
}

// dial connects, and reports whether it could.
func (v *visitor) dial() bool {
	r := v.random

	// If the network holds little of a reply, the server notices at once that its reader is slow.
	size, end := pick(r, 4*kilo, 64*kilo, 64*kilo, 1000*kilo, 6000*kilo), pick(r, 8*kilo, 64*kilo)
	if v.narrow {
		size, end = 4*kilo, 4*kilo
	}
	ours, near := Pipe(StreamSize, size)
	far, theirs := Pipe(StreamSize, end)
	theirs.Gate, theirs.Late, v.theirs = v.gate, v.late, theirs

	// What breaks off a connection does so below TLS, without a word to the other side.
	v.raw = ours
	if v.conn = ours; v.settings.TLS != nil && !v.plain {
		v.conn = tls.Client(ours, &tls.Config{InsecureSkipVerify: true})
	}
	v.r = bufio.NewReader(v.conn)

	out, back := v.drawWires()

	// A process that was killed accepts nobody.
	v.process.mu.Lock()
	dead := v.after != nil
	if !dead {
		v.conns = append(v.conns, theirs)
	}
	v.process.mu.Unlock()
	if dead {
		return false
	}

	v.wires.Go(func() { out.carry(near, far) })
	v.wires.Go(func() { back.carry(far, near) })
	if !v.listener.Connect(theirs) {
		theirs.Close()
		ours.Close()
		return false
	}
	return true
}

// reply reads the reply to a request in Ack mode: its data lines, and the line that ends it.
func (v *visitor) reply() (lines []string, last string, err error) {
	lines, last, err = readReply(v.r)
	if v.mute && strings.Contains(last, "memory is full") {
		v.fail("%s is refused a write beside clients that do not read: %s", v.id, last)
	}
	return lines, last, err
}

func readReply(r *bufio.Reader) (lines []string, last string, err error) {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return lines, line, err
		}
		line = strings.TrimSuffix(line, "\n")

		// Lines of Keys and Dump begin with a colon as well, but with a space after it.
		if line[0] == ':' && !strings.HasPrefix(line, ": ") {
			return lines, line, nil
		}
		lines = append(lines, line)
	}
}

// hello begins Ack mode. It returns false if the server is full or has gone.
func (v *visitor) hello() bool {
	io.WriteString(v.conn, "Ack\n")
	_, last, err := v.reply()
	return err == nil && last == ":OK 0"
}

// also returns another client, on a calm network, that has said hello.
func (v *visitor) also() (other *visitor, ok bool) {
	other = &visitor{process: v.process, id: fmt.Sprint("c", v.world.id()), random: v.random,
		calm: true}
	if !other.dial() {
		return nil, false
	}
	if ok = other.hello(); !ok {
		other.conn.Close()
	}
	return other, ok
}

// ask sends a request whose reply has no data, and returns the line that ends the reply. ok is
// false if the request was refused or the connection has ended.
func (v *visitor) ask(request string) (last string, ok bool) {
	io.WriteString(v.conn, request+"\n")
	_, last, err := v.reply()
	return last, err == nil && !strings.HasPrefix(last, ":ERROR")
}

// value returns a value that nobody has sent before, of so many bytes and some more.
func (v *visitor) value(i, bytes int) string {
	bytes += pick(v.random, 0, 0, 10, 300, 1500)
	text := fmt.Sprintf("%s-%d", v.id, i) + strings.Repeat(".", bytes)

	// The value is noted before it is sent, because a backup may hold it before its sender has an
	// answer.
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	v.sent[text] = true
	return text
}

// ping asks now and then, and must get an answer soon: it waits only for the disk and for pauses of
// the process.
func (v *visitor) ping() {
	for i := range 40 {
		asked := time.Now()
		fmt.Fprintf(v.conn, "Ping:%d\n", i)
		_, last, err := v.reply()
		if err != nil && i == 0 && !v.mayBeRefused() && v.settings.Handshakes > 10 {
			v.fail("%s does not get in: %v", v.id, err)
		}
		if err != nil || last != fmt.Sprint(":PONG ", i) {
			return
		}

		// A calm network takes far less than a quarter of a second.
		if took, most := time.Since(asked), time.Second/4+v.slack(); took > most {
			v.fail("%s waits %v for a PONG, want at most %v", v.id, took, most)
		}

		wait(Between(v.random, 0, 300*time.Millisecond))
	}
}

// removeMany has other clients remove from long lists, and pings beside them.
func (v *visitor) removeMany() {
	var all sync.WaitGroup
	defer all.Wait()
	if _, ok := v.ask("Ping"); !ok {
		return
	}

	for range 5 {
		other, ok := v.also()
		if !ok {
			return
		}
		all.Go(func() {
			defer other.conn.Close()
			for range 3 {
				io.WriteString(other.conn, strings.Repeat("Remove:heavy:x\n", 100))
				for range 100 {
					if _, _, err := other.reply(); err != nil {
						return
					}
				}
			}
		})
	}
	v.ping()
}

// mayBeRefused reports whether the server may end a connection that has not asked for anything yet.
func (v *visitor) mayBeRefused() bool {
	v.process.mu.Lock()
	defer v.process.mu.Unlock()
	return isClosed(v.closing) || isClosed(v.killed) || v.failed || v.stalled > 0
}

// list asks for lists of all keys, and for the list known, which must have n lines.
func (v *visitor) list(known string, n int) {
	acked := Chance(v.random, 2)
	if acked && !v.hello() {
		return
	}

	for range 1 + v.random.IntN(4) {
		what := pick(v.random, "Keys", "Keys:own", "Dump", "Dump:own", "Stats", "Help", known)
		asked := time.Now()
		io.WriteString(v.conn, what+"\n")

		// Some leave before the answer has come.
		if Chance(v.random, 6) {
			wait(Between(v.random, 0, 5*time.Second))
			return
		}

		lines, last, err := v.reply()

		// An error of line 0 is about the connection, not about the request.
		if err != nil || strings.HasPrefix(last, ":ERROR line 0") {
			return
		}

		if last != fmt.Sprint(":OK ", len(lines)) || what == known && len(lines) != n {
			v.fail("%s: %d lines, then %q", what, len(lines), last)
		}
		if strings.HasPrefix(what, "Keys") && !slices.IsSorted(lines) {
			v.fail("%s: lines are in no order", what)
		}

		// A list that nobody reads must not keep other clients from theirs.
		if took := time.Since(asked); v.calm && took > listTime+2*v.slack() {
			v.fail("%s takes %v", what, took)
		}

		// A value may be there only if it was sent, and was not refused.
		for _, line := range lines {
			if f := strings.SplitN(line, ":", 4); what == "Dump" && len(f) == 4 && f[1] == " Put" {
				v.known(f[2], f[3])
			}
		}
	}
}

// listMany has several clients ask for lists of many keys at the same time.
func (v *visitor) listMany() {
	var all sync.WaitGroup
	defer all.Wait()

	const keys = 50
	prefix, value, text := "many"+v.id+"-", v.value(0, 0), ""
	for i := range keys {
		text += fmt.Sprintf("Set:%s%d:%s\n", prefix, i*7%keys, value)
	}
	if last, ok := v.ask(text + "Ping"); !ok || last != ":PONG" {
		return
	}

	for range 2 + v.random.IntN(8) {
		if !v.listBeside(&all, "Keys:"+prefix, keys) {
			return
		}
	}
}

// listBeside has another client of the group all ask for lists beside v.
func (v *visitor) listBeside(all *sync.WaitGroup, known string, n int) (ok bool) {
	other, ok := v.also()
	if !ok {
		return false
	}

	// A source of random numbers must not be used by two goroutines at once.
	other.random = rand.New(rand.NewPCG(v.random.Uint64(), 3))
	all.Go(func() {
		defer other.conn.Close()
		other.list(known, n)
	})
	return true
}

// silence has many clients connect to a server that speaks TLS and send nothing, or only the
// beginning of a hello. Beside them one client after the other speaks, and must get in.
func (v *visitor) silence() {
	var all sync.WaitGroup
	defer all.Wait()

	// A client that is far away takes its time, but keeps its place while others that say nothing
	// at all have one. So with some places it may fail no more than once, by chance.
	far, most := v.settings.Handshakes >= 10 && Chance(v.random, 2), 3
	if far {
		most = 2
	}

	// A source of random numbers must not be used by two goroutines at once.
	flood := &visitor{process: v.process, random: rand.New(rand.NewPCG(v.random.Uint64(), 3))}
	all.Go(func() { flood.connectMany(!far) })
	for tries, failures := 0, 0; tries < 8; tries++ {
		wait(Between(v.random, 0, time.Second))
		other := &visitor{process: v.process, random: v.random, calm: true, far: far}
		if !other.dial() {
			return
		}

		// If all others have spoken as well, an honest client may have to go, so it tries again.
		io.WriteString(other.conn, "Ping\n")
		_, _, err := other.reply()
		other.conn.Close()
		if failures++; err == nil {
			failures = 0
		}
		if failures == most && !v.mayBeRefused() && v.settings.MaxClients > 10 {
			v.fail("a client does not get in beside those that say nothing: %v", err)
		}
	}
}

// connectMany connects again and again, and sends next to nothing: nothing at all, or if someBegin
// now and then the beginning of a hello.
func (v *visitor) connectMany(someBegin bool) {
	for range 200 {
		other := &visitor{process: v.process, random: v.random, plain: true}
		if !other.dial() {
			return
		}

		// Each connection stays open until the last one is made, so that there are many at a time.
		defer other.conn.Close()
		if someBegin && Chance(v.random, 20) {
			io.WriteString(other.conn, "\x16\x03\x01\x02\x00\x01")
		}
		wait(Between(v.random, 0, 100*time.Millisecond))
	}
}

// dribble sends a line whose bytes come in time, but whose end does not.
func (v *visitor) dribble() {
	for began := time.Now(); ; {
		if _, err := io.WriteString(v.conn, "x"); err != nil {
			return
		}

		// The server counts in ticks of a second, and each tick may come late.
		most := lineTime + lineTime/time.Second*v.late + 20*time.Second + v.slack()
		if took := time.Since(began); took > most {
			v.fail("%s dribbles a line for %v", v.id, took)
			return
		}
		wait(Between(v.random, 0, 2*time.Second))
	}
}

// garbage sends lines that are no requests. Nothing of them may be run.
func (v *visitor) garbage() {
	r := v.random

	// Nobody notes this value as sent, so a store that holds it is found out.
	evil := strings.Repeat("Put:shared0:evil\n", 3)

	what := r.IntN(8)

	// Inside TLS the first bytes of a record are just a bad line, and good lines may follow it.
	if what == 1 && v.settings.TLS != nil && !v.plain {
		what = 0
	}

	switch what {
	case 0:
		v.conn.Write(junk(r))

	// A TLS record begins like this: the good lines after it must not be run.
	case 1:
		io.WriteString(v.conn, "\x16\x03\x01\n"+evil)

	// A web page can make a browser send this: the lines after the head must not be run.
	case 2:
		io.WriteString(v.conn, pick(r, "GET / HTTP/1.1",
			"POST /"+strings.Repeat("a", 2*maxLine)+" HTTP/1.0")+"\r\n\r\n"+evil)

	// A line that is too long is skipped, and not run in parts.
	case 3:
		for range 5 {
			if _, err := io.WriteString(v.conn,
				strings.Repeat("Put:shared0:evil", 1000)); err != nil {
				break
			}
		}

	// A line without its end may be the first half of a longer one.
	case 4:
		v.conn.Write([]byte("Put:shared0:evil"))
		v.conn.CloseWrite()
	case 5:
		v.dribble()
		return

	// A client of Redis begins like this: the lines after it must not be run.
	case 6:
		io.WriteString(v.conn, "*3\r\n$3\r\nSET\r\n"+evil)
	case 7: // a long line that does not end, and waits for its turn beside others
		io.WriteString(v.conn, pick(r, "Put", "Remove", "Delete", "x")+":shared0:evil"+
			strings.Repeat("x", r.IntN(maxLine)))
		wait(Between(r, 0, 2*lineTime))
	}

	// It may read what it is told.
	if Chance(r, 2) {
		v.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		io.Copy(io.Discard, v.r)
	}
}

// junk returns random bytes without a colon, so that they are no request that changes a list.
func junk(r *rand.Rand) []byte {
	b := make([]byte, r.IntN(2000))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return bytes.ReplaceAll(b, []byte(":"), nil)
}
