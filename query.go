package main

import (
	"fmt"
	"iter"
	"math"
	"strconv"
	"strings"
	"time"

	"kvserver/kvstore"
)

// Query is one request on its way: readFromClient parses it, workLoop runs it, and workLoop or
// deliver answers it, or readFromClient if it is a Keys or Dump. Other Queries are messages to
// workLoop, such as that a goroutine has ended, or parts of the reply to a Keys or Dump. One
// goroutine at a time owns a Query; the channels queries and done, and go deliver, pass it on.
type Query struct {
	key string // also: the address of a failed TLS handshake

	// The arguments after the key: value and newValue. A Get, a Take and a pair have none, so up
	// to two values of their result are made in this place.
	args [2]string

	queryType queryType
	kept      bool   // keep has cloned the values
	seconds   uint32 // of an Expire or a Lease, or for which a Take waits; 0: it does not wait
	client    *Client

	line   int      // its number in the client's input, counted from 1
	values []string // the result: a list, a Take's value, seconds, or lines of Help, Stats, Keys
	bytes  int64    // of all values together
	n      int      // what was done, as in ":OK n"

	// The requests of a burst travel as one chain or more, each for the price of one send: the
	// channel carries the chain's head, and next links the rest.
	next *Query
	size int64 // upper bound of the reply, in bytes; 0 if none is owed; negative if it was shed

	*special // nil for most requests
}

// value is the argument after the key, or the old one of two. It is also a prefix, a Ping's token,
// an error, the response to another protocol, or why a handshake failed.
func (q *Query) value() string { return q.args[0] }

// newValue is what an Update or a Swap adds.
func (q *Query) newValue() string { return q.args[1] }

// special has the fields that few requests need. They are not part of Query because chains are
// long, and a smaller Query is less memory to go through.
type special struct {
	snapshot kvstore.Snapshot // from which a Keys or Dump is answered; nil: the store makes none

	// From workLoop to the sender of a countAll, which is no client. It has one slot, and is closed
	// if the store has failed.
	asker chan<- []counter
}

// queryType says what a Query asks for. It is the index of a row in verbs.
type queryType uint8

const (
	malformed queryType = iota // a line that is no request, or was refused; it keeps its place
	foreign                    // a first line of another protocol; value is the whole response

	put // from put to quit: what a client can ask for
	get
	del
	update
	set
	remove
	swap
	add
	lease
	take
	count
	expire
	ack
	ping
	stats
	keys
	dump
	help
	quit

	timeLeft        // an Expire without seconds
	pair            // a key with its whole list, in the reply to a Dump
	pairTime        // the seconds until that key expires
	listEnd         // the end of a Keys or Dump
	lastWord        // an error that is not dropped, such as the last line to a client
	countActive     // sent by CountActive
	countDropped    // sent by CountDropped
	countAll        // an HTTP request asks for all counters
	depart          // a goroutine of the client has ended
	stopTake        // a Take's time is over; if its turn has not come, it may still look once
	dropTake        // a Take is to take nothing: its client has gone, or the server closes
	handshakeFailed // a TLS handshake has failed; value says why

	queryTypes = iota
)

// verb is a row of verbs: everything about one queryType. The zero value does nothing to the store,
// takes no argument, and is answered by an :OK after Ack.
type verb struct {
	name, form, needs string // needs completes "Put needs ..."
	does              string // the verb's line in Help

	// parse takes the arguments from the text after the verb's colon, and reports whether they are
	// right. nil: the verb takes no arguments.
	parse func(q *Query, arguments string) bool

	effect   effect // on the key's list
	searches bool   // it may search a long list, which takes long
	lists    bool   // it walks the whole store, and is a chain of its own

	// run does the request to the store, and keeps the result in q. It runs on workLoop's
	// goroutine, and now is the clock. If run is nil, there is nothing to do, or the server does
	// it.
	run func(q *Query, db kvstore.Store, now clock)

	// shrinks reports whether a write would leave the store no larger than it is. nil: it would
	// make the store larger, unless effect is frees. Only -max-memory asks: on a full disk only
	// removes counts, because each write makes the log longer (admit).
	shrinks func(q *Query, db kvstore.Store) bool

	head, separator string // of each line with a value: before the key, and between key and value
	ending          ending // of the reply
	mayDrop         bool   // before Ack a slow reader may lose the reply
	tells           bool   // the reply's end is what the client asks for, so -c shows it
	tellsNone       bool   // -c shows an end of ":OK 0": there is no such key
}

