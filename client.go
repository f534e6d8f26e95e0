package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"kvserver/kvstore"
)

// Limits of one connection.
const (
	// messages in a client's buffer: what Project 0 keeps for a slow reader
	maxBufferSize = 500
	maxShared     = 8         // of these, the first, that may hold several replies each
	maxMessage    = 128 << 10 // bytes in one of them
	maxWrite      = 64 << 10  // bytes after which a Write waits for no more messages

	// Bytes of the socket's send buffer. Linux lets it grow to 4 MiB if it is left
	// alone, and a client would be kept that much more.
	sendBuffer = 128 << 10

	maxChain  = 256      // queries in one chain, so that no burst keeps workLoop long
	quietSize = 512      // bytes of a quiet client's read buffer
	burstSize = 64 << 10 // bytes of a busy one's, if it needs them; long lines take more
	chunkSize = 16 << 10 // bytes of a recycled message, small
	largeSize = maxMessage

	// The slowest reader that is a steady one, in bytes a second, and what the two
	// sockets hold for it at most, in bytes (Linux: tcp_rmem, 6 MiB).
	steadyRate = 256 << 10
	socketMost = 8 << 20

	// A client is a slow reader when its connection has taken no byte for so long; a little
	// longer where its sockets hold much.
	slowAfter = time.Second
	tickTime  = slowAfter / 10 // between two looks at how a Write gets on
	dripTime  = 5 * slowAfter  // that a Dump has waited, until it is looked how fast it is taken

	// A client is quiet when no byte has come for so long, and gives its scratch memory back.
	quietAfter = time.Second

	// For a line that was begun to end, counted in ticks of quietAfter, while we read.
	lineTime = 30 * time.Second

	handshakeTime = 5 * time.Second // for TLS to begin
	drainTime     = time.Second     // for the client to take our last words and close
	// a client that sends nothing for so long has nothing on its way
	busyTime = 20 * time.Millisecond
)

// What one client can make the server hold, at most:
//
//	input       two buffers of 256 KiB, or of its longest line (-max-line), and maxChain queries
//	replies     maxBufferSize messages of maxMessage, one being made and one being written
//	lists       of the chain whose replies wait: 16 bytes a value, and the values that others
//	            have removed meanwhile
//	Keys        the keys, copied
//	Dump        16 bytes a key, and what others change meanwhile (maxSnapshots at a time)
//	goroutines  three: readFromClient, writeToClient and at times deliver
//	sockets     sendBuffer, and what the kernel takes in
//
// Replies, lists and keys of all clients together are bounded by -max-queues, but for what a
// client with nothing queued may always begin.

// Client is one connection and what its goroutines share. readFromClient takes requests from
// the connection to workLoop, one chain at a time. Who holds the chain, workLoop, deliver or
// readFromClient itself, queues the replies in buffer. writeToClient takes them from there to
// the connection.
//
// Who holds the client's chain holds its outbox too, and the memory of its lines:
//
//	readFromClient   makes it (parse), and sends it to workLoop: queries
//	workLoop         runs it, puts it into batch, commits, and answers it
//	                 what is short, and finds room, itself: done
//	                 else it starts deliver, which waits for room: done
//	readFromClient   has it back, and may make the next; for a Keys or Dump it answers
//	                 that itself, from a snapshot (list)
//
// How a connection ends: readFromClient notes why (end) and makes no more chains; it waits
// for the one that is under way, and closes buffer; writeToClient writes what is queued,
// closes the connection, and each tells workLoop that it departs. Where the connection does
// not take what is written, writeToClient closes it first, and gone tells the holder to
// spare the replies: what was sent is run nevertheless. Where Commit fails, workLoop closes all
// connections, without a word.
type Client struct {
	// Set before the goroutines start, then left alone.
	id         int // counted from 1, for the log; 0: turned away
	connection net.Conn
	server     *keyValueServer

	// Owned by workLoop.
	alive int   // the client's goroutines that run; at 0 it leaves clients
	index int   // its place in clients
	share share // of workLoop's time

	// workLoop, or deliver, to readFromClient: the chain has run and been
	// answered. nil: the store failed, and nobody knows whether it has. One chain
	// is under way at a time, so with one slot nobody waits.
	done chan *Query

	outbox                    // with buffer and gone
	snapshot kvstore.Snapshot // for the Keys or Dump that is under way; handed over with the chain

	// Owned by readFromClient, until it closes buffer (then writeToClient may read drain), and
	// its departure leaves them to workLoop.
	in       input
	underWay bool   // a chain is, and has not come back
	reason   string // why the connection ends, for the log; "" while it does not
	drain    bool   // it ends by our will: let the client take our last words

	broken error // of the Write that failed; owned by writeToClient, until its departure
}

// newClient returns the client at the other end of conn.
func newClient(id int, conn net.Conn, s *keyValueServer) *Client {
	c := &Client{
		id: id, connection: conn, server: s, alive: 1,
		done: make(chan *Query, 1),
		outbox: outbox{
			outboxes: &s.outboxes,
			gone:     make(chan struct{}),
			progress: make(chan bool, 1),
			hangUp:   underTLS(conn).Close,
		},
	}
	if p, ok := underTLS(conn).(*pacedConn); ok {
		p.tell = c.tell
	}
	return c
}

// addr is where the client is, for the log.
func (c *Client) addr() string { return fmt.Sprint(c.connection.RemoteAddr()) }

