package world

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// pipeline sends many requests without waiting, reads the replies in its own manner, and counts
// them.
func (v *visitor) pipeline() {
	r := v.random
	key, values, size := fmt.Sprint("fill", v.id), 1+r.IntN(3), pick(r, 1, 100, 3*kilo)
	list := v.fillList(key, values, size)
	if list == nil {
		return
	}

	// The replies are limited to so many bytes in all.
	gets, most := pick(r, 100, 1000, 3000), pick(r, 1, 3, 3, 12)*1000*kilo
	if gets*values*size > most {
		gets = most / (values * size)
	}

	// The requests are Gets with some errors among them, and a last write as a mark.
	var text strings.Builder
	errors := 0
	for range gets {
		if text.WriteString("Get:" + key + "\n"); Chance(r, 20) {
			text.WriteString("Nonsense\n")
			errors++
		}
	}

	mark := v.value(values, 0)
	text.WriteString("Put:" + key + ":" + mark + "\n")

	// Some ask at the end how many replies were dropped; others rely on what the server tells them.
	asks := Chance(r, 2)
	if asks {
		text.WriteString("Ping:end\nQuit\n" + strings.Repeat("what comes after a Quit\n", v.junk))
	}

	manner := pick(r, "greedily", "steadily", "after a rest", "never")

	// The requests are sent beside the reading; otherwise both sides could wait for each other for
	// ever.
	go func() {
		io.WriteString(v.conn, text.String())
		v.conn.CloseWrite()
	}()

	v.tell("%s sends %d Gets of %d bytes, and reads %s", v.id, gets, values*size, manner)

	// A client that never reads cannot count, but its mark must be written.
	got, err := v.readAs(manner)
	if manner == "never" {
		v.process.mu.Lock()
		v.unknown++
		v.process.mu.Unlock()
		v.checkMark(key, mark, len(strings.Join(list, "\n")))
		return
	}

	v.tally(got, err, list, gets+errors, asks, v.calm && (manner == "greedily" || manner == "steadily"))
}

// stop reads some of its replies, and then nothing more or next to nothing, with Ack or without. A
// server with a write timeout must disconnect a client that reads nothing.
func (v *visitor) stop() {
	key, verb, values := "stop"+v.id, "Get", 1
	if Chance(v.random, 3) {
		verb, values = "Dump", 6
	}
	if v.fillList(key, values, 15*kilo) == nil {
		return
	}
	hello := pick(v.random, "Ack", "Ping")
	if _, ok := v.ask(hello); !ok {
		return
	}

	// It may lose replies without being told.
	v.process.mu.Lock()
	v.unknown++
	v.process.mu.Unlock()

	// The replies are more than the network holds.
	go io.WriteString(v.conn, strings.Repeat(verb+":"+key+"\n", 500/values))
	v.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.CopyN(io.Discard, v.r, 20*kilo+v.random.Int64N(30*kilo)); err != nil {
		return // the server has gone
	}

	// Another client must get its list all the same.
	var others sync.WaitGroup
	defer others.Wait()
	defer v.conn.Close()
	if verb == "Dump" {
		v.listBeside(&others, "Keys:none", 0)
	}

	// If its replies cannot be dropped, a server with a limit of memory has no room for all of
	// them, or needs the memory of the values that they keep.
	isTooMuch := (hello == "Ack" || verb == "Dump") && v.settings.Other > 0 &&
		(!v.mute || v.settings.MaxMessage > 2*kilo)
	v.awaitCut(isTooMuch, verb == "Dump" && Chance(v.random, 2))
}

// awaitCut reads nothing more, or next to nothing if drips, until the server disconnects the client
// or has had enough time for it. The server must do so after its write timeout, and soon if
// isTooMuch.
func (v *visitor) awaitCut(isTooMuch, drips bool) {
	most, mustEnd := v.settings.WriteTimeout, true
	switch {
	case isTooMuch && (most == 0 || most > 20*time.Second):
		most = 20 * time.Second
	case most == 0:
		most, mustEnd = 20*time.Second, false
	}

	for stopped, sent := time.Now(), 0; !isClosed(v.gone) && !v.theirs.isClosed(); {
		v.checkQueues()

		// The network itself may take bytes for some seconds more.
		if now := v.theirs.sent(); now > sent && !drips {
			stopped, sent = time.Now(), now
		}
		if took := time.Since(stopped); took > most+10*time.Second+2*v.slack() {
			// Where ticks come late, the server counts that as time in which it did not run itself.
			if mustEnd && !drips && v.late == 0 {
				v.fail("%s reads nothing, and is there after %v", v.id, took)
			}
			return
		}

		if wait(time.Second); drips {
			v.conn.SetReadDeadline(time.Now().Add(time.Second))
			io.CopyN(io.Discard, v.r, 2*kilo)
		}
	}
}