// clock returns the wall clock's time, which may jump.
type clock func() time.Time

// effect is what a request does to the list of its key.
type effect uint8

const (
	noKey    effect = iota // none: the request has no key
	reads                  // changes nothing; a Get's values are good for a short time (View)
	adds                   // adds value, or a deadline
	replaces               // takes value out and adds newValue
	frees                  // only takes something away
)

// ending is the last line of a reply.
type ending uint8

const (
	endAcked   ending = iota // ":OK n" after Ack, otherwise none
	endOK                    // ":OK n", also before Ack: n lines came, or n values or keys exist
	endPong                  // ":PONG"
	endError                 // ":ERROR line N: why"
	endForeign               // a response of another protocol
	endFollow                // none: a listEnd follows
)

// needsKey is what a request with one argument, a key, needs.
const needsKey = "a key, without a colon in it"

// verbs has a row for each queryType that is parsed, run or answered. (Other places that know a
// verb by name: Stats and Expire in server.go; Take, Quit, Ack, Ping and Keys in client.go; here
// Put in parse and in pair's row, Take in mayWait, Expire in parseExpire and in pairTime's row, Get
// in appendLine, Delete in removes, Help in init, Help and Quit in lookUp, and what other servers
// call it in dialects; Ack, Ping and Quit in main.go.)
// To add a verb, add:
//
//   - a queryType between put and quit, and a row here: Help, the hints of didYouMean and the
//     counters of Stats are made from the rows;
//   - if it writes something that no method of kvstore.Store does: a method there, in Memory and in
//     durable.Store (otherwise TestDurableHasEveryMethod fails), with its own record in the log
//     (apply) and its own fileVersion, so that an older program can say that it is too old; and in
//     plain, so that any KVStore has it;
//   - a case in the models of the tests: storetest's Model, operations and Request.Do, DrawRequest
//     of the worlds, and Answer of package protocol (otherwise FuzzConversation fails);
//   - the words that other programs use for it, in dialects; a name has 8 letters at most (pack);
//   - a line in the README's table, in its lists of replies that always end in ":OK n" and of what
//     n counts, in the row of -c if it tells, and in the conversations of the tests (otherwise
//     TestEveryRequest fails); the conversations test everything else;
//   - its counter in the list of protocol.Stats.
var verbs = [queryTypes]verb{
	put: {name: "Put", form: "Put:key:value", needs: "a key and a value",
		does:  "add value to the key's list, colons allowed",
		parse: parseKeyValue, effect: adds,
		run: func(q *Query, db kvstore.Store, _ clock) { db.Put(q.key, q.value()); q.n = 1 }},

	get: {name: "Get", form: "Get:key", needs: needsKey,
		does:  "the key's values, oldest first, as key:value lines",
		parse: parseKey, effect: reads, run: runGet, separator: ":", mayDrop: true},

	del: {name: "Delete", form: "Delete:key", needs: needsKey,
		does:  "remove the key and all its values",
		parse: parseKey, effect: frees,
		run: func(q *Query, db kvstore.Store, _ clock) { q.n = db.Delete(q.key) }},

	update: {name: "Update", form: "Update:key:old:new",
		needs: "a key, an old and a new value, none with a colon in it",
		does:  "remove the first old, add new at the end",
		parse: parseKeyOldNew, effect: replaces, searches: true, shrinks: updateShrinks,
		run: func(q *Query, db kvstore.Store, _ clock) {
			q.n = times(db.Update(q.key, q.value(), q.newValue()))
		}},

	set: {name: "Set", form: "Set:key:value", needs: "a key and a value",
		does:  "replace the key's list by value, colons allowed",
		parse: parseKeyValue, effect: adds, shrinks: setShrinks,
		run: func(q *Query, db kvstore.Store, _ clock) { q.n = db.Set(q.key, q.value()) }},

	remove: {name: "Remove", form: "Remove:key:value", needs: "a key and a value",
		does:  "remove the first equal value, colons allowed",
		parse: parseKeyValue, effect: frees, searches: true, tells: true,
		run: func(q *Query, db kvstore.Store, _ clock) { q.n = times(db.Remove(q.key, q.value())) }},

	swap: {name: "Swap", form: "Swap:key:old:new",
		needs: "a key, an old and a new value, none with a colon in it",
		does:  "Update if old is there (after Ack: :OK 1 if so, :OK 0 if not)",
		parse: parseKeyOldNew, effect: replaces, searches: true, shrinks: swapShrinks, tells: true,
		run: func(q *Query, db kvstore.Store, _ clock) {
			q.n = times(db.Has(q.key, q.value()) && db.Update(q.key, q.value(), q.newValue()))
		}},

	add: {name: "Add", form: "Add:key:value", needs: "a key and a value",
		does:  "Put if the key has no value (after Ack: :OK 1 if so, :OK 0 if not)",
		parse: parseKeyValue, effect: adds, shrinks: addShrinks, tells: true,
		run: func(q *Query, db kvstore.Store, _ clock) {
			if db.Count(q.key) == 0 {
				db.Put(q.key, q.value())
				q.n = 1
			}
		}},

	lease: {name: "Lease", form: "Lease:key:seconds:value",
		needs: "a key, seconds from 1 to 4000000000, and a value",
		does:  "Add and Expire in one step: a lock that frees itself",
		parse: parseLease, effect: adds, shrinks: addShrinks, tells: true,
		run: func(q *Query, db kvstore.Store, now clock) {
			if q.mayExpire(db) && db.Count(q.key) == 0 {
				db.PutUntil(q.key, q.value(), q.deadline(now))
				q.n = 1
			}
		}},

	take: {name: "Take", form: "Take:key:seconds",
		needs: "a key, and seconds from 1 to 3600 or nothing",
		does:  "answer and remove the oldest value; wait seconds for it",
		parse: parseTake, effect: frees, separator: ":",
		run: func(q *Query, db kvstore.Store, _ clock) {
			value, ok := db.Take(q.key)
			if q.n = times(ok); ok {
				q.values, q.bytes = append(q.args[:0], value), int64(len(value))
			}
		}},

	count: {name: "Count", form: "Count:key", needs: needsKey,
		does:  "answers :OK n: how many values the key has",
		parse: parseKey, effect: reads, ending: endOK, tells: true,
		run: func(q *Query, db kvstore.Store, _ clock) { q.n = db.Count(q.key) }},

	expire: {name: "Expire", form: "Expire:key:seconds",
		needs: "a key, and seconds up to 4000000000 or nothing",
		does:  "delete the key after seconds; 0: never; none: time left",
		parse: parseExpire, effect: adds, shrinks: expireShrinks, tellsNone: true,
		run: func(q *Query, db kvstore.Store, now clock) {
			if q.mayExpire(db) {
				q.n = times(db.Expire(q.key, q.deadline(now)))
			}
		}},

	ack: {name: "Ack", form: "Ack", needs: "nothing behind it",
		does: "from now on every request is answered: :OK n"},

	ping: {name: "Ping", form: "Ping:token",
		does:  "answers :PONG token when all before it is done",
		parse: parseToken, ending: endPong, tells: true},

	stats: {name: "Stats", form: "Stats", needs: "nothing behind it",
		does: "the server's counters", separator: ": ", ending: endOK},

	keys: {name: "Keys", form: "Keys:prefix",
		needs: "nothing behind it or a prefix, without a colon in it",
		does:  "the keys (that begin with prefix), as : key lines",
		parse: parsePrefix, lists: true, run: runList, separator: ": ", ending: endFollow},

	dump: {name: "Dump", form: "Dump:prefix",
		needs: "nothing behind it or a prefix, without a colon in it",
		does:  "all (of keys with prefix), as : Put: and : Expire: lines",
		parse: parsePrefix, lists: true, run: runList, ending: endFollow},

	help: {name: "Help", form: "Help", needs: "nothing behind it", does: "this list; also: ?",
		separator: ": ", ending: endOK},

	quit: {name: "Quit", form: "Quit", needs: "nothing behind it",
		does: "close the connection; also: exit"},

	malformed: {ending: endError, mayDrop: true},
	foreign:   {ending: endForeign},
	timeLeft:  {effect: reads, run: runTimeLeft, separator: ": ", ending: endOK},
	pair:      {head: ": Put:", separator: ":", ending: endFollow},
	pairTime:  {head: ": Expire:", separator: ":", ending: endFollow},
	listEnd:   {ending: endOK},
	lastWord:  {ending: endError},
}

