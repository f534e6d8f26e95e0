package world

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"kvserver/kvstore/storetest"
)

// share appends to lists that other clients append to as well, and reads them.
func (v *visitor) share() {
	v.change(60, 8, false, func(value string) (key string, q storetest.Request) {
		key, q.Verb = fmt.Sprint("shared", v.random.IntN(3)), "Get"
		if Chance(v.random, 2) {
			q.Verb, q.New = "Put", value
		}
		return key, q
	})
}

// own changes a list of its own in every way, and lets it grow.
func (v *visitor) own() {
	v.change(100, 6, true, func(value string) (key string, q storetest.Request) {
		if q = DrawRequest(v.random, value); Chance(v.random, 2) {
			q = storetest.Request{Verb: "Put", New: value}
		}

		// A Take would wait in vain: no other client gives anything to this list.
		q.Seconds = 0
		return "own" + v.id, q
	})
}

// mix changes, in every way, lists that other clients change as well.
func (v *visitor) mix() {
	v.change(60, 1, false, func(value string) (key string, q storetest.Request) {
		return fmt.Sprint("mixed", v.random.IntN(3)), DrawRequest(v.random, value)
	})
}

// change sends requests that draw returns, one at a time or up to most at once, and notes the
// answers. If alone is true, no other client sends requests about the same lists.
func (v *visitor) change(requests, most int, alone bool,
	draw func(value string) (key string, q storetest.Request)) {
	if !v.hello() {
		return
	}

	for i := 0; i < requests; {
		var text strings.Builder
		var hears []func() error
		for range pick(v.random, 1, 1, most) {
			i++
			key, q := draw(v.value(i, 0))
			text.WriteString(q.Line(key))

			// The request counts as begun before it is sent, because no server can have run it
			// earlier.
			o := heard{Operation: storetest.Operation{Request: q}}
			hear := begin(v.r, key, &o.Operation, v.tick)
			isNext := alone && len(hears) > 0
			hears = append(hears, func() error {
				// Requests that are sent at once are run in their order: each begins after the one
				// before.
				if isNext {
					o.Invoked = v.tick()
				}
				err := hear()
				v.note(key, o, err)
				return err
			})
		}
		io.WriteString(v.conn, text.String())

		// A request without an answer may have been run or not.
		for _, hear := range hears {
			if err := hear(); err != nil && err != ErrRefused {
				requests = 0
			}
		}
		wait(pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// note adds an operation to the history of its list. err is the error that hear returned.
func (v *visitor) note(key string, o heard, err error) {
	if o.at = time.Now(); v.isVain() {
		o.Answered = 0
	}

	// A client whose network does not stall gets the answer to a write at once.
	if err == nil && o.Verb == "Put" && v.calm {
		v.checkMoved()
	}

	if err == ErrRefused {
		v.refuse(o.New, len(o.New) > 1) // a value of one digit may have been sent by others, too
		return
	}

	// isVain locks the process's mutex, and kill locks that before the world's: keep this order.
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	v.history[key] = append(v.history[key], o)
}

// DrawRequest draws a request about a list that many clients change. value is one that nobody else
// sends.
func DrawRequest(random *rand.Rand, value string) (q storetest.Request) {
	// Many clients send the same two values, so that a Swap or a Remove sometimes finds one.
	some := fmt.Sprint(random.IntN(2))

	q.Verb = pick(random, "Put", "Put", "Put", "Add", "Take", "Take", "Take", "Take", "Swap",
		"Update", "Set", "Remove", "Delete", "Get", "Count")
	switch q.Verb {
	case "Put", "Add", "Set":
		q.New = pick(random, value, some)
	case "Swap", "Update":
		q.Old, q.New = some, pick(random, value, some)
	case "Remove":
		q.Old = some
	case "Take":
		q.Seconds = pick(random, 0, 0, 0, 1)
	}
	return q
}

// Ask sends the request of a, in Ack mode, and notes the answer in a. tick is the clock of all
// clients.
func Ask(conn io.Writer, r *bufio.Reader, key string, a *storetest.Operation,
	tick func() int64) error {
	hear := begin(r, key, a, tick)
	io.WriteString(conn, a.Line(key))
	return hear()
}

// begin notes that a begins, and returns a function that reads and notes its answer. A Take that
// waited in vain found nothing at the end of its wait, so that is when it begins.
func begin(r *bufio.Reader, key string, a *storetest.Operation, tick func() int64) (hear func() error) {
	a.Invoked = tick()

	// A timer notes the end of the wait, because the answer comes later.
	var end atomic.Int64
	if a.Seconds > 0 {
		time.AfterFunc(time.Duration(a.Seconds)*time.Second, func() { end.Store(tick()) })
	}

	return func() error {
		lines, last, err := readReply(r)
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(last, ":ERROR"):
			return ErrRefused
		}

		for _, line := range lines {
			a.Got = append(a.Got, strings.TrimPrefix(line, key+":"))
		}
		fmt.Sscanf(last, ":OK %d", &a.N)
		if a.N == 0 && end.Load() > 0 {
			a.Invoked = end.Load()
		}
		a.Answered = tick()
		return nil
	}
}

// ErrRefused is returned by Ask if the server has refused the request.
var ErrRefused = errors.New("it was refused")
