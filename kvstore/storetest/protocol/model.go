package protocol

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
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
	if len(line) > MaxLine {
		return ":ERROR line " + strconv.Itoa(number) + ": "
	}

	// A request about a list. In some requests the last field may hold colons.
	f := strings.Split(line, ":")
	fields := len(f)
	f = append(f, "", "", "")
	verb, key, rest := strings.ToLower(f[0]), f[1], strings.Join(f[2:max(fields, 2)], ":")
	q, n, out := storetest.Request{}, 0, ""
	ask := func(v string) {
		q.Verb = v
		var got []string
		n, got = q.Do(m, key)
		for _, v := range got {
			out += key + ":" + v + "\n"
		}
	}

	// These replies end in :OK n even before Ack.
	always := verb == "count" || verb == "keys" || verb == "dump" || line == "?" || verb == "help"
	switch has := key != ""; {
	case has && fields >= 3 && (verb == "put" || verb == "set" || verb == "add"):
		q.New = rest
		ask(strings.ToUpper(verb[:1]) + verb[1:])
	case has && fields >= 3 && verb == "remove":
		q.Old = rest
		ask("Remove")
	case has && fields == 4 && (verb == "update" || verb == "swap"):
		q.Old, q.New = f[2], f[3]
		ask(strings.ToUpper(verb[:1]) + verb[1:])
	case has && fields == 2 && (verb == "get" || verb == "delete" || verb == "count" || verb == "take"):
		ask(strings.ToUpper(verb[:1]) + verb[1:])
	case has && fields == 3 && verb == "take" && seconds(f[2], 1, 3600) > 0:
		if ask("Take"); n == 0 {
			m.now += seconds(f[2], 1, 3600)
		}
	case has && fields >= 4 && verb == "lease" && seconds(f[2], 1, maxSeconds) > 0:
		q.New = strings.Join(f[3:fields], ":")
		if ask("Add"); n == 1 {
			m.Expire(key, m.now+seconds(f[2], 1, maxSeconds))
		}
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
		return ":ERROR line " + strconv.Itoa(number) + ": "
	}

	if m.acked || always {
		out += fmt.Sprintf(":OK %d\n", n)
	}
	return out
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
