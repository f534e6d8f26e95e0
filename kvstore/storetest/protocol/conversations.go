package protocol

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// What other clients are told, whose first line is of HTTP or of RESP, the protocol of Redis.
const (
	badRequest = "HTTP/1.1 400 Bad Request\r\n" +
		"Content-Type: text/plain\r\n" +
		"Connection: close\r\n" +
		"\r\n" +
		"This is a key-value server and speaks no HTTP: connect with nc and type Help.\n"
	badRESP = "-ERR kvserver speaks lines, no RESP: send Help\r\n"
)

// Conversation is what a client sends, and what it must read.
type Conversation struct{ Name, Send, Want string }

// mistakes returns a conversation of lines that are all refused, because such a request needs
// something else, and that change nothing.
func mistakes(verb, needs string, lines ...string) Conversation {
	c := Conversation{verb + " with more or less", "Put:k:a\n" + strings.Join(lines, "\n") +
		"\nKeys\nGet:k\n", ""}

	for i, line := range lines {
		c.Want += fmt.Sprintf(":ERROR line %d: %s needs %s; got %q", i+2, verb, needs, line)
		if strings.HasPrefix(needs, "a key, without") && strings.HasPrefix(line, verb+":k:") {
			c.Want += `; a Put like that wrote to the key "k", for a key ends at its first colon`
		}
		c.Want += "\n"
	}

	c.Want += ": k\n:OK 1\nk:a\n"
	return c
}

// hints returns a conversation of lines that are no requests, each with the request that is
// suggested; "": none is.
func hints(name string, lines [][2]string) (c Conversation) {
	c.Name = name

	for i, l := range lines {
		c.Send += l[0] + "\n"
		hint := "Help lists the requests"
		if l[1] != "" {
			hint = "did you mean " + l[1] + " ?"
		}
		c.Want += fmt.Sprintf(":ERROR line %d: unknown request %q; %s\n", i+1, l[0], hint)
	}
	return c
}

// All returns the conversations of a server with this Help: what clients send and what they must
// read, to the last byte, before the server closes. Each client ends its own side first.
func All(help []string) []Conversation {
	return slices.Concat(aboutLists(), aboutTime(), aboutKeys(), aboutBytes(), aboutReplies(help),
		refused(), aboutLimits(), aboutOthers())
}

// aboutLists are conversations about the values of a key.
func aboutLists() []Conversation {
	return []Conversation{
		{"nothing", "", ""},
		{"put and get", "Put:fruit:apple\nGet:fruit\n", "fruit:apple\n"},
		{"put appends", "Put:k:a\nPut:k:b\nPut:k:a\nGet:k\n", "k:a\nk:b\nk:a\n"},
		{"miss", "Get:k\nDelete:k\n", ""},
		{"value with colons", "Put:k:a:b::\nGet:k\n", "k:a:b::\n"},
		{"empty value", "Put:k:\nGet:k\n", "k:\n"},
		{"delete removes all", "Put:k:a\nPut:k:b\nDelete:k\nGet:k\nPut:k:c\nGet:k\n", "k:c\n"},
		{"update replaces the first and appends",
			"Put:k:a\nPut:k:b\nPut:k:a\nPut:k:c\nUpdate:k:a:d\nGet:k\n", "k:b\nk:a\nk:c\nk:d\n"},

		// These take values out.
		{"set makes one", "Put:k:a\nPut:k:b\nSet:k:c:d\nGet:k\nSet:new:\nGet:new\n", "k:c:d\nnew:\n"},
		{"remove takes the first",
			"Put:k:a:\nPut:k:b\nPut:k:a:\nRemove:k:a:\nGet:k\nRemove:k:x\nRemove:none:x\nGet:k\n",
			"k:b\nk:a:\nk:b\nk:a:\n"},
		{"remove takes the key with its last", "Put:k:a\nRemove:k:a\nGet:k\nKeys\nPut:k:b\nGet:k\n",
			":OK 0\nk:b\n"},
		{"set and remove with ack",
			"Ack\nSet:k:a\nPut:k:b\nSet:k:c\nRemove:k:c\nRemove:k:c\nremove:k:\nSET:k:d\nGet:k\n",
			":OK 0\n:OK 0\n:OK 1\n:OK 2\n:OK 1\n:OK 0\n:OK 0\n:OK 0\nk:d\n:OK 1\n"},

		// These do it only if the value, or no value, is there.
		{"swap replaces, and never adds",
			"Put:k:a\nPut:k:b\nPut:k:a\nSwap:k:a:c\nSwap:k:x:y\nSwap:none:a:b\nSwap:none::b\nGet:k\n" +
				"Get:none\nPut:e:\nswap:e::\nSWAP:e::z\nGet:e\n",
			"k:b\nk:a\nk:c\ne:z\n"},
		{"add only to nothing", "Add:k:a:b\nAdd:k:c\nGet:k\nDelete:k\nadd:k:\nADD:k:d\nGet:k\n", "k:a:b\nk:\n"},
		{"count is always answered", "Count:k\nPut:k:a\nPut:k:a\ncount:k\nPut:k:c\nGet:k\n",
			":OK 0\n:OK 2\nk:a\nk:a\nk:c\n"},
		{"swap, add and count with ack",
			"Ack\nSwap:k:a:b\nAdd:k:a\nAdd:k:b\nSwap:k:a:b\nSwap:k:a:c\nCount:k\nCount:x\nGet:k\n",
			":OK 0\n:OK 0\n:OK 1\n:OK 0\n:OK 1\n:OK 0\n:OK 1\n:OK 0\nk:b\n:OK 1\n"},

		// An Update moves to the end what it replaces, and never fails.
		{"update in the middle", "Put:k:a\nPut:k:b\nPut:k:c\nUpdate:k:b:d\nGet:k\n", "k:a\nk:c\nk:d\n"},
		{"update of the only value", "Put:k:a\nUpdate:k:a:b\nGet:k\n", "k:b\n"},
		{"update without old appends", "Put:k:a\nUpdate:k:x:b\nGet:k\n", "k:a\nk:b\n"},
		{"update without key appends", "Update:k:x:b\nGet:k\n", "k:b\n"},
		{"update with empty values", "Put:k:\nUpdate:k::b\nUpdate:k:b:\nGet:k\n", "k:\n"},
	}
}