// row returns the row of q's queryType.
func (q *Query) row() *verb { return q.queryType.row() }

func (t queryType) row() *verb { return &verbs[t] }

// helpLines are the lines of the reply to Help.
var helpLines = func() (lines []string) {
	for t := put; t <= quit; t++ {
		lines = append(lines, fmt.Sprintf("%-20s %s", verbs[t].form, verbs[t].does))
	}
	return append(lines,
		"Letter case is free, one request a line. Writes are silent until Ack.",
		"A line that starts with a colon is from the server: never data.")
}()

// helpLines is made from verbs, so the row of Help cannot name it without an initialization cycle.
func init() {
	verbs[help].run = func(q *Query, _ kvstore.Store, _ clock) { q.answer(helpLines) }
}

// ---- parsing

// maxQuoted is how many bytes of a client's line each quote in an error has, at most.
const maxQuoted = 40

// parse makes q the request in line, which has no line end and is not empty. If line is no request
// q becomes malformed, and its value says why. q's other texts are substrings of line.
func (q *Query) parse(line string) {
	word, arguments, colon := cutColon(line)

	// An unknown word may be a typing error, or another program's verb, so the error has a hint.
	q.queryType = lookUp(word)
	if q.queryType == malformed {
		q.refuse("unknown request " + quote(line) + didYouMean(line))
		return
	}

	// The verb and its arguments are right.
	v := q.row()
	if v.parse == nil && !colon || v.parse != nil && v.parse(q, arguments) {
		return
	}

	// A key with a colon in it is the usual mistake. A Put with it wrote to another key: say which.
	why := v.name + " needs " + v.needs + ", as in " + v.form + "; got " + quote(line)
	if key, _, _ := strings.Cut(arguments, ":"); key != "" && v.needs == needsKey {
		why += "; a Put like that wrote to the key " + quote(key) +
			", for a key ends at its first colon"
	}

	q.refuse(why)
}