// readFromClient reads requests and has workLoop run them. One goroutine a
// client, from the connection's arrival until the client has closed its side or
// said Quit, the server closes, or the connection breaks. It reads on while a
// chain is under way, and then waits for that one before it sends the next.
func (c *Client) readFromClient() {
	for c.reason == "" {
		burst, err := c.read()
		for burst != "" && c.reason == "" && c.await() {
			var chain *Query
			if chain, burst = c.parse(burst); chain != nil {
				c.submit(chain)
			}
		}
		if why := c.mustSkip(); c.reason == "" && why != "" {
			if c.in.skip(why); !c.in.unanswered {
				c.answerFault(why)
			}
		}
		if err != nil && c.reason == "" {
			c.endInput(err)
		}
	}
	c.in = input{line: c.in.line, counted: c.in.counted}
	c.countInput()
	c.tellLoss()
	if c.buffer == nil {
		c.connection.Close()
	} else {
		close(c.buffer) // the connection is writeToClient's alone now
	}
	c.depart()
}

// tellLoss tells a client that goes how many replies it has lost since its last PONG.
func (c *Client) tellLoss() {
	if !c.await() || c.dropped == 0 || c.reason != itClosed && c.reason != itQuit {
		return
	}
	why := fmt.Sprintf("%d replies were dropped, for nothing was read for over a second; after "+
		"Ack none is", c.dropped)
	c.replyAll(&Query{queryType: lastWord, line: c.in.line, value: why})
}

// Why a connection ends, where that matters to more than the log.
const (
	itClosed = "it closed"
	itQuit   = "it quit"
	weClose  = "the server closes"

	// None of the lines may be run: a web page could have made a browser send them, or
	// they are pieces of binary data.
	speaksHTTP = "it speaks HTTP"
	speaksTLS  = "it speaks TLS"
)

// end has the connection end after what was read, because of why. drain: by our
// will, so the client gets time to take our last words.
func (c *Client) end(why string, drain bool) {
	if c.reason == "" {
		c.reason, c.drain = why, drain
	}
}

// send sends chain to workLoop. None may be under way.
func (c *Client) send(chain *Query) {
	c.underWay = true
	c.server.queries <- chain
}

// await waits for the chain that is under way, if there is one. It returns
// false, and ends the connection, if that is not known to have run.
func (c *Client) await() bool {
	if c.underWay {
		c.underWay = false
		if <-c.done == nil {
			c.end("the store failed", false)
			return false
		}
	}
	return true
}

// runBare has workLoop run chain and waits for it: as await does, but without replies.
func (c *Client) runBare(chain *Query) bool {
	chain.bare = true
	c.send(chain)
	return c.await()
}

// submit has workLoop run chain and see to the replies.
func (c *Client) submit(chain *Query) {
	last := chain
	for last.next != nil {
		last = last.next
	}
	what, prefix := last.queryType, last.value // while it is ours
	c.send(chain)
	if (what == keys || what == dump) && c.await() {
		c.list(what, prefix)
	}
}

// answerFault answers the line that was last read with an error.
func (c *Client) answerFault(why string) {
	q := &Query{client: c, line: c.in.line}
	q.refuse(why)
	if c.await() {
		c.submit(q)
	}
}

// answerWeb answers an HTTP request, and ends the connection.
func (c *Client) answerWeb() {
	if c.await() {
		c.submit(&Query{client: c, line: c.in.line, queryType: webRequest})
	}
	c.end(speaksHTTP, true)
}

// mustSkip tells why the line that has begun cannot be taken in whole: "" if it can.
func (c *Client) mustSkip() string {
	in := &c.in
	switch {
	case in.pending > c.server.maxLine+len("\r\x00"):
		return tooLong(c.server.maxLine)
	case in.pending >= burstSize && in.pending == len(in.buf) && c.server.isInputFull():
		return "too long for the memory that is left, skipped"
	}
	return ""
}

// countInput counts what the input takes beyond a burst, for -max-memory.
func (c *Client) countInput() {
	in := &c.in
	large := int64(max(0, len(in.buf)-burstSize) + max(0, len(in.lent)-burstSize))
	if large != in.counted {
		c.inputs.Add(large - in.counted)
		in.counted = large
	}
}

func tooLong(maxLine int) string {
	return "longer than " + strconv.Itoa(maxLine) + " bytes, skipped"
}

// endInput ends the connection because Read ended in err.
func (c *Client) endInput(err error) {
	in := &c.in
	switch {
	case !c.await(): // that is why
	case errors.Is(err, io.EOF):
		switch {
		case in.skipping && in.unanswered:
			c.answerFault(in.why)
		case in.pending > 0:
			in.line++
			if len(trimCR(string(in.buf[:in.pending]))) > c.server.maxLine {
				c.answerFault(tooLong(c.server.maxLine))
			} else {
				c.answerFault("the last line has no newline at its end, so it was not run")
			}
		}
		c.end(itClosed, false)
	case c.server.isClosing():
		c.end(weClose, true)
	case err == errSlowLine:
		if !in.skipping {
			in.line++
		}
		if !in.skipping || in.unanswered {
			c.answerFault(err.Error())
		}
		c.end(err.Error(), true)
	default:
		c.end(err.Error(), false)
	}
}

// depart tells workLoop that one of the client's goroutines has ended.
func (c *Client) depart() {
	c.server.queries <- &Query{queryType: depart, client: c}
}

// ---- input: bytes to lines