// aboutTime are conversations about keys that expire, and values that are taken.
func aboutTime() []Conversation {
	return []Conversation{
		{"expire and lease", "Put:k:a\nExpire:k\nExpire:k:30\nExpire:k\n" + "Put:k:b\nUpdate:k:a:c\nExpire:k\n" +
			"Expire:k:0\nexpire:k\nExpire:none:5\nExpire:none\nExpire:k:4000000000\nExpire:k\nSet:k:d\n" +
			"Expire:k\nLease:k:5:e\nLease:l:5:f:g\nExpire:l\nGet:l\nRemove:l:f:g\nPut:l:h\nExpire:l\n",
			":OK 1\n: 30\n:OK 1\n: 30\n:OK 1\n:OK 1\n:OK 0\n: 4000000000\n:OK 1\n:OK 1\n: 5\n:OK 1\n" +
				"l:f:g\n:OK 1\n"},
		{"expire and lease with ack",
			"Ack\nPut:k:a\nExpire:k:30\nExpire:none:30\nExpire:k\nExpire:none\nLease:k:30:b\n" +
				"Lease:l:1:\nLease:l:1:c\nGet:l\nDelete:l\nPut:l:x\nExpire:l\n",
			":OK 0\n:OK 1\n:OK 1\n:OK 0\n: 30\n:OK 1\n:OK 0\n:OK 0\n:OK 1\n:OK 0\nl:\n:OK 1\n:OK 1\n" +
				":OK 1\n:OK 1\n"},

		// A Take waits only while nobody else can put a value.
		{"take", "Put:k:a:b\nPut:k:c\nPut:k:\nTake:k\nTake:k:5\nGet:k\ntake:k\nTake:k\nTake:none\nKeys\n",
			"k:a:b\nk:c\nk:\nk:\n:OK 0\n"},
		{"take with ack", "Ack\nPut:k:a\nTake:k\nTake:k\nPut:k:b\nTake:k:1\nTake:k:1\nCount:k\n",
			":OK 0\n:OK 1\nk:a\n:OK 1\n:OK 0\n:OK 1\nk:b\n:OK 1\n:OK 0\n:OK 0\n"},
		{"take waits behind a half-close", "Take:k:30\nTake:k:3600\nPing:a\nTake:k:1\nPut:k:a\nGet:k\n",
			":PONG a\nk:a\n"},
		{"dump of what goes", "Put:k:a\nPut:k:b\nExpire:k:30\nLease:l:7:x:y\nPut:m:1\nDump\nDump:l\n",
			": Put:k:a\n: Put:k:b\n: Expire:k:30\n: Put:l:x:y\n: Expire:l:7\n: Put:m:1\n:OK 6\n" +
				": Put:l:x:y\n: Expire:l:7\n:OK 2\n"},
	}
}

