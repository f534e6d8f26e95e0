package main

import (
	"fmt"
	"strconv"
	"strings"

	"kvserver/kvstore"
)

// Query is one request on its way: parsed by a client's readFromClient, run by workLoop,
// and answered by that or, where it takes long, by deliver or list. One goroutine at a
// time has it; the queries and done channels pass it on.
type Query struct {
	key       string // also: the address of a failed TLS handshake
	value     string // also: an Update's old value, a Keys' prefix, a Ping's token, what is wrong
	queryType queryType
	kept      bool // keep was called
	bare      bool // on the head of a chain: it comes back without replies, its sender sees to them
	client    *Client
	newValue  string

	line   int       // of the client's input, counted from 1
	values []string  // what the run found: a key's list, or the lines of a Help, Stats, Keys or Dump
	few    [2]string // values, where it is short
	bytes  int       // of values, together
	n      int       // what the run did: the n of ":OK n"

	// A burst of requests travels as one chain, for the price of one send: the
	// channel carries the head and next leads through the rest.
	next *Query
	size int // of the reply, in bytes: an upper bound, or 0 if none is owed

	asker chan<- []counter // of a countAll, which has no client: one slot; closed if there are none
}

// queryType says what a Query asks for.
type queryType uint8

const (
	malformed  queryType = iota // a line that is no request; it keeps its place in the chain
	webRequest                  // the first line of an HTTP request
	put
	get
	del
	update
	set
	remove
	ack
	ping
	stats
	keys
	dump
	help
	quit

	collect         // a Keys or Dump asks for a snapshot
	pair            // a key's list in one, to be formatted for Dump
	listEnd         // the end of a Keys or Dump
	lastWord        // an error that is not dropped, such as a client's last line
	countActive     // CountActive asks
	countDropped    // CountDropped asks
	countAll        // who watches asks for every counter
	depart          // a goroutine of the client's has ended
	handshakeFailed // a TLS handshake failed, for the reason that value says

	queryTypes = iota
)

// verb is how a client asks for a queryType.
type verb struct {
	name, form, needs string // needs completes "Put needs ..."
	does              string // its line in Help
}

// verbs are the requests that a client can send. To add one:
//
//   - a queryType between put and quit, and its line here: Help, the hints of didYouMean and
//     the counters of Stats are made of these;
//   - parse, if its arguments are none that others have; run, for what it does to the store;
//   - in server.go: touch, if it has a key; runChain, if it may have a long list to search;
//   - if it writes: writes, memory, frees and makesLess say what it costs; a method of
//     KVStore, in Memory and in Durable (TestDurableHasEveryMethod fails without), with a
//     record of its own in the log (apply) and a fileVersion of its own, so that an older
//     program says that it is older;
//   - if its reply is more than an :OK: hasEnd, separator, replySize, keep; mayDrop, if a slow
//     reader may lose it; if it walks through the store: parse and submit in client.go;
//   - words that others have for it: dialects;
//   - a line in the README's table and in conversations of the tests (TestEveryRequest fails
//     without): the conversations are what tries the rest of this list.
var verbs = [...]verb{
	get: {"Get", "Get:key", "a key, without a colon in it",
		"the key's values, oldest first, as key:value lines"},
	put: {"Put", "Put:key:value", "a key and a value",
		"add value to the key's list; it may hold colons"},
	update: {"Update", "Update:key:old:new",
		"a key, an old and a new value, none with a colon in it",
		"take the first old out, add new at the end"},
	set: {"Set", "Set:key:value", "a key and a value",
		"make value the key's only one; it may hold colons"},
	remove: {"Remove", "Remove:key:value", "a key and a value",
		"take the first such value out; it may hold colons"},
	del: {"Delete", "Delete:key", "a key, without a colon in it",
		"remove the key and all its values"},
	ack:   {"Ack", "Ack", "nothing behind it", "from now on every request is answered: :OK n"},
	ping:  {"Ping", "Ping:token", "", "answers :PONG token when all before it is done"},
	stats: {"Stats", "Stats", "nothing behind it", "the server's counters"},
	keys: {"Keys", "Keys:prefix", "nothing behind it or a prefix, without a colon in it",
		"the keys (that begin with prefix), as : key lines"},
	dump: {"Dump", "Dump", "nothing behind it", "everything, as : Put:key:value lines"},
	help: {"Help", "Help", "nothing behind it", "this list; also: ?"},
	quit: {"Quit", "Quit", "nothing behind it", "close the connection; also: exit"},
}