// input is what a client has sent and no query has taken yet. It is
// readFromClient's alone.
type input struct {
	buf      []byte
	lent     []byte  // what buf was before: the strings of the chain under way are made of it
	full     bool    // the last Read filled buf
	pending  int     // bytes at the start of buf: a line whose end has not come
	line     int     // lines so far
	heard    bool    // a byte has come
	spoke    bool    // a line was not blank, so HTTP cannot begin any more
	queries  []Query // the memory of the chain, used again for the next
	skipping bool    // a line was too long and its end has not come; pending is 0
	skipped  []byte  // the last bytes of that line
	why      string  // it is skipped
	counted  int64   // bytes of buf and lent that are counted in inputs

	// The line that is skipped got no answer yet: it may turn out to be the first
	// of an HTTP request.
	unanswered bool

	ticking bool          // a read deadline is set
	whole   bool          // the line in hand was begun before that
	busy    bool          // something came since the last tick
	waited  time.Duration // for the end of the line in hand
}

// midLine tells whether a line has begun and not ended.
func (in *input) midLine() bool { return in.pending > 0 || in.skipping }

// read waits for input and returns its complete lines as one string, of which
// keys and values will be substrings, and the error that ends the input. The string is good
// until the next take: who holds the chain holds its memory.
func (c *Client) read() (burst string, err error) {
	in := &c.in
	in.grow(c.server.maxLine)
	c.countInput()
	c.setTick()
	n, err := c.connection.Read(in.buf[in.pending:])
	if n > 0 {
		in.busy = true
		if !in.heard && in.buf[0] == tlsHandshake && underTLS(c.connection) == c.connection {
			in.line = 1
			c.answerFault("this port speaks no TLS")
			c.end(speaksTLS, true)
			return "", nil
		}
		in.heard = true
		wasUnanswered := in.unanswered
		c.await() // or take would change what the chain under way is made of
		burst = in.take(n)
		if wasUnanswered && !in.skipping { // now it is known what the skipped line is
			in.unanswered = false
			if isHTTP(trimCR(string(in.skipped))) {
				c.answerWeb()
			} else {
				c.answerFault(in.why)
			}
		}
	}
	if !in.midLine() {
		in.waited = 0
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.server.isClosing() {
		err = c.tick()
	}
	return burst, err
}

// tlsHandshake is the first byte of a TLS connection: a record of this type
// (RFC 8446, 5.1).
const tlsHandshake = 0x16

// tick gives back what a quiet client does not need, and ends one whose line does
// not end. Its time does not run while the replies to what came before wait for
// room, and the chain holds memory, too: so tick waits for that.
func (c *Client) tick() error {
	in := &c.in
	c.await()
	clear(in.queries[:cap(in.queries)]) // what they found may pin memory of the store
	if !in.busy {
		in.shrink()
		c.countInput()
	}
	c.limitRead(time.Time{})
	if in.midLine() && in.whole {
		if in.waited += quietAfter; in.waited >= lineTime {
			return errSlowLine
		}
	}
	in.ticking, in.busy = false, false
	return nil
}

// errSlowLine ends a client whose line does not end: otherwise a few bytes
// would hold a connection for ever (the Slowloris attack, 2009).
var errSlowLine = fmt.Errorf("the line was begun but not ended within %v", lineTime)

// setTick sees to it that a Read which waits while the client holds memory, or has
// begun a line, ends within quietAfter, so that tick can look at that. One deadline
// serves many Reads: setting one for each would cost every burst.
func (c *Client) setTick() {
	in := &c.in
	if in.ticking || len(in.buf) == quietSize && in.queries == nil && !in.midLine() {
		return
	}
	in.ticking, in.whole = true, in.midLine()
	c.limitRead(time.Now().Add(quietAfter))
}

// limitRead sets the read deadline, unless the server closes: then it has
// passed, and workLoop may have set it before us.
func (c *Client) limitRead(end time.Time) {
	c.connection.SetReadDeadline(end)
	if c.server.isClosing() {
		c.connection.SetReadDeadline(time.Now())
	}
}

// grow makes room behind a Read that filled the buffer: for a busy client's
// bursts, or for the rest of a line of up to maxLine bytes with its line end and
// one byte more.
func (in *input) grow(maxLine int) {
	size := len(in.buf)
	switch {
	case size == 0:
		size = quietSize
	case in.full && size < burstSize:
		size = min(4*size, burstSize)
	// Lines are long, and the rest of one is copied each time.
	case in.full && in.pending > size/8 && size < 4*burstSize:
		size *= 2
	case in.pending == size:
		size = min(2*size, max(maxLine+len("\r\x00\n"), size+1))
	default:
		return
	}
	in.buf, in.full = append(make([]byte, 0, size), in.buf[:in.pending]...)[:size], false
}

// shrink gives back what a quiet client does not need.
func (in *input) shrink() {
	in.lent = nil
	if in.pending == 0 {
		in.buf, in.full, in.queries = make([]byte, quietSize), false, nil
	}
}

// skip gives up the line in pending, for the reason why. Its answer waits for its
// end if it is the first line and may be HTTP's.
func (in *input) skip(why string) {
	in.why = why
	in.unanswered = !in.spoke && !beginsRequest(string(in.buf[:min(in.pending, maxQuoted)]))
	in.spoke = true
	in.skipped = in.skipped[:0]
	in.noteSkipped(in.buf[:in.pending])
	in.pending, in.skipping = 0, true
	in.line++
}

// noteSkipped notes the end of what is skipped: it tells HTTP from a mere mistake.
func (in *input) noteSkipped(b []byte) {
	const enough = len(" HTTP/1.1\r\x00")
	in.skipped = append(in.skipped, b[max(0, len(b)-enough):]...)
	in.skipped = in.skipped[max(0, len(in.skipped)-enough):]
}

// take returns the lines that the n bytes behind pending complete. If a line was
// being skipped and ends among them, skipping ends, and skipped is its end.
//
// The lines are no copy: they are what was read, which stays as it is until the next take,
// for what comes meanwhile is read into another buffer. By then the chains made of them have
// come back, and who keeps a key or a value, the store, has made a copy.
func (in *input) take(n int) (burst string) {
	end := in.pending + n
	in.full = end == len(in.buf)
	last := in.pending + lastNewline(in.buf[in.pending:end]) + 1
	if last == in.pending {
		if in.skipping {
			in.noteSkipped(in.buf[:end])
		} else {
			in.pending = end
		}
		return ""
	}
	in.waited, in.whole = 0, false
	first := 0
	if in.skipping {
		first = bytes.IndexByte(in.buf[:end], '\n') + 1
		in.noteSkipped(in.buf[:first-1])
		in.skipping = false
	}
	read := in.buf
	burst = unsafe.String(unsafe.SliceData(read[first:]), last-first)
	if len(in.lent) != len(read) {
		in.lent = make([]byte, len(read))
	}
	in.buf, in.lent = in.lent, read
	in.pending = copy(in.buf, read[last:end])
	return burst
}

// lastNewline returns the index of the last newline in b, or -1. It looks for it
// in blocks, for bytes.LastIndexByte looks at one byte at a time, and lines may be
// long.
func lastNewline(b []byte) int {
	const block = 1 << 10
	for end := len(b); end > 0; end -= block {
		start := max(0, end-block)
		if bytes.IndexByte(b[start:end], '\n') >= 0 {
			return start + bytes.LastIndexByte(b[start:end], '\n')
		}
	}
	return -1
}

// parse makes a chain of the first lines of burst, nil if they are blank, and
// returns the lines left over. A Keys or Dump is the last of its chain; a Quit
// is also the client's last.
func (c *Client) parse(burst string) (chain *Query, rest string) {
	in := &c.in
	before := in.queries
	in.queries = in.queries[:0]
	for walks := false; burst != "" && len(in.queries) < maxChain && c.reason == "" && !walks; {
		end := strings.IndexByte(burst, '\n')
		line := trimCR(burst[:end])
		burst = burst[end+1:]
		in.line++
		if line == "" {
			continue
		}
		in.queries = append(in.queries, Query{client: c, line: in.line})
		q := &in.queries[len(in.queries)-1]
		isLong := len(line) > c.server.maxLine
		if isLong {
			q.refuse(tooLong(c.server.maxLine))
		} else {
			q.parse(line)
		}
		switch {
		case q.queryType == quit:
			c.end(itQuit, true)
		case q.queryType == keys || q.queryType == dump:
			walks = true
		case q.queryType == malformed && !in.spoke && isHTTP(line) &&
			!(isLong && beginsRequest(line)):
			q.queryType = webRequest
			c.end(speaksHTTP, true)
		}
		in.spoke = true
	}
	clear(before[min(len(in.queries), len(before)):]) // what they found may pin memory of the store
	if len(in.queries) == 0 {
		return nil, burst
	}
	for i := range in.queries[1:] {
		in.queries[i].next = &in.queries[i+1]
	}
	return &in.queries[0], burst
}

// trimCR removes one CR, or CR NUL as telnet sends it (RFC 854), from the end
// of line.
func trimCR(line string) string {
	n := len(line)
	switch {
	case n > 0 && line[n-1] == '\r':
		return line[:n-1]
	case n > 1 && line[n-1] == 0 && line[n-2] == '\r':
		return line[:n-2]
	}
	return line
}

// ---- Keys and Dump

// partKeys is how many keys are gone through, or sorted about, before others may work.
const partKeys = 1000

// sortSlice is how many comparisons a sort makes before it lets others work.
const sortSlice = 2000

// list answers a Keys or Dump from one snapshot of the store, in the order of the keys.
// That is work for readFromClient's goroutine alone; workLoop only takes the snapshot. A Dump
// has it until its end, a Keys only until it has copied the keys.
func (c *Client) list(what queryType, prefix string) {
	if !c.takeSnapshotSlot() {
		return
	}
	defer c.freeSnapshotSlot()
	if !c.runBare(&Query{client: c, queryType: collect}) {
		return
	}
	if c.snapshot == nil {
		c.replyAll(&Query{queryType: lastWord, value: "this store cannot list its keys",
			line: c.in.line})
		return
	}
	c.listing, c.waited, c.sent = true, 0, 0
	defer func() { c.listing = false }()
	found, copied, ok := c.find(prefix, what == keys)
	held := int64(cap(found))*stringSize + copied
	c.queued.Add(held)
	defer c.queued.Add(-held)
	if what == keys {
		c.freeSnapshotSlot()
	}
	if !ok || !c.sort(found) {
		return
	}
	n := 0
	for part := range slices.Chunk(found, maxChain) {
		if what == keys {
			n += len(part)
			c.replyAll(&Query{queryType: keys, values: part, bytes: sum(part)})
		} else {
			n += c.dump(part)
		}
		if c.isGone() || c.stopListing(len(found)) {
			return
		}
	}
	c.replyAll(&Query{queryType: listEnd, n: n})
}

// takeSnapshotSlot waits until there may be one more snapshot. It is false if the server closes
// meanwhile.
func (c *Client) takeSnapshotSlot() bool {
	select {
	case c.snapshotSlots <- struct{}{}:
		c.hasSlot = true
		return true
	default:
	}
	c.awaited.Add(1)
	defer c.awaited.Add(-1)
	select {
	case c.snapshotSlots <- struct{}{}:
		c.hasSlot = true
		return true
	case <-c.server.closeSignal:
		c.end(weClose, false)
		return false
	}
}

// freeSnapshotSlot gives the snapshot up, if there is one.
func (c *Client) freeSnapshotSlot() {
	c.snapshot = nil
	if c.hasSlot {
		c.hasSlot = false
		<-c.snapshotSlots
	}
}

// find returns the keys of the snapshot that begin with prefix: the store's own strings, or
// copies, and how many bytes these take. It is false if nobody wants them any more.
func (c *Client) find(prefix string, copies bool) (found []string, copied int64, ok bool) {
	c.takeCore()
	defer c.releaseCore()
	passed := 0
	for key := range c.snapshot.All() {
		if strings.HasPrefix(key, prefix) {
			if copies {
				key = strings.Clone(key)
				copied += int64(len(key))
			}
			found = append(found, key)
		}
		if passed++; passed%partKeys == 0 {
			if c.yieldCore(); c.isGone() || c.stopListing(passed) {
				return found, copied, false
			}
		}
	}
	return found, copied, true
}

// sort sorts keys, and lets others work meanwhile. When the server closes it gives
// up and returns false: millions of keys take seconds.
func (c *Client) sort(keys []string) bool {
	c.takeCore()
	defer c.releaseCore()
	closing, compared := false, 0
	slices.SortFunc(keys, func(a, b string) int {
		if compared++; compared%sortSlice == 0 {
			c.yieldCore()
			closing = closing || c.stopListing(len(keys))
		}
		if closing {
			return 0
		}
		return strings.Compare(a, b)
	})
	return !closing
}

// dump answers the part of a Dump that these keys are. It returns the number of lines.
func (c *Client) dump(part []string) (n int) {
	chain := make([]Query, len(part))
	for i, key := range part {
		q := &chain[i]
		*q = Query{client: c, queryType: pair, key: key}
		q.values = c.snapshot.View(q.few[:0], key)
		q.bytes = sum(q.values)
		n += len(q.values)
		if i > 0 {
			chain[i-1].next = q
		}
	}
	c.replyAll(&chain[0])
	return n
}

// stopListing tells whether the server closes and going through n keys would take too
// long: then the connection ends without a :OK behind it.
func (c *Client) stopListing(n int) bool {
	if n < partKeys || !c.server.isClosing() {
		return false
	}
	c.end(weClose, false)
	return true
}

// ---- outbox: replies to messages

// outboxes is what the outboxes of all clients have in common. They work on many
// goroutines, and the collector's pacer on another, so what they count together is atomic.
// Beside such counters, memory that is used again (sync.Pool), the certificates of the moment,
// and what a store keeps for its own goroutines, nothing here is shared without a channel.
type outboxes struct {
	maxMessage int // bytes in a message: the constant, but for tests
	// bytes that all clients' messages may take (-max-queues); 0: any number
	limit   int64
	queued  atomic.Int64 // bytes that they take
	inputs  atomic.Int64 // bytes of input buffers beyond burstSize, for long lines
	dropped atomic.Int64 // replies that slow readers lost
	used    atomic.Int64 // bytes that workLoop knew of at the start, or after its last Commit (needed)
	other   atomic.Int64 // bytes that were alive beside these after the last collection

	// One slot for each core but one. Who formats or sorts much takes a slot, so the
	// last core stays free for short requests.
	cores chan struct{}

	// One slot for each snapshot that a Keys or Dump has, for each may keep in memory what
	// all others have changed since; and how many wait for one.
	snapshotSlots chan struct{}
	awaited       atomic.Int64
}

// outbox makes replies into messages and queues them for writeToClient. It has
// one rule for a client that does not read: replies share messages, and while
// maxShared of these wait the client's own requests wait; but once the connection
// has taken no byte for slowAfter, each reply is a message of its own, up to
// maxBufferSize of them, and what comes then is dropped.
//
// Whoever holds the client's chain may call its methods, but for tell and tellRoom,
// which are writeToClient's, and isGone, which is everybody's.
type outbox struct {
	*outboxes

	// The holder to writeToClient; readFromClient closes it. workLoop makes it, and
	// starts writeToClient, at the client's first request: 10,000 idle clients
	// need none. Only the holder sends, so room that it sees stays.
	buffer chan []byte

	// Closed by writeToClient when the connection takes no more: spare the rest.
	gone chan struct{}

	// writeToClient to the holder: true, the connection takes bytes, or false, it took
	// none for slowAfter. One slot, for only the latest counts.
	progress chan bool
	hangUp   func() error // closes the connection

	// Owned by the holder.
	acked        bool          // every request is answered
	slow         bool          // the latest from progress was false
	hasCore      bool          // it has a slot of cores
	listing      bool          // a Keys or Dump is being answered
	hasSlot      bool          // and it has a slot of snapshotSlots
	waited       time.Duration // for room, since that began
	sent         int           // bytes of it that were queued
	left         int           // bytes still to be formatted, at most: newMessage chooses a size by it
	next         *Query        // the first whose reply is not formatted, while there is one
	reserved     int64         // bytes of the reply in hand that are counted in queued, and not queued yet
	dropped      int           // replies since the last PONG
	droppedTotal int           // replies in all
	cut          string        // why the outbox ended the connection, if it did
}

// answer sees to the replies of chain, which has run, and to its way back. It
// never waits, for workLoop calls it: what is long, or finds no room, is left to
// a goroutine.
func (c *Client) answer(chain *Query) {
	size, lists := c.measure(chain)
	if size > min(chunkSize, c.maxMessage) || size > 0 && len(c.buffer) > 0 &&
		(len(c.buffer) >= maxShared || c.isOver()) {
		go c.deliver(chain, size, lists)
		return
	}
	c.reply(chain, size)
	c.done <- chain
}

// deliver is answer where that takes time. One goroutine for a chain that needs
// it, until the replies are queued, or dropped.
func (c *Client) deliver(chain *Query, size int, lists int64) {
	c.queued.Add(lists)
	c.takeCore()
	c.reply(chain, size)
	c.releaseCore()
	c.queued.Add(-lists)
	c.done <- chain
}

// replyAll queues the replies of chain, however large they are. It waits for room.
func (o *outbox) replyAll(chain *Query) {
	o.takeCore()
	size, _ := o.measure(chain)
	o.reply(chain, size)
	o.releaseCore()
}

const stringSize = 16 // bytes of a string beside its text

// measure returns how many bytes the replies of chain take, and notes the size of each: 0, and
// nothing, where the connection takes no more. lists is what the lists that chain keeps in
// memory take beside their values: each Get may have another version of one. measure looks at
// no value.
func (o *outbox) measure(chain *Query) (size int, lists int64) {
	if o.isGone() {
		return 0, 0
	}
	acked := o.acked
	for q := chain; q != nil; q = q.next {
		acked = acked || q.queryType == ack
		q.size = q.replySize(acked)
		size += q.size
		lists += int64(len(q.values)) * stringSize
	}
	return size, lists
}

// reply queues the replies that chain's requests are owed, left bytes in all.
// None is formatted before there is room for it.
func (o *outbox) reply(chain *Query, left int) {
	var msg []byte // nil, or begun when there was room
	shared := false
	for q := chain; q != nil; q = q.next {
		o.acked = o.acked || q.queryType == ack
		if q.size == 0 {
			continue
		}
		o.next = q
		if msg != nil && (!shared || len(msg)+q.size > o.maxMessage) {
			o.queue(msg)
			msg = nil
		}
		if msg == nil {
			if o.isGone() {
				return
			}
			if !o.awaitRoom((q.size+o.maxMessage-1)/o.maxMessage, q.mayDrop(o.acked)) {
				o.drop()
				q.values = nil
				left -= q.size
				continue
			}
			o.reserve(q.size)
			if shared = len(o.buffer) < maxShared; shared {
				o.left = left
			} else {
				o.left = q.size
			}
			msg = o.newMessage()
		}
		msg = o.format(msg, q)
		o.release()
		if msg == nil {
			return
		}
		left -= q.size
		if q.queryType == ping {
			o.dropped = 0
		}
	}
	o.next = nil
	if msg != nil {
		o.queue(msg)
	}
}

// keep has the requests whose replies wait keep nothing but their lists in memory.
func (o *outbox) keep() {
	for q := o.next; q != nil; q = q.next {
		q.keep()
	}
	o.next = nil
}

// format appends q's reply to msg. It queues what is full, and returns the message
// that the reply ends in: nil if the connection takes no more.
func (o *outbox) format(msg []byte, q *Query) []byte {
	values := q.values
	q.values = nil // a client that sends nothing more pins no list
	for _, v := range values {
		if len(msg)+q.lineSize(v) <= o.maxMessage {
			msg = q.appendLine(msg, v)
			continue
		}
		for _, text := range q.parts(v) {
			if msg = o.split(msg, text); msg == nil {
				return nil
			}
		}
	}
	if len(msg)+q.endSize() <= o.maxMessage {
		return q.appendEnd(msg, o.acked, o.dropped)
	}
	return o.split(msg, string(q.appendEnd(nil, o.acked, o.dropped)))
}

// split appends text to msg where it does not fit: the message is filled and
// queued, and the text goes on in the next. A reply that was begun always ends, so
// it waits for room.
func (o *outbox) split(msg []byte, text string) []byte {
	for {
		n := min(len(text), o.maxMessage-len(msg))
		msg = append(msg, text[:n]...)
		if text = text[n:]; text == "" {
			return msg
		}
		o.queue(msg)
		if o.awaitRoom(1, false); o.isGone() {
			return nil
		}
		msg = o.newMessage()
	}
}

// drop counts a reply that is not kept.
func (o *outbox) drop() {
	o.dropped++
	o.droppedTotal++
	o.outboxes.dropped.Add(1)
}

// reserve counts a reply of several messages, for which there is room, as queued before
// it is: once begun it must end, whatever others queue meanwhile. There is one exception. A
// reply of more than maxShared messages, of a client with nothing queued, may begin though all
// queues are over their limit; it is not reserved, and waits for room message by message.
func (o *outbox) reserve(size int) {
	if size > o.maxMessage && (len(o.buffer) > 0 || size <= maxShared*o.maxMessage || !o.isOver()) {
		o.reserved = int64(size)
		o.queued.Add(o.reserved)
	}
}

// release gives back what was reserved and not used.
func (o *outbox) release() {
	if o.reserved > 0 {
		o.queued.Add(-o.reserved)
		o.reserved = 0
	}
}

// queue queues a message. There must be room for it.
func (o *outbox) queue(msg []byte) {
	o.left -= len(msg)
	used := min(o.reserved, int64(len(msg)))
	o.reserved -= used
	o.queued.Add(int64(cap(msg)) - used)
	o.buffer <- msg
	o.sent += len(msg)
	o.yieldCore()
}

// isOver tells whether all queues together take more than they may.
func (o *outbox) isOver() bool { return o.limit > 0 && o.queued.Load() >= o.limit }

// hasRoom tells whether n messages may be queued now. Who has nothing queued may
// always begin.
func (o *outbox) hasRoom(n int) bool {
	waiting := len(o.buffer)
	switch {
	case waiting == 0:
		return true
	// Where it has no core it is workLoop, which never waits, and has looked before.
	case o.hasCore && o.reserved == 0 && o.isOver():
		return false
	case o.slow:
		return waiting+n <= maxBufferSize
	}
	return waiting < maxShared
}

// awaitRoom waits until there is room for n messages, and tells whether there is: not if the
// client is slow and its reply may be dropped. A client after Ack, or with a Keys or Dump,
// loses nothing; but the connection of one that takes nothing is cut while all queues are over
// their limit, and that of a Dump also while others wait for theirs: this one also where it takes
// less than a steady reader.
func (o *outbox) awaitRoom(n int, mayDrop bool) bool {
	for {
		if len(o.buffer) > 0 { // else there is room, slow or not
			select {
			case taken := <-o.progress:
				o.slow = !taken
			default:
			}
		}
		if o.hasRoom(n) {
			return true
		}
		if o.slow && mayDrop {
			return false
		}
		if o.slow && o.cut == "" {
			switch {
			case (o.acked || o.listing) && o.isOver():
				o.cut = fmt.Sprintf("it took no replies, and those of all clients take %d bytes "+
					"(-max-queues)", o.queued.Load())
				o.hangUp()
			case o.hasSlot && o.awaited.Load() > 0:
				o.cut = "it took nothing of its Dump, and others wait for theirs"
				o.hangUp()
			}
		}
		if o.hasSlot && o.cut == "" && o.awaited.Load() > 0 && o.isDripping() {
			o.cut = "it took its Dump too slowly, and others wait for theirs"
			o.hangUp()
		}
		had := o.hasCore
		o.releaseCore()
		o.keep()
		began := time.Now()
		o.slow = !<-o.progress
		o.waited += min(time.Since(began), slowAfter) // if more, perhaps we stood still
		if had {
			o.takeCore()
		}
	}
}

// isDripping tells whether a Dump is taken more slowly than any steady reader does.
func (o *outbox) isDripping() bool {
	return o.waited > dripTime && float64(o.sent) < steadyRate*o.waited.Seconds()
}

// tell tells the holder whether the connection takes bytes, in the place of what it
// was told before. pacedConn calls it.
func (o *outbox) tell(taken bool) {
	select {
	case <-o.progress:
	default:
	}
	select {
	case o.progress <- taken:
	default:
	}
}

// tellRoom wakes a holder that waits for room. writeToClient calls it when it has taken a
// message out of buffer. If progress is full nothing is sent: what is in it wakes the holder.
func (o *outbox) tellRoom() {
	select {
	case o.progress <- true:
	default:
	}
}

// isGone tells whether the connection takes no more.
func (o *outbox) isGone() bool { return isClosed(o.gone) }

// takeCore waits for a slot of cores, for work that takes long.
func (o *outbox) takeCore() {
	o.cores <- struct{}{}
	o.hasCore = true
}

// releaseCore gives the slot back, if there is one.
func (o *outbox) releaseCore() {
	if o.hasCore {
		o.hasCore = false
		<-o.cores
	}
}

// yieldCore lets others have a turn in the middle of work that takes long: unasked,
// the scheduler takes 10 ms to do so.
func (o *outbox) yieldCore() {
	if o.hasCore {
		o.releaseCore()
		runtime.Gosched()
		o.takeCore()
	}
}

// chunks and large are messages that have been written, for use again.
var (
	chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}
	large  = sync.Pool{New: func() any { return new([largeSize]byte) }}
)