// drip has others read a Dump each by drips: too often to count as slow, and yet more slowly than
// any steady reader. They have all the snapshots, and must lose one to a client that waits for it.
func (v *visitor) drip() {
	key := "drip" + v.id
	if v.fillList(key, 22, 15*kilo) == nil {
		return
	}

	var readers sync.WaitGroup
	defer readers.Wait()
	for range v.settings.Snapshots {
		other := &visitor{process: v.process, id: v.id, random: v.random, calm: true, narrow: true}
		if !other.dial() {
			return
		}
		defer other.conn.Close()

		io.WriteString(other.conn, "Dump:"+key+"\n")
		readers.Go(func() {
			for err := error(nil); err == nil; _, err = io.CopyN(io.Discard, other.r, 800) {
				wait(time.Second / 10)
			}
		})
	}

	// By then they are known to read.
	wait(3 * time.Second)
	asked := time.Now()
	last, ok := v.ask("Keys:none")
	if took := time.Since(asked); ok && took > listTime+2*v.slack() {
		v.fail("beside clients that drip a Keys takes %v: %s", took, last)
	}
}

// debt says that once the server has read so many bytes from a client, it owes it so many bytes.
type debt struct{ taken, owed int }

// readAndSend reads just as fast as the promise requires, has many answers still to come, and goes
// on sending, until the server stops. All requests that the server had read by then must be
// answered.
func (v *visitor) readAndSend() {
	if !v.hello() {
		return
	}
	key, value := "steady"+v.id, v.value(0, kilo)
	if _, ok := v.ask("Set:" + key + ":" + value); !ok {
		return
	}

	// The rate is a quarter above the promised one, because the network takes time as well.
	const pause, piece = 50 * time.Millisecond, steadyRate / 20 * 5 / 4

	var want strings.Builder
	var got bytes.Buffer
	var debts []debt

	// The client ends before long, because it cannot know when the server stops and costs time.
	backlog, next := 100*kilo+v.random.IntN(100*kilo), time.Now()
	ends := next.Add(4 * time.Second)
	for err := error(nil); err == nil; {
		request := "Ping\n"
		want.WriteString(":PONG\n")
		for want.Len()-got.Len() < backlog {
			request += "Get:" + key + "\n"
			want.WriteString(key + ":" + value + "\n:OK 1\n")
		}
		io.WriteString(v.conn, request)
		debts = append(debts, debt{v.raw.sent(), want.Len()})

		next = next.Add(pause)
		wait(time.Until(next))
		_, err = io.CopyN(&got, v.r, piece)
		if !isClosed(v.closing) && time.Now().After(ends) {
			return
		}
	}

	if !strings.HasPrefix(want.String(), got.String()) {
		v.fail("%s has read something else than its answers", v.id)
	}
	v.checkDebts(debts, got.Len())
}

// checkDebts wants that a client which reads steadily got all that it was owed when Close was
// called.
func (v *visitor) checkDebts(debts []debt, got int) {
	v.process.mu.Lock()
	defer v.process.mu.Unlock()

	// A server that stood still may have had no time to answer.
	if !isClosed(v.closing) || v.failed || v.after != nil || v.stalled > 0 {
		return
	}

	for _, d := range debts {
		if d.taken <= v.taken[v.theirs] && got < d.owed {
			v.fail("%s reads steadily, and gets %d bytes of %d that it was owed when the server stopped",
				v.id, got, d.owed)
			return
		}
	}
}

// fillList puts so many values under key, and returns the lines of a Get. They are nil if the
// server has refused a Put, or has gone.
func (v *visitor) fillList(key string, values, size int) (list []string) {
	var text strings.Builder
	for i := range values {
		value := v.value(i, size)
		list = append(list, key+":"+value)
		fmt.Fprintf(&text, "Put:%s:%s\n", key, value)
	}

	// The answer says that all Puts are done, so each later Get returns all values.
	io.WriteString(v.conn, text.String()+"Ping:begin\n")
	if lines, last, err := v.reply(); err != nil || len(lines) > 0 || last != ":PONG begin" {
		return nil
	}
	return list
}

// checkMark wants that the last write of a client that reads nothing has been run. The replies
// before it have about replySize bytes each.
func (v *visitor) checkMark(key, mark string, replySize int) {
	if !v.calm {
		return
	}
	other, ok := v.also()
	if !ok {
		return
	}
	defer other.conn.Close()

	io.WriteString(other.conn, "Get:"+key+"\n")
	lines, last, err := other.reply()

	// A reply of several messages that has begun may wait while queues are full, a full memory or
	// disk may refuse the mark, and where ticks come late it takes long until a client counts as
	// slow.
	s := v.settings
	hasLimit := s.MaxQueues < 1<<30 || s.MaxMemory > 0
	mayWait := hasLimit && 2*replySize > s.MaxMessage || v.late > 0
	if err == nil && !mayWait && !v.isDisturbed() && !v.mayRefuse() &&
		!slices.Contains(lines, key+":"+mark) {
		v.fail("%s: what it wrote without reading has had no effect: %d lines, %s", v.id,
			len(lines), last)
	}
}