// aboutKeys are conversations about all keys.
func aboutKeys() []Conversation {
	return []Conversation{
		{"keys", "Put:b:1\nPut:a:1\nPut:a:2\nPut:ab:3\nKeys\nKeys:a\nkeys:\nAck\nKeys:x\nKeys:a\nGet:b\n",
			": a\n: ab\n: b\n:OK 3\n: a\n: ab\n:OK 2\n: a\n: ab\n: b\n:OK 3\n:OK 0\n:OK 0\n: a\n: " +
				"ab\n:OK 2\nb:1\n:OK 1\n"},

		{"dump", "Put:b:x:y\nPut:a:\nPut:a:2\nDump\nDelete:a\nAck\nDump\n",
			": Put:a:\n: Put:a:2\n: Put:b:x:y\n:OK 3\n:OK 0\n: Put:b:x:y\n:OK 1\n"},
		{"dump keeps a value's own CR", "Put:a:1\r\r\nPut:b:2\r\x00\r\nDump\n",
			": Put:a:1\r\r\n: Put:b:2\r\x00\r\n:OK 2\n"},
		{"dump of a prefix", "Put:b:1\nPut:ab:2\nPut:a:3\nDump:a\nDump:c\ndump:\n",
			": Put:a:3\n: Put:ab:2\n:OK 2\n:OK 0\n: Put:a:3\n: Put:ab:2\n: Put:b:1\n:OK 3\n"},

		{"a line behind a Keys in a burst", "Get:none\nKeys\nnone\n",
			":OK 0\n:ERROR line 3: unknown request \"none\"; Help lists the requests\n"},
	}
}

// aboutBytes are conversations about what a line may hold, and how it ends.
func aboutBytes() []Conversation {
	return []Conversation{
		{"any letter case", "PUT:k:a\npUt:k:b\nget:k\nGET:k\ndelete:k\nGEt:k\nupdATE:k:x:y\ngeT:k\n",
			"k:a\nk:b\nk:a\nk:b\nk:y\n"},
		{"keys keep their case and their spaces", "Put:k:a\nPut:K: b \nGet: k\nGet:K\n", "K: b \n"},
		{"any bytes", "Put:\x00\xff:\x01\xfe\r\nGet:\x00\xff\n", "\x00\xff:\x01\xfe\n"},

		// Ends of lines.
		{"one CR goes", "Put:k:a\r\nPut:k:b\r\r\nGet:k\r\nTake:k\nTake:k\n", "k:a\nk:b\r\nk:a\nk:b\r\n"},
		{"telnet's CR NUL goes", "Put:k:a\r\x00\nGet:k\r\x00\n", "k:a\n"},
		{"a CR or a NUL inside stays", "Put:k:a\rb\nPut:k:a\x00\nGet:k\n", "k:a\rb\nk:a\x00\n"},
		{"NUL alone stays", "Put:k:a\x00\nGet:k\n", "k:a\x00\n"},
		{"blank lines count", "\n\r\n\r\x00\nfoo\n",
			":ERROR line 4: unknown request \"foo\"; Help lists the requests\n"},
	}
}

// aboutReplies are conversations about Ack, and about requests that have no key.
func aboutReplies(help []string) []Conversation {
	helped := ": " + strings.Join(help, "\n: ") + "\n:OK " + strconv.Itoa(len(help)) + "\n"
	return []Conversation{
		{"ack", "Ack\nPut:k:a\nPut:k:b\nGet:k\nUpdate:k:a:c\nUpdate:k:a:d\nDelete:k\nDelete:k\nGet:k\n" +
			"foo\nAck\nQuit\n",
			":OK 0\n:OK 1\n:OK 1\nk:a\nk:b\n:OK 2\n:OK 1\n:OK 0\n:OK 3\n:OK 0\n:OK 0\n:ERROR line " +
				"10: unknown request \"foo\"; Help lists the requests\n:OK 0\n:OK 0\n"},
		{"ack in the middle of a burst", "Put:k:a\nGet:k\nack\nGet:k\n", "k:a\n:OK 0\nk:a\n:OK 1\n"},

		// Requests that have no key.
		{"ping", "Ping\nPing:a:b c\nPing:\nping: x\n", ":PONG\n:PONG a:b c\n:PONG\n:PONG  x\n"},
		{"ping is its own answer", "Ack\nPing:a\n", ":OK 0\n:PONG a\n"},
		{"quit ends it", "Put:k:a\nGet:k\nQuit\nGet:k\n", "k:a\n"},
		{"exit ends it", "Ping\nEXIT\nPing\n", ":PONG\n"},
		{"help", "?\n", helped},
		{"help with ack", "Ack\nhelp\n", ":OK 0\n" + helped},
	}
}