// newMessage returns an empty message with room for left bytes, or for as many
// as a message holds. A client that keeps up borrows one; what has to wait
// in the queue takes no more memory than it needs.
func (o *outbox) newMessage() []byte {
	size := min(o.left, o.maxMessage)
	switch keepsUp := len(o.buffer) == 0; {
	case keepsUp && size <= chunkSize:
		return chunks.Get().(*[chunkSize]byte)[:0]
	case size == largeSize, keepsUp && size > largeSize/4: // with less, much of it would lie idle
		return large.Get().(*[largeSize]byte)[:0]
	}
	return make([]byte, 0, size)
}

// recycle takes back what newMessage lent.
func recycle(msg []byte) {
	switch cap(msg) {
	case chunkSize:
		chunks.Put((*[chunkSize]byte)(msg[:chunkSize]))
	case largeSize:
		large.Put((*[largeSize]byte)(msg[:largeSize]))
	}
}

// ---- messages to the connection

// writeToClient writes what is queued until readFromClient closes buffer, then
// closes the connection. One goroutine a client, from its first request. A Write
// that fails may have ended inside a line, so it is the last; buffer is still
// drained, so that nobody ever waits for a connection that is gone.
func (c *Client) writeToClient() {
	for msg := range c.buffer {
		msg, size := c.gather(msg)
		c.tellRoom()
		if c.broken == nil {
			if _, c.broken = c.connection.Write(msg); c.broken != nil {
				close(c.gone)
				c.hangUp()
			}
		}
		recycle(msg)
		c.queued.Add(-size)
	}
	if c.broken == nil {
		// TLS says goodbye, and waits 5 s for a client that does not read.
		late := time.AfterFunc(drainTime+closeTime, func() { c.hangUp() })
		if c.drain {
			c.drainInput()
		}
		c.connection.Close()
		late.Stop()
	}
	c.depart()
}