// helpLines is the answer to Help.
var helpLines = func() (lines []string) {
	for t := put; t <= quit; t++ {
		lines = append(lines, fmt.Sprintf("%-20s %s", verbs[t].form, verbs[t].does))
	}
	return append(lines,
		"Verbs in any letter case, one request a line. Writes are silent until Ack.",
		"A line that starts with a colon is from the server: never data.")
}()

// maxQuoted is how many bytes of a client's line an error quotes.
const maxQuoted = 40

// parse makes q the request that line is: without its line end, and not empty.
// A line that is none makes q malformed, its value saying why. The fields are
// substrings of line.
func (q *Query) parse(line string) {
	word, rest, colon := strings.Cut(line, ":")
	q.queryType = lookUp(word)
	ok := !colon
	switch q.queryType {
	case malformed:
		q.value = "unknown request " + quote(line) + didYouMean(line)
		return
	case put, set, remove:
		q.key, q.value, ok = strings.Cut(rest, ":")
		ok = ok && q.key != ""
	case get, del:
		q.key = rest
		ok = isKey(rest)
	case update:
		var middle, last bool
		q.key, rest, middle = strings.Cut(rest, ":")
		q.value, q.newValue, last = strings.Cut(rest, ":")
		ok = middle && last && q.key != "" && strings.IndexByte(q.newValue, ':') < 0
	case keys:
		q.value, ok = rest, strings.IndexByte(rest, ':') < 0
	case ping:
		q.value, ok = rest, true
	}
	if !ok {
		v := verbs[q.queryType]
		why := v.name + " needs " + v.needs + ", as in " + v.form + "; got " + quote(line)
		if key, _, more := strings.Cut(rest, ":"); more && key != "" &&
			(q.queryType == get || q.queryType == del) {
			why += "; a Put like that wrote to the key " + quote(key) +
				", for a key ends at its first colon"
		}
		q.refuse(why)
	}
}

// refuse makes q malformed, for the reason why.
func (q *Query) refuse(why string) {
	q.queryType, q.key, q.value, q.newValue = malformed, "", why, ""
}

// isKey tells whether s can be a key.
func isKey(s string) bool { return s != "" && strings.IndexByte(s, ':') < 0 }

// lookUp returns the queryType of a verb in any letter case, malformed if word
// is none.
func lookUp(word string) queryType {
	switch {
	case word == "?":
		return help
	case equalFold(word, "exit"):
		return quit
	}
	for t := put; t <= quit; t++ {
		if equalFold(word, verbs[t].name) {
			return t
		}
	}
	return malformed
}

// equalFold tells whether a and b are equal but for the case of ASCII letters. (With
// strings.EqualFold a request takes half as long again to parse, 3 % of a busy server's time.)
func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && (a[i]^b[i] != 0x20 || a[i]|0x20 < 'a' || a[i]|0x20 > 'z') {
			return false
		}
	}
	return true
}

// beginsRequest tells whether line begins as one of our requests.
func beginsRequest(line string) bool {
	word, _, _ := strings.Cut(line, ":")
	return lookUp(word) != malformed
}

// isHTTP tells whether line is the first of an HTTP/1 request (RFC 9112).
func isHTTP(line string) bool {
	return strings.HasSuffix(line, " HTTP/1.1") || strings.HasSuffix(line, " HTTP/1.0")
}

// badRequest is what a browser is told.
const badRequest = "HTTP/1.1 400 Bad Request\r\n" +
	"Content-Type: text/plain\r\n" +
	"Connection: close\r\n" +
	"\r\n" +
	"This is a key-value server and speaks no HTTP: connect with nc and type Help.\n"

// quote is %q of s, cut to maxQuoted bytes.
func quote(s string) string {
	if len(s) > maxQuoted {
		return strconv.Quote(s[:maxQuoted]) + "..."
	}
	return strconv.Quote(s)
}

// dialects are words that other programs and habits have for our verbs.
var dialects = map[string]queryType{
	"add": put, "append": put, "insert": put, "store": put, "push": put, "rpush": put,
	"read": get, "fetch": get, "mget": get, "lrange": get,
	"rem": remove, "lrem": remove, "del": del, "rm": del, "unset": del, "unlink": del,
	"replace": update, "assign": set, "change": update,
	"list": keys, "ls": keys, "scan": keys, "export": dump, "backup": dump,
	"info": stats, "status": stats, "commands": help, "man": help,
	"bye": quit, "close": quit, "logout": quit, "q": quit,
}

