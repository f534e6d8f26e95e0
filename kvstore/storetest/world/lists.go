package world

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"kvserver/kvstore/storetest"
)

// note adds what was heard to the history, where it is not in vain.
func (v *visitor) note(key string, o heard) {
	if v.isVain() {
		o.Answered = 0
	}

	// isVain takes the process's mutex, which kill takes before the world's: never the other way.
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	v.history[key] = append(v.history[key], o)
}

// share appends to lists that others append to, reads them, and notes what it saw.
func (v *visitor) share() {
	if !v.hello() {
		return
	}

	for i := 0; i < 60; {
		var keys []string
		var ops []heard
		var text strings.Builder

		// Several requests at once are answered in their order, though others' run between them.
		for range Pick(v.random, 1, 1, 8) {
			key, o := fmt.Sprint("shared", v.random.IntN(3)), heard{}
			if i++; Chance(v.random, 2) {
				o.Verb, o.New = "Put", v.value(i)
			} else {
				o.Verb = "Get"
			}
			text.WriteString(o.Line(key))

			// It counts as begun before it is sent: no server can have run it earlier.
			o.Invoked = v.tick()
			keys, ops = append(keys, key), append(ops, o)
		}

		// Those that are not answered may have been run or not.
		io.WriteString(v.conn, text.String())
		for j, o := range ops {
			lines, last, err := v.reply()
			if err != nil {
				for k := j; k < len(ops); k++ {
					v.note(keys[k], ops[k])
				}
				return
			}

			// A refused request has changed nothing and seen nothing.
			if o.Answered, o.at = v.tick(), time.Now(); strings.HasPrefix(last, ":ERROR") {
				v.refuse(o.New)
				continue
			}

			for _, line := range lines {
				o.Got = append(o.Got, strings.TrimPrefix(line, keys[j]+":"))
			}
			fmt.Sscanf(last, ":OK %d", &o.N)
			v.note(keys[j], o)
		}

		Wait(Pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// ownList is a list that one client at a time writes.
type ownList struct {
	states []state    // those that were answered, the last one first to be believed
	maybe  [][]string // what it may be as well
}

type state struct {
	list []string
	at   time.Time // answered
}

// own writes a list of its own and knows at each step what it holds.
func (v *visitor) own() {
	key := fmt.Sprint("own", v.id)

	// Every look at the store compares this list, so it is known before the first request.
	l := &ownList{states: []state{{}}}
	v.world.mu.Lock()
	v.owners[key] = l
	v.world.mu.Unlock()

	if !v.hello() {
		return
	}

	// One request at a time, or some at once.
	var list []string
	for i := 0; i < 100; {
		var writes []storetest.Request
		var text strings.Builder
		for range Pick(v.random, 1, 1, 6) {
			i++

			// The list is that before the batch: an earlier request of it may take the value away.
			q := v.drawOwn(i, list)
			writes = append(writes, q)
			text.WriteString(q.Line(key))
		}
		io.WriteString(v.conn, text.String())

		for j, q := range writes {
			lines, last, err := v.reply()

			// Nobody knows which of those that are not answered were run.
			if err != nil {
				v.world.mu.Lock()
				l.maybe = append(l.maybe, possible(list, writes[j:])...)
				v.world.mu.Unlock()
				return
			}

			// A refused request leaves the list as it was.
			if strings.HasPrefix(last, ":ERROR") {
				v.refuse(q.New)
				continue
			}

			list = v.checkOwn(key, q, list, lines, last)
			if q.Verb != "Get" && q.Verb != "Count" {
				v.learn(l, list)
			}
		}

		Wait(Pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// drawOwn draws a request about a list that the client alone writes.
func (v *visitor) drawOwn(i int, list []string) (q storetest.Request) {
	q.Verb = Pick(v.random, "Put", "Put", "Put", "Update", "Get", "Get", "Delete", "Set", "Remove",
		"Remove", "Swap", "Add", "Take", "Count")

	switch q.Verb {
	case "Update", "Swap", "Remove":
		// Some requests name a value that is not there, so that they find nothing.
		if q.Old = "absent"; len(list) > 0 && !Chance(v.random, 4) {
			q.Old = Pick(v.random, list...)
		}
	}

	switch q.Verb {
	case "Update", "Swap", "Put", "Set", "Add":
		q.New = v.value(i)
	}
	return q
}

// checkOwn wants that q is answered as the model says, and returns what the list is then.
func (v *visitor) checkOwn(key string, q storetest.Request, list, lines []string,
	last string) (after []string) {
	after, n, got := q.After(list)
	if want := fmt.Sprint(":OK ", n); last != want {
		v.fail("%s %s %.30q: got %q, want %q", q.Verb, key, q.Old, last, want)
	}

	for k := range lines {
		lines[k] = strings.TrimPrefix(lines[k], key+":")
	}
	if !slices.Equal(lines, got) {
		v.fail("%s %s answers %.200q, want %.200q", q.Verb, key, lines, got)
	}

	// A write of a client whose network does not stall is answered at once.
	if q.Verb == "Put" && v.calm {
		v.checkMoved()
	}
	return after
}

// learn notes that the list is this, as far as that can be believed.
func (v *visitor) learn(l *ownList, list []string) {
	isVain := v.isVain()

	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	if isVain {
		// What is answered now may be gone after the power failure.
		l.maybe = append(l.maybe, list)
	} else {
		l.states = append(l.states, state{list, time.Now()})
	}
}

// refuse notes that a value was refused, so that it must not be there.
func (v *visitor) refuse(value string) {
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	v.refused[value] = true
}

// possible returns what a list may be when nobody knows which of the writes were run.
func possible(list []string, writes []storetest.Request) (lists [][]string) {
	lists = [][]string{list}
	for _, q := range writes {
		// The range is over the lists of before: each is kept, as if this write had not been run.
		for _, l := range lists {
			after, _, _ := q.After(l)
			lists = append(lists, after)
		}
	}
	return lists
}

// mix changes lists that others change, in every way, and notes what it saw.
func (v *visitor) mix() {
	if !v.hello() {
		return
	}

	for i := range 60 {
		key := fmt.Sprint("mixed", v.random.IntN(3))
		a := heard{Operation: storetest.Operation{Request: DrawRequest(v.random, v.value(i))}}
		err := Ask(v.conn, v.r, key, &a.Operation, v.tick)

		// What was refused is no part of the history.
		if a.at = time.Now(); err == ErrRefused {
			v.world.mu.Lock()
			v.refused[a.New] = len(a.New) > 1 // or others send it, too
			v.world.mu.Unlock()
		} else {
			v.note(key, a)
		}
		if err != nil && err != ErrRefused {
			return
		}

		Wait(Pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// DrawRequest draws a request about a list that many clients change, with a value of its own.
func DrawRequest(random *rand.Rand, value string) (q storetest.Request) {
	// Many clients send the same two values, so that a Swap or a Remove finds one now and then.
	some := fmt.Sprint(random.IntN(2)) // or one that others have as well

	q.Verb = Pick(random, "Put", "Put", "Put", "Add", "Take", "Take", "Take", "Take", "Swap",
		"Update", "Set", "Remove", "Delete", "Get", "Count")
	switch q.Verb {
	case "Put", "Add", "Set":
		q.New = Pick(random, value, some)
	case "Swap", "Update":
		q.Old, q.New = some, Pick(random, value, some)
	case "Remove":
		q.Old = some
	case "Take":
		q.Seconds = Pick(random, 0, 0, 0, 1)
	}
	return q
}

// Ask asks what a says of key, after Ack, and notes the answer. tick is everybody's clock. A
// Take that has waited in vain has found nothing at its end, so that is where it begins.
func Ask(conn io.Writer, r *bufio.Reader, key string, a *storetest.Operation,
	tick func() int64) error {
	a.Invoked = tick()

	// A timer marks the end of the wait: the answer comes later, and says nothing of when.
	var end atomic.Int64
	if a.Seconds > 0 {
		defer time.AfterFunc(time.Duration(a.Seconds)*time.Second,
			func() { end.Store(tick()) }).Stop()
	}

	io.WriteString(conn, a.Line(key))

	// Values, and then the end of the reply.
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}

		if strings.HasPrefix(line, ":ERROR") {
			return ErrRefused
		}
		if _, err := fmt.Sscanf(line, ":OK %d", &a.N); err == nil {
			break
		}

		a.Got = append(a.Got, strings.TrimSuffix(strings.TrimPrefix(line, key+":"), "\n"))
	}

	if a.N == 0 && end.Load() > 0 {
		a.Invoked = end.Load()
	}
	a.Answered = tick()
	return nil
}

// ErrRefused is Ask's where the server has refused the request.
var ErrRefused = errors.New("it was refused")