// gather returns msg with what is queued behind it, up to a good Write's worth,
// and how many queued bytes that was.
func (c *Client) gather(msg []byte) (all []byte, size int64) {
	size = int64(cap(msg))
	for len(msg) < maxWrite {
		select {
		case more := <-c.buffer: // nil once closed
			if more == nil {
				return msg, size
			}
			size += int64(cap(more))
			if n := len(msg) + len(more); n > cap(msg) && n <= largeSize {
				together := append(large.Get().(*[largeSize]byte)[:0], msg...)
				recycle(msg)
				msg = together
			}
			msg = append(msg, more...)
			recycle(more)
		default:
			return msg, size
		}
	}
	return msg, size
}

// drainInput ends our side of the connection and reads on until the client ends
// its own, for at most drainTime: closing a socket with unread input resets the
// connection, and the client loses replies that it has not read yet (RFC 1122,
// 4.2.2.13). When the server closes, only clients that are sending get the time.
func (c *Client) drainInput() {
	if half, ok := c.connection.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
	silence := drainTime
	if c.server.isClosing() {
		silence = busyTime
	}
	end := time.Now().Add(drainTime)
	var scratch [4 << 10]byte
	for {
		until := time.Now().Add(silence)
		if until.After(end) {
			until = end
		}
		c.connection.SetReadDeadline(until)
		if _, err := c.connection.Read(scratch[:]); err != nil {
			return
		}
	}
}