// wordsOfOthers are lines with other programs' words for requests, each with the request that is
// suggested.
var wordsOfOthers = [][2]string{
	{"incr a", "Swap:key:old:new"},
	{"cas a b c", "Swap:a:b:c"}, {"setnx a b", "Add:a:b"}, {"llen a", "Count:a"},
	{"lpush a b", "Put:a:b"}, {"rpush a b", "Put:a:b"}, {"push a b", "Put:a:b"},
	{"append a b", "Put:a:b"}, {"insert a b", "Put:a:b"}, {"store a b", "Put:a:b"},
	{"read a", "Get:a"}, {"fetch a", "Get:a"}, {"mget a", "Get:a"}, {"lrange a", "Get:a"},
	{"rm a", "Delete:a"}, {"unset a", "Delete:a"}, {"unlink a", "Delete:a"},
	{"replace a b c", "Update:a:b:c"}, {"change a b c", "Update:a:b:c"}, {"assign a b", "Set:a:b"},
	{"incrby a 1", "Swap:key:old:new"}, {"decr a", "Swap:key:old:new"}, {"len a", "Count:a"},
	{"add a b", "Add:a:b"}, {"swap a b", "Swap:key:old:new"},
	{"expire a 60", "Expire:a:60"}, {"ttl a", "Expire:a"}, {"setex a 60", "Expire:a:60"},
	{"lock a", "Lease:key:seconds:value"}, {"lease a 60 me", "Lease:a:60:me"},
	{"brpop a 5", "Take:a:5"}, {"blpop a 5", "Take:a:5"}, {"rpop a", "Take:a"}, {"lpop a", "Take:a"},
	{"pop a", "Take:a"}, {"dequeue a", "Take:a"},
	{"list a", "Keys:prefix"}, {"ls a", "Keys:prefix"}, {"scan 0", "Keys:prefix"},
	{"export a", "Dump:prefix"}, {"backup a", "Dump:prefix"}, {"info all", "Stats"},
	{"status a", "Stats"}, {"commands a", "Help"}, {"man a", "Help"},
	{"bye now", "Quit"}, {"close a", "Quit"}, {"logout a", "Quit"}, {"q a", "Quit"},
	{"rem a b c", "Remove:a:b c"}, {"remove a b", "Remove:a:b"},
}