// cutColon is strings.Cut at the first colon. It is faster: strings.Cut would cost every request
// two more function calls.
func cutColon(s string) (before, after string, found bool) {
	if i := strings.IndexByte(s, ':'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// The functions below parse the forms of arguments that verbs have.

func parseKey(q *Query, arguments string) bool {
	q.key = arguments
	return arguments != "" && strings.IndexByte(arguments, ':') < 0
}

// parseKeyValue allows colons in the value.
func parseKeyValue(q *Query, arguments string) (ok bool) {
	q.key, q.args[0], ok = cutColon(arguments)
	return ok && q.key != ""
}

func parseKeyOldNew(q *Query, arguments string) bool {
	key, values, _ := cutColon(arguments)
	oldValue, newValue, ok := cutColon(values)

	// With a third colon nobody could tell where the old value ends.
	q.key, q.args = key, [2]string{oldValue, newValue}
	return ok && key != "" && strings.IndexByte(newValue, ':') < 0
}

// maxSeconds is the longest time after which a key can expire: over a hundred years.
const maxSeconds = 4_000_000_000

func parseLease(q *Query, arguments string) bool {
	key, rest, _ := cutColon(arguments)
	seconds, value, ok := cutColon(rest)

	q.key, q.args[0] = key, value
	return ok && key != "" && q.parseSeconds(seconds, 1, maxSeconds)
}

// maxTakeSeconds is the longest time that a Take can wait: an hour.
const maxTakeSeconds = 3600

func parseTake(q *Query, arguments string) bool {
	key, seconds, has := cutColon(arguments)
	q.key = key
	return key != "" && (!has || q.parseSeconds(seconds, 1, maxTakeSeconds))
}

// parseExpire makes an Expire without seconds a timeLeft.
func parseExpire(q *Query, arguments string) bool {
	key, seconds, has := cutColon(arguments)
	q.key = key
	if !has {
		q.queryType = timeLeft
	}
	return key != "" && (!has || q.parseSeconds(seconds, 0, maxSeconds))
}

// parseSeconds parses a decimal number from least to most.
func (q *Query) parseSeconds(text string, least, most uint64) bool {
	n, err := strconv.ParseUint(text, 10, 32)
	q.seconds = uint32(n)
	return err == nil && n >= least && n <= most
}

// parsePrefix treats a missing prefix as an empty one.
func parsePrefix(q *Query, arguments string) bool {
	q.args[0] = arguments
	return strings.IndexByte(arguments, ':') < 0
}

// parseToken allows any token.
func parseToken(q *Query, arguments string) bool {
	q.args[0] = arguments
	return true
}

// refuse makes q malformed, for the reason why.
func (q *Query) refuse(why string) {
	q.queryType, q.key, q.args, q.seconds = malformed, "", [2]string{why}, 0
}

// lookUp returns the queryType of the verb that word is, in any letter case; malformed if it is no
// verb.
func lookUp(word string) queryType {
	// There are so few names that a hash table would not be faster. (Without [:] the loop would
	// first copy them.)
	packed := pack(word)
	for t, name := range names[:] {
		if name == packed {
			return queryType(t)
		}
	}

	// Two verbs have a second name.
	switch {
	case word == "?":
		return help
	case packed == pack("exit"):
		return quit
	}
	return malformed
}

// names has each verb's name as a number (pack), and 0 for malformed, which no name has.
var names = func() (packed [quit + 1]uint64) {
	for t := put; t <= quit; t++ {
		packed[t] = pack(verbs[t].name)
	}
	return packed
}()

// pack returns word as a number in which letters are lower case; 0 if it has more than 8 bytes. Two
// words can be compared at once, where strings.EqualFold costs 3 % of a busy server's time.
func pack(word string) (packed uint64) {
	if len(word) > 8 {
		return 0
	}

	// Bit 0x20 makes a letter lower case, and makes no letter of anything else.
	for i := range len(word) {
		packed = packed<<8 | uint64(word[i]|0x20)
	}
	return packed
}

// begun returns the queryType of the verb that line begins with; malformed if there is none.
func begun[T string | []byte](line T) queryType {
	// The line may be long, but no verb is.
	word, _, _ := strings.Cut(string(line[:min(len(line), maxQuoted)]), ":")
	return lookUp(word)
}

// isHTTP reports whether line is the first line of an HTTP/1 request (RFC 9112).
func isHTTP(line string) bool {
	return strings.HasSuffix(line, " HTTP/1.1") || strings.HasSuffix(line, " HTTP/1.0")
}

// isRESP reports whether line is the first line of a request in RESP, the protocol of Redis.
func isRESP(line string) bool {
	return len(line) > 1 && (line[0] == '*' || line[0] == '$') &&
		strings.Trim(line[1:], "0123456789") == ""
}

// badRequest is the response to a browser, and badRESP the response to a client of Redis.
const (
	badRequest = "HTTP/1.1 400 Bad Request\r\n" +
		"Content-Type: text/plain\r\n" +
		"Connection: close\r\n" +
		"\r\n" +
		"This is a key-value server and speaks no HTTP: connect with nc and type Help.\n"
	badRESP = "-ERR kvserver speaks lines, no RESP: send Help\r\n"
)

// quote returns s as %q shows it, cut to maxQuoted bytes.
func quote(s string) string {
	if len(s) > maxQuoted {
		return strconv.Quote(s[:maxQuoted]) + "..."
	}
	return strconv.Quote(s)
}

// dialects has the words that other programs use for our verbs, in lower case.
var dialects = map[string]queryType{
	"append": put, "insert": put, "store": put, "push": put, "rpush": put, "lpush": put,
	"read": get, "fetch": get, "mget": get, "lrange": get,
	"rem": remove, "del": del, "rm": del, "unset": del, "unlink": del,
	"replace": update, "assign": set, "change": update,
	"cas": swap, "incr": swap, "incrby": swap, "decr": swap,
	"ttl": expire, "setex": expire,
	"pop": take, "lpop": take, "rpop": take, "blpop": take, "brpop": take, "dequeue": take,
	"lock": lease, "setnx": add, "llen": count, "len": count,
	"list": keys, "ls": keys, "scan": keys, "export": dump, "backup": dump,
	"info": stats, "status": stats, "commands": help, "man": help,
	"bye": quit, "close": quit, "logout": quit, "q": quit,
}

// didYouMean completes "unknown request ..." with the request that line may have been meant to be.
// It looks at no more than the first 2*maxQuoted bytes.
func didYouMean(line string) string {
	const gap = ": \t"

	// A file from Windows may begin with a byte order mark.
	line = strings.TrimPrefix(line, "\ufeff")

	// Lines may be long, and each one that begins with no verb comes here.
	const most = 2 * maxQuoted
	whole := len(line) <= most
	line = strings.Trim(line[:min(len(line), most)], gap)

	// The first word ends at any separator.
	word, rest := line, ""
	if i := strings.IndexAny(line, gap); i >= 0 {
		word, rest = line[:i], strings.TrimLeft(line[i:], gap)
	}

	// It may be a verb, a word that other programs use, or nearly a verb.
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

	// Offer the client's own request if its arguments fit and can be shown.
	if n := strings.Count(verbs[t].form, ":"); whole && verbs[t].effect != noKey {
		args := strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(gap, r) })

		// The last value may hold separators.
		if len(args) > n {
			args = []string{args[0], strings.TrimLeft(rest[len(args[0]):], gap)}
		}

		// Do not offer a request that would be refused, or cannot be typed as it is shown.
		try := verbs[t].name + ":" + strings.Join(args, ":")
		if len(try) <= maxQuoted && strconv.Quote(try) == `"`+try+`"` && refusal(try) == "" {
			return "; did you mean " + try + " ?"
		}
	}

	return "; did you mean " + verbs[t].form + " ?"
}

