package protocol

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"kvserver/kvstore/storetest"
)

// maxSeconds is the longest time after which a key may expire.
const maxSeconds = 4_000_000_000

// Model is the model of the protocol; storetest.Model is that of the store.
type Model struct {
	storetest.Model
	help  []string
	now   int64 // in seconds; it advances when a Take waits
	acked bool
}

// NewModel returns the model of a connection to an empty server with this Help.
func NewModel(help []string) *Model {
	return &Model{Model: storetest.NewModel(), help: help, now: 1}
}

// Answer returns the server's reply to one line that is not blank.
func (m *Model) Answer(number int, line string) string {
	for key, ok := m.NextDue(m.now); ok; key, ok = m.NextDue(m.now) {
		m.Delete(key)
	}

	refused := fmt.Sprintf(":ERROR line %d: ", number)
	if len(line) > MaxLine {
		return refused
	}

	f := strings.Split(line, ":")
	fields, verb, key := len(f), strings.ToLower(f[0]), strings.Join(f[1:min(len(f), 2)], "")
	n, out, isOne := m.ofList(verb, f)

	// These replies end in :OK n even before Ack.
	always := verb == "count" || verb == "keys" || verb == "dump" || line == "?" || verb == "help"

	switch has := key != ""; {
	case isOne:

	// A key's time.
	case has && fields == 3 && verb == "expire" && seconds(f[2], 0, maxSeconds) >= 0:
		at := m.now + seconds(f[2], 0, maxSeconds)
		if at == m.now {
			at = 0 // it does not expire any more
		}
		n = once(m.Expire(key, at))
	case has && fields == 2 && verb == "expire":
		n, always = min(1, m.Count(key)), true
		if at, ok := m.Deadline(key); ok {
			out = fmt.Sprintf(": %d\n", at-m.now)
		}

	// Requests without a key.
	case line == "?" || verb == "help" && fields == 1:
		n, out = len(m.help), ": "+strings.Join(m.help, "\n: ")+"\n"
	case (verb == "keys" || verb == "dump") && fields <= 2:
		n, out = m.list(key, verb == "dump")
	case verb == "ack" && fields == 1:
		m.acked = true
	case verb == "ping" && line[4:] != "" && line[4:] != ":":
		return ":PONG " + line[len("ping:"):] + "\n"
	case verb == "ping":
		return ":PONG\n"
	case (verb == "quit" || verb == "exit") && fields == 1:
	default:
		return refused
	}

	if m.acked || always {
		out += fmt.Sprintf(":OK %d\n", n)
	}
	return out
}

// ofList does a request about the values of a key, if it is one. f has the line's fields. n is what
// the :OK line says, and out are the lines before it.
func (m *Model) ofList(verb string, f []string) (n int, out string, isOne bool) {
	fields := len(f)
	if verb == "" || fields < 2 || f[1] == "" {
		return 0, "", false
	}

	// In some requests the last field may hold colons.
	key, q := f[1], storetest.Request{Verb: strings.ToUpper(verb[:1]) + verb[1:]}
	rest := func(from int) string { return strings.Join(f[from:], ":") }

	wait := int64(0) // of a Take, in seconds
	switch {
	case fields >= 3 && (verb == "put" || verb == "set" || verb == "add"):
		q.New = rest(2)
	case fields >= 3 && verb == "remove":
		q.Old = rest(2)
	case fields == 4 && (verb == "update" || verb == "swap"):
		q.Old, q.New = f[2], f[3]
	case fields == 2 && (verb == "get" || verb == "delete" || verb == "count" || verb == "take"):
	case fields == 3 && verb == "take" && seconds(f[2], 1, 3600) > 0:
		wait = seconds(f[2], 1, 3600)
	case fields >= 4 && verb == "lease" && seconds(f[2], 1, maxSeconds) > 0:
		q.Verb, q.New = "Add", rest(3)
	default:
		return 0, "", false
	}

	n, got := q.Do(m, key)
	for _, v := range got {
		out += key + ":" + v + "\n"
	}

	// Nobody else puts a value while a Take waits.
	switch {
	case verb == "lease" && n == 1:
		m.Expire(key, m.now+seconds(f[2], 1, maxSeconds))
	case n == 0:
		m.now += wait
	}
	return n, out, true
}

// list returns the answer to Keys or Dump, and its number of lines.
func (m *Model) list(prefix string, dumps bool) (n int, out string) {
	all := maps.Collect(m.All())
	for _, key := range slices.Sorted(maps.Keys(all)) {
		switch at, ends := m.Deadline(key); {
		case !strings.HasPrefix(key, prefix):
		case !dumps:
			out += ": " + key + "\n"
		default:
			for _, v := range all[key] {
				if strings.HasSuffix(v, "\r") || strings.HasSuffix(v, "\r\x00") {
					v += "\r"
				}
				out += ": Put:" + key + ":" + v + "\n"
			}
			if ends {
				out += fmt.Sprintf(": Expire:%s:%d\n", key, at-m.now)
			}
		}
	}
	return strings.Count(out, "\n"), out
}

// seconds returns the number in text, or -1 if it is none from least to most.
func seconds(text string, least, most int64) (n int64) {
	for _, digit := range text {
		if n = 10*n + int64(digit-'0'); digit < '0' || digit > '9' || n > most {
			return -1
		}
	}
	if text == "" || n < least {
		return -1
	}
	return n
}

// once returns 1 for what was done.
func once(done bool) (n int) {
	if done {
		n = 1
	}
	return n
}