// refused are conversations of lines that are no requests.
func refused() []Conversation {
	return []Conversation{
		hints("words of other programs", wordsOfOthers),

		// Requests with too few or too many arguments.
		mistakes("Put", "a key and a value, as in Put:key:value", "Put:k", "Put", "Put:", "Put::v"),
		mistakes("Set", "a key and a value, as in Set:key:value", "Set:k", "Set::v"),
		mistakes("Remove", "a key and a value, as in Remove:key:value", "Remove:k", "remove"),
		mistakes("Add", "a key and a value, as in Add:key:value", "Add:k", "Add::v"),
		mistakes("Get", "a key, without a colon in it, as in Get:key", "Get:k:b", "Get:k:", "Get:", "get",
			"Get::b"),
		mistakes("Delete", "a key, without a colon in it, as in Delete:key", "Delete:k:1", "Delete:"),
		mistakes("Count", "a key, without a colon in it, as in Count:key", "Count:", "Count:k:1", "Count"),
		mistakes("Swap", "a key, an old and a new value, none with a colon in it, as in "+
			"Swap:key:old:new", "Swap:k:a", "Swap:k:a:b:c", "Swap::a:b"),
		mistakes("Update", "a key, an old and a new value, none with a colon in it, as in "+
			"Update:key:old:new", "Update:k:a", "Update:k", "Update:k:a:b:c", "Update::a:b"),
		mistakes("Expire", "a key, and seconds up to 4000000000 or nothing, as in Expire:key:seconds",
			"Expire:k:", "Expire:k:4000000001", "Expire:k:-1", "Expire:k:1:2", "Expire::1", "Expire",
			"Expire:k:1.5"),
		mistakes("Lease", "a key, seconds from 1 to 4000000000, and a value, as in "+
			"Lease:key:seconds:value", "Lease:l:5", "Lease:l:0:v", "Lease:l:x:v", "Lease::5:v",
			"Lease:l:4000000001:v"),
		mistakes("Take", "a key, and seconds from 1 to 3600 or nothing, as in Take:key:seconds",
			"Take:", "Take", "Take:k:", "Take:k:0", "Take:k:3601", "Take:k:1:2", "Take::1", "Take:k:-1"),
		mistakes("Keys", "nothing behind it or a prefix, without a colon in it, as in Keys:prefix", "Keys:a:b"),
		mistakes("Dump", "nothing behind it or a prefix, without a colon in it, as in Dump:prefix", "Dump:a:b"),

		mistakes("Quit", "nothing behind it, as in Quit", "Quit:"),
		mistakes("Ack", "nothing behind it, as in Ack", "Ack:on"),
		mistakes("Stats", "nothing behind it, as in Stats", "Stats:"),
		mistakes("Help", "nothing behind it, as in Help", "Help:me"),

		// Lines that look like a request, or do not.
		hints("hints", [][2]string{{"12", ""}, {"get fruit", "Get:fruit"}, {"set a b", "Set:a:b"},
			{"SET a b c", "Set:a:b c"}, {"del a", "Delete:a"}, {"Gett:a", "Get:a"},
			{"Ptu:a:b:c", "Put:a:b:c"}, {"update a b c", "Update:a:b:c"}, {" Get:a", "Get:a"},
			{"Get :a", "Get:a"}, {"get\ta", "Get:a"}, {"set a", "Set:key:value"}, {"get a\x1b", "Get:key"},
			{"gat a", "Get:a"}, {"uxt a b", ""},
			{"update a b c d", "Update:key:old:new"},
			{"upadxe a b c", ""}, {"getxy a", ""}, {"pxx a b", ""}, {"dlet a", ""}, // two slips
			{"\x00", ""}, {":", ""}, {"::", ""}, {"k:v", ""}, {"\xff\xfe", ""}, {"Ac\u212a", ""}}),

		{"a file of Windows", "\ufeffPut:bom:1\nGet:bom\n",
			":ERROR line 1: unknown request \"\\ufeffPut:bom:1\"; did you mean Put:bom:1 ?\n"},
		{"long nonsense is cut", strings.Repeat("x", 41) + "\n" + strings.Repeat("x", 40) + "\n",
			":ERROR line 1: unknown request \"" + strings.Repeat("x", 40) + "\"...; Help lists the requests\n" +
				":ERROR line 2: unknown request \"" + strings.Repeat("x", 40) + "\"; Help lists the requests\n"},
		hints("a request of 40 bytes is offered", [][2]string{{"set a " + strings.Repeat("b", 34),
			"Set:a:" + strings.Repeat("b", 34)}}),
		{"no longer request is offered", "set a " + strings.Repeat("b", 35) + "\n", ":ERROR line 1: unknown " +
			"request \"set a " + strings.Repeat("b", 34) + "\"...; did you mean Set:key:value ?\n"},
		{"no part of a long line is offered", "set a b" + strings.Repeat(" ", 80) + "c\n",
			":ERROR line 1: unknown request \"set a b" + strings.Repeat(" ", 33) +
				"\"...; did you mean Set:key:value ?\n"},
	}
}