// refusal returns the error that the server answers to a line; "": the line is a request.
func refusal(line string) string {
	q := Query{}
	if q.parse(line); q.queryType != malformed {
		return ""
	}
	return q.value()
}

// oneSlip reports whether a becomes b when one letter is added, left out or changed, or when two
// neighbours change places: distance 1 in Damerau, "A technique for computer detection and
// correction of spelling errors", 1964.
func oneSlip(a, b string) bool {
	// Skip what both begin with.
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	a, b = a[i:], b[i:]

	// Now their first letters differ: one is left out, added, changed, or swapped with the next.
	switch len(a) - len(b) {
	case 1:
		return a[1:] == b
	case -1:
		return a == b[1:]
	case 0:
		return a != "" && (a[1:] == b[1:] || a[0] == b[1] && a[1] == b[0] && a[2:] == b[2:])
	}

	return false
}

// ---- running

// run does the request to db, and keeps the result in q.
func (q *Query) run(db kvstore.Store, now clock) {
	// With a call of row this would be too much for the compiler to inline.
	if run := verbs[q.queryType].run; run != nil {
		run(q, db, now)
	}
}

func runGet(q *Query, db kvstore.Store, _ clock) {
	q.values = db.View(q.args[:0], q.key)

	// The store knows the size of a long list (fewValues).
	if q.n = len(q.values); q.n <= fewValues {
		q.bytes = kvstore.SizeOf(q.values)
	} else {
		q.bytes = db.Measure(q.key)
	}
}