// pacedConn is a connection that sees how the other side reads. It lies under
// TLS, where there is any, for a tls.Conn cannot go on after a Write that timed
// out, and this one can.
//
// Its Write waits as long as the other side takes bytes. It looks at that in ticks
// of tickTime, and counts those in which no byte was taken: bytes, not Writes, for
// a Write of 64 KiB to a steady reader of 300 kB/s was seen to take 1.8 s; ticks,
// not time, for if this whole process stands still for a while, that is one tick.
type pacedConn struct {
	net.Conn
	server *keyValueServer
	tell   func(taken bool) // of the client's outbox; nil before there is a client
	limit  time.Time        // by which everything must be written; zero: no such time
	until  time.Time        // the write deadline that is set

	// Bytes that a reader of steadyRate has not read yet, as of looked.
	unread int
	looked time.Time

	// The other side took bytes again after a pause: it reads. (What it has not read only its
	// sockets take, and they do so at once.) False again when it is slow.
	resumed bool
}

// Write writes b. It fails when -write-timeout has passed without a byte, or
// limit has, or the server has been closing for closeTime. It asks for the time only
// where a deadline has passed: doing so for each Write would cost every reply.
func (p *pacedConn) Write(b []byte) (n int, err error) {
	if p.until.IsZero() {
		p.setDeadline(time.Now(), tickTime)
	}
	// Time without a byte taken. The first tick may have begun before us, so it
	// does not count.
	stalled, tick := -tickTime, tickTime
	for {
		m, err := p.Conn.Write(b[n:])
		n += m
		p.unread = min(p.unread+m, socketMost)
		slow := tick == slowAfter
		p.resumed = p.resumed || m > 0 && stalled >= 2*tickTime
		if m > 0 && slow {
			p.tellSlow(false)
			p.until = time.Time{} // it is too far away for the next Write
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		now := time.Now()
		p.unread = max(0, p.unread-int(min(now.Sub(p.looked), time.Minute)*steadyRate/time.Second))
		if end := p.end(); !end.IsZero() && !now.Before(end) {
			return n, err
		}
		if m > 0 {
			stalled, tick = 0, tickTime
		} else {
			if stalled += tick; stalled >= p.patience() {
				tick = slowAfter // look less often
				p.resumed = false
				p.tellSlow(true)
			}
			if most := p.server.writeTimeout; most > 0 && stalled >= most {
				return n, fmt.Errorf("%w for %v (-write-timeout)", errTookNothing, most)
			}
		}
		p.setDeadline(now, tick)
	}
}

// errTookNothing ends a client that has taken no byte for -write-timeout.
var errTookNothing = errors.New("it took nothing")

// tellSlow tells the outbox whether the connection takes nothing.
func (p *pacedConn) tellSlow(slow bool) {
	if p.tell != nil {
		p.tell(!slow)
	}
}

// patience is how long a steady reader may take no byte. That is longer than slowAfter where
// its socket holds much that it has not read: Linux opens a receive window that was closed when a
// sixteenth of the buffer is free, 1.5 s later at steadyRate with 6 MiB (__tcp_select_window).
// Twice that leaves time for its pauses. And it is longer for who is known to read: a window that
// opens by small steps was seen to stand still for 1.7 s between two reads.
func (p *pacedConn) patience() time.Duration {
	patience := slowAfter + time.Duration(p.unread/8)*time.Second/steadyRate
	if p.resumed {
		patience += slowAfter
	}
	return patience
}

// end is when the last Write must have ended; zero: there is no such time.
func (p *pacedConn) end() time.Time {
	if p.server.isClosing() {
		return p.server.closeBy
	}
	return p.limit
}

// setDeadline sees to it that Write returns within a tick.
func (p *pacedConn) setDeadline(now time.Time, tick time.Duration) {
	p.looked, p.until = now, now.Add(tick)
	if end := p.end(); !end.IsZero() && end.Before(p.until) {
		p.until = end
	}
	p.SetWriteDeadline(p.until)
}

// CloseWrite ends our side of the connection.
func (p *pacedConn) CloseWrite() error {
	if half, ok := p.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