// aboutLimits are conversations about lines without an end, and about lines that are too long.
func aboutLimits() []Conversation {
	return []Conversation{
		{"torn last line", "Put:k:a\nDelete:k\nPut:k:b\nGet:k",
			":ERROR line 4: the last line has no newline at its end, so it was not run\n"},
		{"torn write is not run", "Ack\nPut:k:a",
			":OK 0\n:ERROR line 2: the last line has no newline at its end, so it was not run\n"},

		// A first line over the limit ends the connection, unless it begins a request.
		{"HTTP over the limit", "POST /" + strings.Repeat("a", MaxLine) + " HTTP/1.1\r\n\r\nPut:k:a\nPing\n",
			":ERROR line 1: longer than 20000 bytes, skipped\n"},
		{"HTTP one byte over the limit", "POST /" + strings.Repeat("a",
			MaxLine+1-len("POST / HTTP/1.1")) + " HTTP/1.1\nPut:k:a\nPing\n",
			":ERROR line 1: longer than 20000 bytes, skipped\n"},
		{"HTTP at the limit", "POST /" + strings.Repeat("a",
			MaxLine-len("POST / HTTP/1.1")) + " HTTP/1.1\nPut:k:a\nPing\n", badRequest},
		{"HTTP far over the limit", "\r\nPOST /" + strings.Repeat("a",
			3*MaxLine) + " HTTP/1.0\r\x00\n\r\nPut:k:a\nPing\n",
			":ERROR line 2: longer than 20000 bytes, skipped\n"},
		{"a request over the limit is no HTTP", "Put:" + strings.Repeat("a", 3*MaxLine) +
			" HTTP/1.0\nPing\n", ":ERROR line 1: longer than 20000 bytes, skipped\n:PONG\n"},
		{"first line over the limit", strings.Repeat("a", 3*MaxLine) + "\nPut:k:a\nPing\n",
			":ERROR line 1: longer than 20000 bytes, skipped\n"},
		{"first line one over the limit", "\n" + strings.Repeat("a", MaxLine+1) +
			"\nPut:k:a\nPing\n", ":ERROR line 2: longer than 20000 bytes, skipped\n"},

		// The last line, without its end.
		{"torn first line over the limit", strings.Repeat("a", 3*MaxLine),
			":ERROR line 1: longer than 20000 bytes, skipped\n"},
		{"torn line of the limit", strings.Repeat("a", MaxLine),
			":ERROR line 1: the last line has no newline at its end, so it was not run\n"},
		{"torn line of the limit, with a CR", strings.Repeat("a", MaxLine) + "\r",
			":ERROR line 1: the last line has no newline at its end, so it was not run\n"},
		{"torn line one over the limit", strings.Repeat("a", MaxLine+1),
			":ERROR line 1: longer than 20000 bytes, skipped\n"},
		{"torn line two over the limit", "Ping\n" + strings.Repeat("a", MaxLine+2),
			":PONG\n:ERROR line 2: longer than 20000 bytes, skipped\n"},
		{"HTTP over the limit and too late", "Ping\nPOST /" + strings.Repeat("a", 3*MaxLine) +
			" HTTP/1.0\r\n\r\nPing\n",
			":PONG\n:ERROR line 2: longer than 20000 bytes, skipped\n:PONG\n"},

		// A later line over the limit is skipped.
		{"far over the limit", "\nPut:k:a\n" + strings.Repeat("Put:k:b\r", 20_000) + "\nGet:k\n",
			":ERROR line 3: longer than 20000 bytes, skipped\nk:a\n"},
		{"two over the limit", "Put:" + strings.Repeat("x", 50_000) + "\n" + strings.Repeat("y",
			30_000) + "\nPing\n",
			":ERROR line 1: longer than 20000 bytes, skipped\n:ERROR line 2: longer than 20000 " +
				"bytes, skipped\n:PONG\n"},
		{"torn over the limit", "Ping\n" + strings.Repeat("x", 50_000),
			":PONG\n:ERROR line 2: longer than 20000 bytes, skipped\n"},
	}
}