func runList(q *Query, db kvstore.Store, now clock) {
	// Until the snapshot is walked, n is how many keys the reply can have at most.
	q.special = &special{snapshot: db.Snapshot()}
	q.n, _, _ = db.Size()

	// Keys that have expired may still be there.
	taken := now().UnixMilli()
	if _, isDue := db.NextDue(taken); isDue {
		q.snapshot = withoutDue{q.snapshot, taken}
	}
}

// withoutDue is a snapshot without the keys that had expired when it was taken.
type withoutDue struct {
	kvstore.Snapshot
	taken int64 // when, in milliseconds of Unix time
}

// All yields the keys that had not expired.
func (w withoutDue) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		for key, list := range w.Snapshot.All() {
			// This one is there only because workLoop has not deleted it yet.
			if at, goes := w.Deadline(key); goes && at <= w.taken {
				continue
			}

			if !yield(key, list) {
				return
			}
		}
	}
}

// mayExpire reports whether keys of db can expire, and refuses q if they cannot.
func (q *Query) mayExpire(db kvstore.Store) bool {
	if db.Expiring() < 0 {
		q.refuse("this store keeps every key until somebody deletes it")
		return false
	}
	return true
}

// deadline is when q's key is to expire, in milliseconds of Unix time; 0: never.
func (q *Query) deadline(now clock) (at int64) {
	if q.seconds > 0 {
		at = toMilli(now()) + int64(q.seconds)*1000
	}
	return at
}