// readAs reads to the end. It returns what it has read, and the error that ended it: io.EOF if
// nothing broke.
func (v *visitor) readAs(manner string) (got string, err error) {
	var all bytes.Buffer
	switch manner {
	case "never":
		// It stays long enough for the server to have to deal with replies that nobody reads.
		select {
		case <-v.gone:
		case <-time.After(20 * time.Second):
		}
		return "", nil
	case "after a rest":
		wait(Between(v.random, 0, 8*time.Second))
	case "steadily":
		// The rate is a quarter above the promised one, because the network takes time as well.
		pause := Between(v.random, 10*time.Millisecond, 900*time.Millisecond)
		piece := int64(pause) * steadyRate * 5 / 4 / int64(time.Second)

		for err == nil {
			_, err = io.CopyN(&all, v.r, piece)
			wait(pause)
		}
		return all.String(), err
	}

	// Copy does not return io.EOF.
	_, err = io.Copy(&all, v.r)
	return all.String(), cmp.Or(err, io.EOF)
}

// mayEnd reports whether a connection may have ended with err, other than by its client. A client
// that reads steadily may not be disconnected while nothing has happened to the server. The caller
// has locked the process's mu.
func (v *visitor) mayEnd(err error, steady bool) bool {
	// A server with a short write timeout disconnects a client that does not read steadily.
	isCut := v.settings.WriteTimeout > 0 && v.settings.WriteTimeout < time.Minute && !steady

	// It also disconnects one whose replies hold memory while writes are refused.
	isCut = isCut || v.settings.Other > 0 && v.mayRefuse() && !steady
	return v.failed || isClosed(v.closing) || isCut && err != nil
}

// tally counts replies: each must be whole, and the client must know of those that were dropped.
func (v *visitor) tally(got string, err error, list []string, owed int, asked, steady bool) {
	v.process.mu.Lock()
	defer v.process.mu.Unlock()

	disturbed := v.mayEnd(err, steady)

	// A calm network breaks nothing off, and the server ends connections in good order.
	if v.calm && !disturbed && v.after == nil && v.stalled == 0 && err != io.EOF {
		v.fail("%s: its connection ends in %v", v.id, err)
	}

	// The client's last write may have been refused, with one line as its answer.
	refusable := 0
	if v.mayRefuse() {
		refusable = 1
	}

	mayBeTorn := err != io.EOF || disturbed || v.after != nil // a process that is killed writes a part
	delivered, dropped, ended, good := v.tallyLines(got, list, asked, mayBeTorn)
	if !good {
		return
	}

	// If the connection ended well, each reply was delivered or counted as dropped.
	v.told += dropped
	if err != io.EOF || disturbed {
		v.unknown++
		if delivered+dropped > owed+1 {
			v.fail("%s: %d delivered and %d dropped, of %d", v.id, delivered, dropped, owed)
		}
	} else if n := delivered + dropped - owed; (n < 0 || n > refusable) &&
		(v.after == nil || ended) {
		v.fail("%s: %d delivered and %d dropped, want %d", v.id, delivered, dropped, owed)
	}

	// No fault excuses this: a client that reads as fast as promised loses nothing.
	if steady && dropped > 0 {
		v.fail("%s: %d replies were dropped, though it read", v.id, dropped)
	}
}

// tallyLines counts the replies that were delivered, and those that the server says it has dropped.
// ended reports whether the last line said so. Each line must be the next one of a reply, an error,
// or a number of dropped replies; otherwise good is false.
func (v *visitor) tallyLines(got string, list []string, asked, mayBeTorn bool) (delivered,
	dropped int, ended, good bool) {
	place := 0
	lines := strings.SplitAfter(got, "\n")
	for i, line := range lines {
		text, whole := strings.CutSuffix(line, "\n")
		switch n := 0; {
		case !whole && line != "" && !mayBeTorn:
			v.fail("%s: the last line is torn: %.60q", v.id, line)

		// Nothing follows the last newline, or the connection broke within a line.
		case !whole:
		case text == list[place]:
			if place++; place == len(list) {
				place = 0
				delivered++
			}
		case place > 0:
			v.fail("%s: line %d is %.60q, in the middle of a reply", v.id, i, text)
			return delivered, dropped, ended, false

		// An error takes the place of a reply.
		case strings.Contains(text, "unknown request"), strings.Contains(text, "is full"),
			strings.Contains(text, "cannot be saved"):
			delivered++

		// A line at the end says how many replies were dropped.
		case strings.HasPrefix(text, ":PONG end"):
			fmt.Sscanf(text, ":PONG end dropped %d", &dropped)
			ended = asked
		case strings.Contains(text, "replies were dropped"):
			fmt.Sscanf(text[strings.LastIndex(text, ": ")+2:], "%d", &n)
			dropped += n
			ended = !asked
		default:
			v.fail("%s: line %d is %.60q", v.id, i, text)
			return delivered, dropped, ended, false
		}
	}
	return delivered, dropped, ended, true
}