// aboutOthers are conversations of clients that speak another protocol, or seem to.
func aboutOthers() []Conversation {
	return []Conversation{
		{"HTTP", "GET / HTTP/1.1\r\nPut:k:a\r\nGet:k\r\n\r\nGet:k\n", badRequest},
		{"HTTP after blank lines", "\r\n\r\nPOST /Put:k:a HTTP/1.0\r\n\r\nPing\n", badRequest},
		{"not HTTP", "Put:k:a HTTP/1.1\nGet:k\n", "k:a HTTP/1.1\n"},
		{"HTTP, or a mistake that looks like it", "Put: HTTP/1.1\nPut:k:a\nGet:k\n", badRequest},
		{"HTTP too late", "Ping\nGET / HTTP/1.1\nPing\n",
			":PONG\n:ERROR line 2: unknown request \"GET / HTTP/1.1\"; did you mean Get:key ?\n" + ":PONG\n"},

		// RESP, as Redis speaks it.
		{"redis-cli", "*1\r\n$7\r\nCOMMAND\r\nPut:k:a\nPing\n", badRESP},
		{"RESP without an array", "\n$4\nPing\n", badRESP},
		{"not RESP", "*\nPing\n", ":ERROR line 1: unknown request \"*\"; Help lists the requests\n:PONG\n"},
		{"a price is not RESP", "$5.20\nPing\n",
			":ERROR line 1: unknown request \"$5.20\"; Help lists the requests\n:PONG\n"},
		{"RESP too late", "Ping\n*1\nPing\n",
			":PONG\n:ERROR line 2: unknown request \"*1\"; Help lists the requests\n:PONG\n"},

		// TLS.
		{"TLS", "\x16\x03\x01\x02\x00\x01\nPut:poison:1\nPing\n", ":ERROR line 1: this port speaks no TLS\n"},
		{"a TLS byte later", "Ping\n\x16\x03\nPing\n",
			":PONG\n:ERROR line 2: unknown request \"\\x16\\x03\"; Help lists the requests\n:PONG\n"},
	}
}

// Conversations ensures that every request is answered as the protocol says.
func Conversations(t *testing.T, start Start, help []string) {
	for _, c := range All(help) {
		t.Run(c.Name, func(t *testing.T) {
			start.inBubble(t, func(t *testing.T, n *Net) {
				a := n.Dial(t)
				go a.SendAll(c.Send)
				is.Equal(t, fmt.Sprintf("sent %.300q", c.Send), a.ReadAll(), c.Want)
			})
		})
	}
}

// Stats ensures that Stats counts what was done, including all requests before it. A client takes
// perClient bytes.
func Stats(t *testing.T, start StartOn, perClient int64) {
	synctest.Test(t, func(t *testing.T) {
		db := kvstore.NewMemory()
		n := start.on(t, db)
		n.Dial(t).Ask("GET / HTTP/1.1", strings.Split(strings.TrimSuffix(badRequest, "\n"), "\n")...)
		world.Pass(3 * time.Second) // it is refused like any line that is no request, and is then ignored

		a := n.Dial(t)
		a.Send("Put:key:value\nPut:key:v2\nUpdate:other:x:y\nDelete:other\nGet:key\nExpire:key\nnonsense\n" +
			"Ping\nStats\nAck\nStats\n")
		a.Want("key:value", "key:v2", ":OK 1",
			`:ERROR line 7: unknown request "nonsense"; Help lists the requests`, ":PONG")
		synctest.Wait()

		lines := []string{
			": version test", ": uptime_seconds 3", ": clients 1", ": clients_left_total 1",
			": put_requests_total 2", ": get_requests_total 1", ": delete_requests_total 1",
			": update_requests_total 1", ": set_requests_total 0", ": remove_requests_total 0",
			": swap_requests_total 0", ": add_requests_total 0", ": lease_requests_total 0",
			": take_requests_total 0", ": count_requests_total 0", ": expire_requests_total 1",
			": ack_requests_total 0", ": ping_requests_total 1", ": stats_requests_total 1",
			": keys_requests_total 0", ": dump_requests_total 0", ": help_requests_total 0",
			": quit_requests_total 0",
			": refused_requests_total 2", ": replies_dropped_total 0", ": queued_bytes 0",
			": queued_limit_bytes 1073741824", ": writes_refused_total 0",
			": waiting_takes 0", ": expired_keys_total 0", ": clients_refused_total 0",
			": tls_handshakes_failed_total 0", ": keys 1",
			": values 2", ": expiring_keys 0", ": data_bytes 10", ": memory_bytes " +
				fmt.Sprint(db.Footprint()+perClient), ": memory_limit_bytes 0",
		}

		wantAll := func() {
			a.Want(lines...)
			if line := a.Read(); !regexp.MustCompile(`^: process_bytes \d{6,}$`).MatchString(line) {
				t.Errorf("got %q", line)
			}
			a.Want(":OK " + strconv.Itoa(len(lines)+1))
		}

		wantAll()
		a.Want(":OK 0")

		// The second Stats counts the first, and the Ack.
		lines[slices.Index(lines, ": ack_requests_total 0")] = ": ack_requests_total 1"
		lines[slices.Index(lines, ": stats_requests_total 1")] = ": stats_requests_total 2"
		wantAll()
	})
}