// runTimeLeft answers ": seconds", without the key, so that no client takes it for a value.
func runTimeLeft(q *Query, db kvstore.Store, now clock) {
	// Without a deadline, n is 1 if the key is there and 0 if not.
	at, goes := db.Deadline(q.key)
	q.n = times(db.Count(q.key) > 0)
	q.key = ""

	if goes {
		q.answer([]string{secondsLeft(at, now())})
	}
}

// secondsLeft is the time until at, which is in milliseconds of Unix time, in seconds rounded up.
// It is at least one second, because an Expire of 0 means that the key stays.
func secondsLeft(at int64, now time.Time) string {
	left := (at - toMilli(now) + 999) / 1000
	return strconv.FormatInt(max(left, 1), 10)
}

// toMilli is t in milliseconds of Unix time, rounded up, so that no key expires too early.
func toMilli(t time.Time) int64 { return t.Add(time.Millisecond - 1).UnixMilli() }

// answer makes lines the result, which is then formatted as the reply.
func (q *Query) answer(lines []string) {
	q.values, q.n, q.bytes = lines, len(lines), kvstore.SizeOf(lines)
}

// times is 1 if something was done, and 0 if not.
func times(done bool) (n int) {
	if done {
		n = 1
	}
	return n
}

// mayWait reports whether q is a Take that waits for a value if there is none.
func (q *Query) mayWait() bool { return q.queryType == take && q.seconds > 0 }

// isAlone reports whether q must be a chain of its own. Requests before it are then answered first.
func (q *Query) isAlone() bool { return q.row().lists || q.mayWait() }

// keep clones values that share memory with others in the store, so that they can be kept for long
// (View).
func (q *Query) keep() {
	// A larger list keeps nothing but its own memory.
	if q.row().effect == reads && !q.kept && len(q.values) > 0 && q.bytes <= kvstore.ViewMost {
		q.kept = true
		q.values = kvstore.CloneAll(q.values)
		q.args = [2]string{}
	}
}

// fewValues is how many values are measured one by one. The store knows the size of a longer list:
// measuring a hundred thousand values, only to drop the reply, would make all clients wait.
const fewValues = 16

// writes reports whether q may change the store.
func (q *Query) writes() bool { return q.row().effect >= adds }

// changed reports whether q, which has run, has changed the store.
func (q *Query) changed() bool {
	// These two also add a value if they take none out.
	return q.writes() && (q.n > 0 || q.queryType == update || q.queryType == set)
}

// frees reports whether q only takes something away.
func (q *Query) frees() bool { return q.row().effect == frees }

// removes returns how many values of its key q removes, at most, if it only takes something away; 0
// if it does more than that.
func (q *Query) removes() int {
	switch {
	case !q.frees():
		return 0
	case q.queryType == del:
		return math.MaxInt
	}
	return 1
}

// memory is about how many bytes q, a write, may add to the store.
func (q *Query) memory() int64 {
	// An Update takes value out, and adds newValue.
	added := q.value()
	if q.row().effect == replaces {
		added = q.newValue()
	}

	return int64(len(q.key)+len(added)) + memoryPerPair
}

// makesLess reports whether q, a write that does not free, leaves db no larger than it is.
func (q *Query) makesLess(db kvstore.Store) bool {
	shrinks := q.row().shrinks
	return shrinks != nil && shrinks(q, db)
}