// didYouMean completes "unknown request ..." with the request that line may
// have been meant to be. It looks at no more of a line than a hint can show.
func didYouMean(line string) string {
	const gap = ": \t"
	line = strings.TrimPrefix(line, "\ufeff") // with which files of Windows may begin
	const most = 2 * maxQuoted
	whole := len(line) <= most
	line = strings.Trim(line[:min(len(line), most)], gap)
	word, rest := line, ""
	if i := strings.IndexAny(line, gap); i >= 0 {
		word, rest = line[:i], strings.TrimLeft(line[i:], gap)
	}
	t := lookUp(word)
	if t == malformed {
		t = dialects[strings.ToLower(word)]
	}
	for u := put; u <= quit && t == malformed; u++ {
		if oneSlip(strings.ToLower(word), strings.ToLower(verbs[u].name)) {
			t = u
		}
	}
	if t == malformed {
		return "; Help lists the requests"
	}
	// Offer the client's own request where its arguments fit and can be shown.
	if n := strings.Count(verbs[t].form, ":"); whole && n > 0 && t != ping && t != keys {
		args := strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(gap, r) })
		if t != update && len(args) > n && n > 1 {
			args = []string{args[0], strings.TrimLeft(rest[len(args[0]):], gap)}
		}
		try := verbs[t].name + ":" + strings.Join(args, ":")
		if len(args) == n && len(try) <= maxQuoted && strconv.Quote(try) == `"`+try+`"` {
			return "; did you mean " + try + " ?"
		}
	}
	return "; did you mean " + verbs[t].form + " ?"
}

// oneSlip tells whether a becomes b by one letter more, less or other, or by
// two neighbours changing places: distance 1 as in Damerau, "A technique for
// computer detection and correction of spelling errors", 1964.
func oneSlip(a, b string) bool {
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	a, b = a[i:], b[i:]
	switch len(a) - len(b) {
	case 1:
		return a[1:] == b
	case -1:
		return a == b[1:]
	case 0:
		return a != "" && (a[1:] == b[1:] || len(a) > 1 && a[0] == b[1] && a[1] == b[0] &&
			a[2:] == b[2:])
	}
	return false
}

// run does what a request asks for to db, and keeps what came of it.
func (q *Query) run(db kvstore.KVStore) {
	switch q.queryType {
	case put:
		db.Put(q.key, q.value)
		q.n = 1
	case get:
		if viewer, ok := db.(kvstore.Viewer); ok {
			q.values = viewer.View(q.few[:0], q.key)
		} else {
			q.values = db.Get(q.key)
		}
		if q.n = len(q.values); q.n <= fewValues {
			q.bytes = sum(q.values)
		} else {
			q.measure(db)
		}
	case del:
		q.n = db.Delete(q.key)
	case update:
		if db.Update(q.key, q.value, q.newValue) {
			q.n = 1
		}
	case set:
		q.n = db.Set(q.key, q.value)
	case remove:
		if db.Remove(q.key, q.value) {
			q.n = 1
		}
	case help:
		q.values = helpLines
		q.n = len(q.values)
		q.bytes = sum(q.values)
	}
}

// keep makes values something that may be kept for long: a short list shares memory with
// others (kvstore.Viewer).
func (q *Query) keep() {
	if q.queryType == get && !q.kept && len(q.values) > 0 && q.bytes <= kvstore.ViewMost {
		q.kept = true
		q.values = kvstore.CloneAll(q.values)
		q.few = [2]string{}
	}
}

// fewValues is how many values are measured one by one. Of a longer list the store
// is asked: to measure a hundred thousand values, only to drop the reply, would
// make everybody wait.
const fewValues = 16

// measure sets bytes to what the values take.
func (q *Query) measure(db kvstore.KVStore) {
	if m, ok := db.(kvstore.Measurer); ok {
		q.bytes = int(m.Measure(q.key))
	} else {
		q.bytes = sum(q.values)
	}
}

// sum returns how many bytes values have together.
func sum(values []string) (bytes int) {
	for _, v := range values {
		bytes += len(v)
	}
	return bytes
}

// writes tells whether q may change the store.
func (q *Query) writes() bool {
	return q.queryType == put || q.queryType == update || q.queryType == set || q.frees()
}

// frees tells whether q only takes something away.
func (q *Query) frees() bool { return q.queryType == del || q.queryType == remove }

