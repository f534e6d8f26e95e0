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
		for range Pick(v.random, 1, 1, 8) {
			key, o := fmt.Sprint("shared", v.random.IntN(3)), heard{}
			if i++; Chance(v.random, 2) {
				o.Verb, o.New = "Put", v.value(i)
			} else {
				o.Verb = "Get"
			}
			text.WriteString(o.Line(key))
			o.Invoked = v.tick()
			keys, ops = append(keys, key), append(ops, o)
		}
		io.WriteString(v.conn, text.String())
		for j, o := range ops {
			lines, last, err := v.reply()
			if err != nil {
				for k := j; k < len(ops); k++ {
					v.note(keys[k], ops[k])
				}
				return
			}
			if o.Answered, o.at = v.tick(), time.Now(); strings.HasPrefix(last, ":ERROR") {
				v.world.mu.Lock()
				v.refused[o.New] = true
				v.world.mu.Unlock()
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
	l := &ownList{states: []state{{}}}
	v.world.mu.Lock()
	v.owners[key] = l
	v.world.mu.Unlock()
	if !v.hello() {
		return
	}
	var list []string
	for i := 0; i < 100; {
		var writes []storetest.Request
		var text strings.Builder
		for range Pick(v.random, 1, 1, 6) {
			i++
			q := storetest.Request{Verb: Pick(v.random, "Put", "Put", "Put", "Update", "Get", "Get",
				"Delete", "Set", "Remove", "Remove", "Swap", "Add", "Take", "Count")}
			switch q.Verb {
			case "Update", "Swap":
				if q.Old = "absent"; len(list) > 0 && !Chance(v.random, 4) {
					q.Old = Pick(v.random, list...)
				}
				q.New = v.value(i)
			case "Put", "Set", "Add":
				q.New = v.value(i)
			case "Remove":
				if q.Old = "absent"; len(list) > 0 {
					q.Old = Pick(v.random, list...)
				}
			}
			writes = append(writes, q)
			text.WriteString(q.Line(key))
		}
		io.WriteString(v.conn, text.String())
		for j, q := range writes {
			lines, last, err := v.reply()
			if err != nil {
				v.world.mu.Lock()
				l.maybe = append(l.maybe, possible(list, writes[j:])...)
				v.world.mu.Unlock()
				return
			}
			if strings.HasPrefix(last, ":ERROR") {
				v.world.mu.Lock()
				v.refused[q.New] = true
				v.world.mu.Unlock()
				continue
			}
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
			if q.Verb == "Get" || q.Verb == "Count" {
				continue
			}
			list = after
			if q.Verb == "Put" && v.calm {
				v.checkMoved()
			}
			vain := v.isVain()
			v.world.mu.Lock()
			if vain {
				l.maybe = append(l.maybe, list)
			} else {
				l.states = append(l.states, state{list, time.Now()})
			}
			v.world.mu.Unlock()
		}
		Wait(Pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// possible returns what a list may be when nobody knows which of the writes were run.
func possible(list []string, writes []storetest.Request) (lists [][]string) {
	lists = [][]string{list}
	for _, q := range writes {
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
	var end atomic.Int64
	if a.Seconds > 0 {
		defer time.AfterFunc(time.Duration(a.Seconds)*time.Second,
			func() { end.Store(tick()) }).Stop()
	}
	io.WriteString(conn, a.Line(key))
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