func updateShrinks(q *Query, db kvstore.Store) bool {
	return len(q.newValue()) <= len(q.value()) && db.Has(q.key, q.value())
}

// swapShrinks is also true if the old value is not there, because then a Swap does nothing.
func swapShrinks(q *Query, db kvstore.Store) bool {
	return len(q.newValue()) <= len(q.value()) || !db.Has(q.key, q.value())
}

// addShrinks is true if the key has a value, because then an Add or a Lease does nothing.
func addShrinks(q *Query, db kvstore.Store) bool { return db.Count(q.key) > 0 }

// expireShrinks is false for a key that has no deadline and gets one, which takes memory.
func expireShrinks(q *Query, db kvstore.Store) bool {
	_, goes := db.Deadline(q.key)
	return goes || q.seconds == 0 || db.Count(q.key) == 0
}

func setShrinks(q *Query, db kvstore.Store) bool {
	return db.Count(q.key) > 0 && int64(len(q.value())) <= db.Measure(q.key)
}

// ---- formatting

// lineExtra is how many bytes appendLine appends besides the value, at most.
func (q *Query) lineExtra() int {
	v := q.row()
	return len(v.head) + len(q.key) + len(v.separator) + len("\r\n")
}

// parts returns the parts of the line for one of q.values.
func (q *Query) parts(value string) [5]string {
	v, end := q.row(), "\n"
	if q.queryType == pair && trimCR(value) != value {
		end = "\r\n" // this CR is removed, and not value's, when the line comes back as a request
	}
	return [...]string{v.head, q.key, v.separator, value, end}
}

// appendLine appends the line for one of q.values.
func (q *Query) appendLine(b []byte, value string) []byte {
	// Almost every line is a Get's. It does not need the parts.
	if q.queryType != get {
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

// Upper bounds of the last line of a reply, in bytes: ":OK n", or all words and numbers besides the
// text that it carries.
const (
	maxOK      = 32
	maxNumbers = 64
)

// replySize is how many bytes q's reply takes, at most; 0 if none is owed.
func (q *Query) replySize(acked bool) (size int64) {
	return q.bytes + int64(len(q.values))*int64(q.lineExtra()) + int64(q.endSize(acked))
}

// endSize is how many bytes the last line of q's reply takes, at most; 0 if it has none.
func (q *Query) endSize(acked bool) int {
	switch end := q.row().ending; {
	case end == endFollow || end == endAcked && !acked:
		return 0
	case end > endOK:
		return maxNumbers + len(q.value())

	// Nearly always: a bound that is close lets workLoop answer a long chain itself.
	case q.n < 10:
		return len(":OK 1\n")
	}
	return maxOK
}

// appendEnd appends the last line of q's reply, if it has one.
func (q *Query) appendEnd(b []byte, acked bool, dropped int) []byte {
	switch q.row().ending {
	case endFollow:
		return b
	case endAcked:
		if !acked {
			return b
		}
		fallthrough

	// Nearly every n is one digit, which takes half as long without AppendInt.
	case endOK:
		if q.n < 10 {
			return append(b, ':', 'O', 'K', ' ', '0'+byte(q.n), '\n')
		}
		b = append(b, ":OK "...)
		b = strconv.AppendInt(b, int64(q.n), 10)

	case endForeign:
		return append(b, q.value()...)

	// Writes are silent before Ack, so an error names its line.
	case endError:
		b = append(b, ":ERROR line "...)
		b = strconv.AppendInt(b, int64(q.line), 10)
		b = append(b, ": "...)
		b = append(b, q.value()...)

	// A PONG says how many replies were lost, and so does a last line (tellLoss).
	case endPong:
		b = append(b, ":PONG"...)
		if q.value() != "" {
			b = append(b, ' ')
			b = append(b, q.value()...)
		}

		if dropped > 0 {
			b = append(b, " dropped "...)
			b = strconv.AppendInt(b, int64(dropped), 10)
		}
	}

	return append(b, '\n')
}

// mayDrop reports whether a slow reader may lose q's reply.
func (q *Query) mayDrop(acked bool) bool { return !acked && q.row().mayDrop }