// memory is about how many bytes more a write may take.
func (q *Query) memory() int64 {
	added := q.value
	if q.queryType == update {
		added = q.newValue
	}
	return int64(len(q.key)+len(added)) + memoryPerPair
}

// makesLess tells whether a write leaves db no larger than it is.
func (q *Query) makesLess(db kvstore.KVStore) bool {
	has, isHaser := db.(kvstore.Haser)
	measure, isMeasurer := db.(kvstore.Measurer)
	switch q.queryType {
	case update:
		return isHaser && len(q.newValue) <= len(q.value) && has.Has(q.key, q.value)
	case set:
		before := int64(0)
		if isMeasurer {
			before = measure.Measure(q.key)
		}
		isThere := before > 0 || isHaser && has.Has(q.key, "") // a new key would be more
		return isThere && int64(len(q.value)) <= before
	}
	return false
}

// head stands before q's key in each line. The server's own lines have no key.
func (q *Query) head() string {
	if q.queryType == pair {
		return ": Put:"
	}
	return ""
}

// separator stands between the key and a value.
func (q *Query) separator() string {
	if q.queryType == get || q.queryType == pair {
		return ":"
	}
	return ": "
}

// lineSize is how many bytes appendLine appends, at most.
func (q *Query) lineSize(value string) int { return q.lineExtra() + len(value) }

// lineExtra is how many bytes appendLine appends beside the value, at most.
func (q *Query) lineExtra() int { return len(q.key) + len(": Put:") + len(":") + len("\r\n") }

// lineEnd ends the line of value.
func (q *Query) lineEnd(value string) string {
	if q.queryType == pair && trimCR(value) != value {
		return "\r\n" // the CR is to be taken off when the line comes back as a request
	}
	return "\n"
}

// parts are what the line for one of q.values consists of.
func (q *Query) parts(value string) [5]string {
	return [...]string{q.head(), q.key, q.separator(), value, q.lineEnd(value)}
}

// appendLine appends the line for one of q.values.
func (q *Query) appendLine(b []byte, value string) []byte {
	if q.queryType != get { // almost every line is a Get's
		for _, text := range q.parts(value) {
			b = append(b, text...)
		}
		return b
	}
	b = append(b, q.key...)
	b = append(b, ':')
	b = append(b, value...)
	return append(b, '\n')
}

// More bytes than the last line of a reply takes: ":OK n", or the words and numbers
// beside the text that it carries.
const (
	maxOK      = 32
	maxNumbers = 64
)

// replySize is how many bytes q's reply takes at most: 0 if it is owed none.
func (q *Query) replySize(acked bool) (size int) {
	size = q.bytes + len(q.values)*q.lineExtra()
	if (acked || q.queryType != get) && q.hasEnd(acked) {
		size += q.endSize()
	}
	return size
}

// hasEnd tells whether q's reply has a last line of its own.
func (q *Query) hasEnd(acked bool) bool {
	switch q.queryType {
	case malformed, webRequest, lastWord, ping, stats, help, listEnd:
		return true
	case keys, dump, pair: // it goes on behind it, to end with a listEnd
		return false
	}
	return acked
}

// endSize is how many bytes appendEnd appends, at most.
func (q *Query) endSize() int {
	switch q.queryType {
	case webRequest:
		return len(badRequest)
	case malformed, lastWord, ping:
		return maxNumbers + len(q.value)
	}
	return maxOK
}

// appendEnd appends the last line of q's reply, if it has one: dropped replies
// are a Ping's to tell.
func (q *Query) appendEnd(b []byte, acked bool, dropped int) []byte {
	switch {
	case q.queryType == webRequest:
		return append(b, badRequest...)
	case q.queryType == malformed || q.queryType == lastWord:
		b = append(b, ":ERROR line "...)
		b = strconv.AppendInt(b, int64(q.line), 10)
		b = append(b, ": "...)
		b = append(b, q.value...)
	case q.queryType == ping:
		b = append(b, ":PONG"...)
		if q.value != "" {
			b = append(b, ' ')
			b = append(b, q.value...)
		}
		if dropped > 0 {
			b = append(b, " dropped "...)
			b = strconv.AppendInt(b, int64(dropped), 10)
		}
	case q.hasEnd(acked):
		b = append(b, ":OK "...)
		b = strconv.AppendInt(b, int64(q.n), 10)
	default:
		return b
	}
	return append(b, '\n')
}

// mayDrop tells whether a slow reader may lose q's reply.
func (q *Query) mayDrop(acked bool) bool {
	return !acked && (q.queryType == get || q.queryType == malformed)
}
