package world

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// take has other clients wait for a value, gives it to them or not, and checks what they get.
func (v *visitor) take() {
	if !v.hello() {
		return
	}

	for i := range 1 + v.random.IntN(5) {
		taker, ok := v.also()
		if !ok {
			return
		}

		if goesOn := v.takeOnce(i, taker); !goesOn {
			taker.conn.Close()
			return
		}
		taker.conn.Close()
	}
}

// takeOnce has taker wait for a value. A value that is given must come to it in time, and must go
// to nobody else. A taker that has gone must get nothing, and one that is given nothing must wait
// for exactly as long as it asked.
func (v *visitor) takeOnce(i int, taker *visitor) (goesOn bool) {
	r := v.random
	key, seconds := fmt.Sprint("taken", v.id), 2+r.IntN(5)
	ends := time.Now().Add(time.Duration(seconds) * time.Second)
	fmt.Fprintf(taker.conn, pick(r, "Take:%s:%d\n", "Take:%s:%d\nPing\n"), key, seconds)

	// After a second the Take has reached the server, because taker's network is calm.
	wait(time.Second)

	what := pick(r, "gives", "gives", "goes", "waits")
	if what == "goes" {
		// The break is below TLS, so the server hears no goodbye.
		taker.raw.BreakOff()
		wait(goneTime + time.Second)
	}

	value := v.value(i, 0)
	if what != "waits" {
		// Each of these requests can give a value to a Take that waits.
		give := pick(r, "Put:%s:%s", "Set:%s:%s", "Add:%s:%s", "Update:%s:x:%s", "Lease:%s:90:%s")
		if last, ok := v.ask(fmt.Sprintf(give, key, value)); !ok {
			// An error says that the value is not there; without an answer it may be there.
			v.refuse(value, strings.HasPrefix(last, ":ERROR"))
			return false
		}
	}

	// A value that is given after its taker has gone must stay.
	given := time.Now()
	if what == "goes" {
		if last, ok := v.ask("Count:" + key); ok && v.slack() == 0 && last != ":OK 1" {
			v.fail("a Take of a client that has gone took what came: %s", last)
		}

		// This client's next Take waits for the same key, so the key has to be empty.
		_, goesOn = v.ask("Delete:" + key)
		return goesOn
	}

	// The Take may have ended just before the value was given or just after: both are right.
	if what == "gives" && !given.Before(ends) {
		return false
	}
	return v.checkTaken(taker, key, value, what == "gives", given, ends)
}

// checkTaken wants that taker gets value if gives, and otherwise gets nothing when its time ends.
func (v *visitor) checkTaken(taker *visitor, key, value string, gives bool,
	given, ends time.Time) (goesOn bool) {
	lines, last, err := taker.reply()

	late := v.slack() + time.Second/2
	got := last == ":OK 1" && slices.Equal(lines, []string{key + ":" + value})
	switch now := time.Now(); {
	case err != nil || strings.HasPrefix(last, ":ERROR") || isClosed(v.closing):
		// A server that is closing, or that has refused the Take, owes it nothing.
		return false
	case gives && !got:
		v.fail("%s: who waits for %.40q gets %.60q, %s", v.id, value, lines, last)
	case gives && now.Sub(given) > late:
		v.fail("%s: a value comes %v after it was given", v.id, now.Sub(given))
	case !gives && (last != ":OK 0" || now.Before(ends) || now.Sub(ends) > late):
		v.fail("%s: a Take ends %v after its time, %s", v.id, now.Sub(ends), last)
	}

	// The value that answered a Take must not be there any more.
	if last, ok := v.ask("Count:" + key); ok && last != ":OK 0" {
		v.fail("%s: what was taken is there still: %s", v.id, last)
	}
	return true
}

// lease makes a key that expires after so many seconds, and reports whether the server has done so.
func (v *visitor) lease(key, value string, seconds int) bool {
	fmt.Fprintf(v.conn, pick(v.random, "Lease:%[1]s:%[2]d:%[3]s\n",
		"Set:%[1]s:%[3]s\nExpire:%[1]s:%[2]d\n"), key, seconds, value)

	// A Set and an Expire have two answers, a Lease has one: the PONG ends both.
	io.WriteString(v.conn, "Ping\n")
	for n, last := 0, ""; last != ":PONG"; n++ {
		var err error
		if _, last, err = v.reply(); err != nil || strings.HasPrefix(last, ":ERROR") {
			// Only the first request carries the value: it stays if the Expire is refused.
			v.refuse(value, err == nil && n == 0)
			return false
		}
	}
	return true
}

// end makes keys that expire, and checks that they are there until their time, and no longer. It
// also checks that keys which other clients and earlier processes have made are not there too long.
func (v *visitor) end() {
	r := v.random
	if !v.hello() {
		return
	}

	for i := range 6 {
		key, value := fmt.Sprintf("ends%s-%d", v.id, i), v.value(i, 0)
		seconds := 1 + r.IntN(4)
		lasts := time.Duration(seconds) * time.Second

		began := time.Now()
		if !v.lease(key, value, seconds) {
			return
		}

		// The server has begun to count somewhere between the request and its answer.
		earliest, latest := began.Add(lasts), time.Now().Add(lasts+expireTime)
		v.world.mu.Lock()
		v.ends[key] = latest
		v.world.mu.Unlock()

		for range 3 {
			wait(Between(r, 0, lasts))
			asked := time.Now()
			fmt.Fprintf(v.conn, "Get:%s\nKeys:ends\n", key)
			lines, _, err := v.reply()
			if err != nil {
				return
			}

			if now := time.Now(); len(lines) == 0 && now.Before(earliest) {
				v.fail("%s goes %v too early", key, earliest.Sub(now))
			} else if len(lines) > 0 && asked.After(latest) {
				v.fail("%s is there %v too long", key, asked.Sub(latest))
			}

			// Other keys must not be seen too long, either.
			if lines, _, err = v.reply(); err != nil {
				return
			}
			v.world.mu.Lock()
			for _, line := range lines {
				if end, known := v.ends[strings.TrimPrefix(line, ": ")]; known && asked.After(end) {
					// fail locks mu itself, so it has to run on a goroutine of its own.
					go v.fail("%s is there again, or still, %v after its time", line, asked.Sub(end))
				}
			}
			v.world.mu.Unlock()
		}
	}
}
