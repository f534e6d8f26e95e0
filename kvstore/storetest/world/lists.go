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

// share appends to lists that others append to, and reads them.
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

		// Nobody else brings what a Take could wait for.
		q.Seconds = 0
		return "own" + v.id, q
	})
}

// mix changes lists that others change, in every way.
func (v *visitor) mix() {
	v.change(60, 1, false, func(value string) (key string, q storetest.Request) {
		return fmt.Sprint("mixed", v.random.IntN(3)), DrawRequest(v.random, value)
	})
}

// change asks for what draw draws, one request at a time or up to most, and notes the answers. Where
// it is alone nobody else asks about the same lists.
func (v *visitor) change(requests, most int, alone bool,
	draw func(value string) (key string, q storetest.Request)) {
	if !v.hello() {
		return
	}

	for i := 0; i < requests; {
		var text strings.Builder
		var hears []func() error
		for range Pick(v.random, 1, 1, most) {
			i++
			key, q := draw(v.value(i, 0))
			text.WriteString(q.Line(key))

			// It counts as begun before it is sent: no server can have run it earlier.
			o := heard{Operation: storetest.Operation{Request: q}}
			hear := begin(v.r, key, &o.Operation, v.tick)
			isNext := alone && len(hears) > 0
			hears = append(hears, func() error {
				// Requests at once are run in their order: it begins behind the one before.
				if isNext {
					o.Invoked = v.tick()
				}
				err := hear()
				v.note(key, o, err)
				return err
			})
		}
		io.WriteString(v.conn, text.String())

		// Those that are not answered may have been run or not.
		for _, hear := range hears {
			if err := hear(); err != nil && err != ErrRefused {
				requests = 0
			}
		}
		Wait(Pick(v.random, 0, 0, time.Millisecond, time.Second))
	}
}

// note adds what was heard of a list to its history.
func (v *visitor) note(key string, o heard, err error) {
	if o.at = time.Now(); v.isVain() {
		o.Answered = 0
	}

	// A write of a client whose network does not stall is answered at once.
	if err == nil && o.Verb == "Put" && v.calm {
		v.checkMoved()
	}

	if err == ErrRefused {
		v.refuse(o.New, len(o.New) > 1) // or others send it, too
		return
	}

	// isVain takes the process's mutex, which kill takes before the world's: never the other way.
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	v.history[key] = append(v.history[key], o)
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

// Ask asks what a says of key, after Ack, and notes the answer. tick is everybody's clock.
func Ask(conn io.Writer, r *bufio.Reader, key string, a *storetest.Operation,
	tick func() int64) error {
	hear := begin(r, key, a, tick)
	io.WriteString(conn, a.Line(key))
	return hear()
}

// begin notes that a begins, and returns what notes its answer. A Take that has waited in vain has
// found nothing at its end, so that is where it begins.
func begin(r *bufio.Reader, key string, a *storetest.Operation, tick func() int64) (hear func() error) {
	a.Invoked = tick()

	// A timer marks the end of the wait: the answer comes later, and says nothing of when.
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

// ErrRefused is Ask's where the server has refused the request.
var ErrRefused = errors.New("it was refused")
