package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits of one connection.
const (
	maxBufferSize = 500       // messages in a client's buffer: what Project 0 keeps for a slow reader
	maxMessage    = 128 << 10 // bytes in one of them, so that all of them stay under 64 MiB
	maxWrite      = 64 << 10  // bytes in one Write, so that a client that reads slowly is seen to read

	// Bytes of the socket's send buffer. Linux wakes a blocked writer when a
	// third of it is free, and left alone it grows to 4 MiB: a steady reader of
	// 1 MB/s would look stalled for longer than slowAfter.
	sendBuffer = 128 << 10

	maxChain  = 256      // queries in one chain, so that no burst keeps workLoop long
	quietSize = 512      // bytes of a quiet client's read buffer
	burstSize = 64 << 10 // bytes of a busy one's, if it needs them; a single long line may take more
	lastLine  = 1 << 10  // bytes of room for most lines that begin in one message and end in the next
	chunkSize = 16 << 10 // bytes of a recycled message, small
	largeSize = maxMessage + lastLine

	slowAfter     = time.Second      // no Write completed for so long, with the buffer full: a slow reader
	quietAfter    = time.Second      // no request for so long: give the scratch memory back
	lineTime      = 30 * time.Second // for a line that was begun to end, counted in ticks of quietAfter, while we read
	handshakeTime = 5 * time.Second  // for TLS to begin

	drainTime = time.Second           // for the client to take our last words and close
	busyTime  = 20 * time.Millisecond // a client that sends nothing for so long has nothing on its way
)

// Client is one connection and what its two goroutines share: readFromClient
// takes requests from the connection to workLoop, in one chain at a time;
// workLoop, or deliver, queues their replies in buffer; writeToClient takes them
// from there to the connection.
type Client struct {
	// Set before the goroutines start, then left alone.
	id         int // counted from 1, for the log
	connection net.Conn
	server     *keyValueServer

	// Owned by workLoop.
	alive    int // the client's goroutines that run; at 0 it leaves clients
	index    int // its place in clients
	reported int // dropped replies that are in the server's count

	// Channels.
	closed  chan struct{} // closed by writeToClient when the connection takes no more: spare the rest
	done    chan *Query   // workLoop, or deliver, to readFromClient: the chain has run and been answered, or nil: it has not and will not; one chain is under way at a time, so with one slot nobody waits
	flushed chan struct{} // writeToClient to whoever has the client's chain: a Write is complete; one slot, for only the latest counts
	buffer  chan []byte   // whoever has the client's chain to writeToClient; readFromClient closes it; workLoop makes it, and starts writeToClient, at the client's first request: 10,000 idle clients need none

	// Owned by whoever has the client's chain: readFromClient while none is under
	// way, then workLoop, and deliver where there is one.
	acked        bool // every request is answered
	slow         bool // no Write was completed for slowAfter while buffer was full
	dropped      int  // replies since the last PONG
	droppedTotal int  // replies in all

	// Owned by readFromClient, until its departure leaves them to whoever is left.
	in       input
	underWay bool   // a chain is, and has not come back
	reason   string // why the connection ends, for the log; "" while it does not
	drain    bool   // it ends by our will: let the client take our last words

	broken error // of the Write that failed; owned by writeToClient, until its departure
}

func newClient(id int, conn net.Conn, s *keyValueServer) *Client {
	return &Client{
		id: id, connection: conn, server: s, alive: 1,
		closed:  make(chan struct{}),
		done:    make(chan *Query, 1),
		flushed: make(chan struct{}, 1),
	}
}

// addr is where the client is, for the log.
func (c *Client) addr() string { return fmt.Sprint(c.connection.RemoteAddr()) }

// readFromClient reads requests and has workLoop run them. One goroutine a
// client, from the connection's arrival until the client has closed its side or
// said Quit, the server closes, or the connection breaks. It reads on while a
// chain is under way, and then waits for that one before it sends the next.
func (c *Client) readFromClient() {
	c.handshake()
	for c.reason == "" {
		burst, err := c.read()
		for burst != "" && c.reason == "" && c.await() {
			var chain *Query
			if chain, burst = c.parse(burst); chain != nil {
				c.serve(chain)
			}
		}
		if c.reason == "" && c.in.pending > c.server.maxLine+len("\r\x00") {
			c.in.skip()
			c.serveFault(tooLong(c.server.maxLine))
		}
		if err != nil && c.reason == "" {
			c.hearLast(err)
		}
	}
	c.await()
	if c.buffer == nil {
		c.connection.Close()
	} else {
		close(c.buffer) // the connection is writeToClient's alone now
	}
	c.depart()
}

// handshake begins TLS, where there is any: here, so that a client that does not
// go on delays nobody.
func (c *Client) handshake() {
	conn, ok := c.connection.(interface {
		HandshakeContext(context.Context) error
	})
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTime)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		c.reason = "TLS handshake: " + err.Error()
		c.server.log.Info("client refused", "client", c.id, "addr", c.addr(), "reason", c.reason)
		underTLS(c.connection).Close()
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
			c.reason = "the store failed"
			return false
		}
	}
	return true
}

// run has workLoop run chain and waits for it: as await does, but without replies.
func (c *Client) run(chain *Query) bool {
	chain.bare = true
	c.send(chain)
	return c.await()
}

// serve has workLoop run chain and see to the replies.
func (c *Client) serve(chain *Query) {
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

// list answers a Keys or Dump: it collects the keys, then, for a Dump, gets
// their lists, in parts between which workLoop serves others. Keys come sorted:
// that also finds those that changed their place during the walk, and were
// passed twice. Keys are shared with the store, so they take no second room.
func (c *Client) list(what queryType, prefix string) {
	walk := &Query{client: c, queryType: collect, value: prefix, line: c.in.line}
	var found []string
	for first := true; first || walk.more != nil; first = false {
		if !c.run(walk) || c.isClosed() || c.isTooLate(len(found)) {
			if walk.stop != nil {
				walk.stop()
			}
			return
		}
		found = append(found, walk.values...)
	}
	if walk.queryType == malformed {
		c.replyAll(walk)
		return
	}
	slices.SortFunc(found, func(a, b string) int {
		if c.server.isClosing() {
			return 0 // millions of keys take seconds
		}
		return strings.Compare(a, b)
	})
	if c.isTooLate(len(found)) {
		return
	}
	found = slices.Compact(found)
	n := 0
	for part := range slices.Chunk(found, maxChain) {
		if what == keys {
			n += len(part)
			c.replyAll(&Query{queryType: keys, values: part})
			continue
		}
		chain := make([]Query, len(part))
		for i, key := range part {
			chain[i] = Query{client: c, queryType: pair, key: key}
			if i > 0 {
				chain[i-1].next = &chain[i]
			}
			part[i] = "" // what is deleted meanwhile need not stay
		}
		if !c.run(&chain[0]) || c.isClosed() || c.isTooLate(len(found)) {
			return
		}
		for i := range chain {
			n += chain[i].n
		}
		c.replyAll(&chain[0])
	}
	c.replyAll(&Query{queryType: done, n: n})
}

// isTooLate tells whether the server closes and a walk past n keys would take too
// long: then the connection ends without a :OK behind it.
func (c *Client) isTooLate(n int) bool {
	if n <= maxCollect || !c.server.isClosing() {
		return false
	}
	c.reason = "the server closes"
	return true
}

// serveFault answers the line that was last read with an error.
func (c *Client) serveFault(why string) {
	q := &Query{client: c, line: c.in.line}
	q.refuse(why)
	if c.await() {
		c.serve(q)
	}
}

func tooLong(maxLine int) string {
	return "longer than " + strconv.Itoa(maxLine) + " bytes, skipped"
}

// hearLast ends the connection because Read ended in err.
func (c *Client) hearLast(err error) {
	switch {
	case errors.Is(err, io.EOF):
		if c.in.pending > 0 {
			c.in.line++
			c.serveFault("the last line has no newline at its end, so it was not run")
		}
		c.reason = "it closed"
	case c.server.isClosing():
		c.reason, c.drain = "the server closes", true
	case err == errSlowLine:
		if !c.in.skipping {
			c.in.line++
		}
		c.serveFault(err.Error())
		c.reason, c.drain = err.Error(), true
	default:
		c.reason = err.Error()
	}
}

// depart tells workLoop that one of the client's goroutines has ended.
func (c *Client) depart() {
	c.server.queries <- &Query{queryType: depart, client: c}
}

// input is what a client has sent and no query has taken yet.
type input struct {
	buf      []byte
	full     bool          // the last Read filled buf
	pending  int           // bytes at the start of buf: a line whose end has not come
	skipping bool          // a line was too long and its end has not come; pending is 0
	skipped  []byte        // the last bytes of that line
	line     int           // lines so far
	spoke    bool          // one of them was not blank, so HTTP cannot begin any more
	queries  []Query       // the memory of the chain, used again for the next
	ticking  bool          // a read deadline is set
	busy     bool          // something came since the last tick
	waited   time.Duration // for the end of the line in pending, or of the one that is skipped
}

// read waits for input and returns its complete lines as one string, of which
// keys and values will be substrings, and the error that ends the input.
func (c *Client) read() (burst string, err error) {
	in := &c.in
	in.grow(c.server.maxLine)
	c.setTick()
	n, err := c.connection.Read(in.buf[in.pending:])
	if n > 0 {
		in.busy = true
		var web bool
		if burst, web = in.take(n); web {
			c.reason, c.drain = speaksHTTP, true
		}
	}
	if in.pending == 0 && !in.skipping {
		in.waited = 0
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.server.isClosing() {
		err = c.tick()
	}
	return burst, err
}

// tick gives back what a quiet client does not need, and ends one whose line does
// not end. Its time does not run while the replies to what came before wait for
// room, and the chain holds memory, too: so tick waits for that.
func (c *Client) tick() error {
	in := &c.in
	c.await()
	if !in.busy {
		in.rest()
	}
	in.ticking, in.busy = false, false
	c.limitRead(time.Time{})
	if in.pending > 0 || in.skipping {
		if in.waited += quietAfter; in.waited > lineTime {
			return errSlowLine
		}
	}
	return nil
}

// errSlowLine ends a client whose line does not end: otherwise a few bytes
// would hold a connection for ever (the Slowloris attack, 2009).
var errSlowLine = fmt.Errorf("the line was begun but not ended within %v", lineTime)

// setTick sees to it that a Read which waits while the client holds memory, or has
// begun a line, ends within quietAfter, so that tick can look at that. One deadline
// serves many Reads: setting one for each would cost every burst.
func (c *Client) setTick() {
	if c.in.ticking || len(c.in.buf) == quietSize && c.in.queries == nil && c.in.pending == 0 && !c.in.skipping {
		return
	}
	c.in.ticking = true
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
	case in.pending == size:
		size = min(2*size, max(maxLine+len("\r\x00\n"), size+1))
	default:
		return
	}
	in.buf, in.full = append(make([]byte, 0, size), in.buf[:in.pending]...)[:size], false
}

// rest gives back what a quiet client does not need.
func (in *input) rest() {
	if in.pending == 0 {
		in.buf, in.full, in.queries = make([]byte, quietSize), false, nil
	}
}

// skip gives up the line in pending, which is too long.
func (in *input) skip() {
	in.skipped = in.skipped[:0]
	in.pass(in.buf[:in.pending])
	in.pending, in.skipping = 0, true
	in.line++
}

// pass notes the end of what is skipped: it tells HTTP from a mere mistake.
func (in *input) pass(b []byte) {
	const enough = len(" HTTP/1.1\r\x00")
	in.skipped = append(in.skipped, b[max(0, len(b)-enough):]...)
	in.skipped = in.skipped[max(0, len(in.skipped)-enough):]
}

// take returns the lines that the n bytes behind pending complete, and whether
// the line that ends before them, skipped, was HTTP's first.
func (in *input) take(n int) (burst string, web bool) {
	end := in.pending + n
	in.full = end == len(in.buf)
	last := in.pending + lastNewline(in.buf[in.pending:end]) + 1
	if last == in.pending {
		if in.skipping {
			in.pass(in.buf[:end])
		} else {
			in.pending = end
		}
		return "", false
	}
	in.waited = 0
	first := 0
	if in.skipping {
		first = bytes.IndexByte(in.buf[:end], '\n') + 1
		in.pass(in.buf[:first-1])
		in.skipping = false
		web = !in.spoke && isHTTP(trimCR(string(in.skipped)))
		in.spoke = true
	}
	burst = string(in.buf[first:last])
	in.pending = copy(in.buf, in.buf[last:end])
	return burst, web
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
	clear(in.queries) // or each would pin the burst that it is of
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
		if len(line) > c.server.maxLine {
			q.refuse(tooLong(c.server.maxLine))
		} else {
			q.parse(line)
		}
		switch {
		case q.queryType == quit:
			c.reason, c.drain = "it quit", true
		case q.queryType == keys || q.queryType == dump:
			walks = true
		case q.queryType == malformed && !in.spoke && isHTTP(line):
			if len(line) <= c.server.maxLine {
				q.queryType = webRequest
			}
			c.reason, c.drain = speaksHTTP, true
		}
		in.spoke = true
	}
	if len(in.queries) == 0 {
		return nil, burst
	}
	for i := range in.queries[1:] {
		in.queries[i].next = &in.queries[i+1]
	}
	return &in.queries[0], burst
}

// speaksHTTP is why a connection ends on which none of the lines may be run: a
// web page could have made a browser send them.
const speaksHTTP = "it speaks HTTP"

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

// answer sees to the replies of chain, which has run, and to its way back. It
// never waits, for workLoop calls it: what is long, or finds no room, is left to
// a goroutine.
func (c *Client) answer(chain *Query) {
	most := min(chunkSize, c.server.maxMessage)
	size := c.measure(chain, most)
	if size > most || size > 0 && len(c.buffer) >= maxBufferSize {
		go c.deliver(chain)
		return
	}
	c.reply(chain, size)
	c.done <- chain
}

// deliver is answer where that takes time. One goroutine for a chain that needs
// it, until the replies are queued, or dropped.
func (c *Client) deliver(chain *Query) {
	c.replyAll(chain)
	c.done <- chain
}

// measure returns how many bytes the replies of chain take, and notes the size
// of each; beyond most it stops.
func (c *Client) measure(chain *Query, most int) (sum int) {
	if c.isClosed() {
		return 0
	}
	acked := c.acked
	for q := chain; q != nil && sum <= most; q = q.next {
		acked = acked || q.queryType == ack
		q.size = q.replySize(acked, most)
		sum += q.size
	}
	return sum
}

// replyAll queues the replies of chain, however large they are.
func (c *Client) replyAll(chain *Query) { c.reply(chain, c.measure(chain, math.MaxInt)) }

// reply queues the replies that chain's requests are owed, left bytes in all.
// Replies travel together, in messages of up to maxMessage bytes, and none is
// formatted before there is room for it.
func (c *Client) reply(chain *Query, left int) {
	maxMessage := c.server.maxMessage
	var msg []byte // nil, or begun when there was room
	for q := chain; q != nil; q = q.next {
		c.acked = c.acked || q.queryType == ack
		if q.size == 0 {
			continue
		}
		values := q.values
		q.values = nil // a client that sends nothing more pins no list
		if msg != nil && len(msg)+q.size > maxMessage {
			left -= len(msg)
			c.queue(msg)
			msg = nil
		}
		if msg == nil {
			if c.isClosed() {
				return
			}
			if !c.awaitRoom((q.size+maxMessage-1)/maxMessage, q.mayDrop(c.acked)) {
				c.dropped++
				c.droppedTotal++
				left -= q.size
				continue
			}
			msg = c.newMessage(left)
		}
		for _, v := range values {
			msg = q.appendLine(msg, v)
			if len(msg) >= maxMessage {
				if c.isClosed() {
					return
				}
				msg, left = c.queueFull(msg, left)
			}
		}
		msg = q.appendEnd(msg, c.acked, c.dropped)
		if len(msg) >= maxMessage {
			msg, left = c.queueFull(msg, left)
		}
		if q.queryType == ping {
			c.dropped = 0
		}
	}
	if len(msg) > 0 {
		c.buffer <- msg
	}
}

// queue queues a message with more behind it, and lets others have a turn:
// unasked, the scheduler takes 10 ms to do so, and a hundred clients with huge
// replies would make everybody wait for seconds.
func (c *Client) queue(msg []byte) {
	c.buffer <- msg
	runtime.Gosched()
}

// queueFull queues the full messages at the start of msg, of which left bytes
// are not queued yet, and returns the begun one that follows them.
func (c *Client) queueFull(msg []byte, left int) ([]byte, int) {
	maxMessage := c.server.maxMessage
	for len(msg) >= maxMessage {
		c.queue(msg[:maxMessage:maxMessage]) // its room is the rest's
		msg = msg[maxMessage:]
		left -= maxMessage
	}
	return append(c.newMessage(left), msg...), left
}

// awaitRoom waits until buffer has room for n messages or is empty, and tells
// whether it has: not if a slow reader's reply may be dropped. Only who has the
// chain adds to buffer, so room that is there stays.
func (c *Client) awaitRoom(n int, mayDrop bool) bool {
	for len(c.buffer) > 0 && maxBufferSize-len(c.buffer) < n {
		if !mayDrop {
			<-c.flushed
			c.slow = false
			continue
		}
		if !c.slow {
			select {
			case <-c.flushed:
				continue
			case <-time.After(slowAfter):
				c.slow = true
			}
		}
		select {
		case <-c.flushed:
			c.slow = false
		default:
			return false
		}
	}
	return true
}

// chunks and large are messages that have been written, for use again.
var (
	chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}
	large  = sync.Pool{New: func() any { return new([largeSize]byte) }}
)

// newMessage returns an empty message with room for size bytes, or for as many
// as a message holds. A client that keeps up borrows one; what has to wait
// in the queue takes no more memory than it needs.
func (c *Client) newMessage(size int) []byte {
	switch keepsUp := len(c.buffer) == 0; {
	case keepsUp && size <= chunkSize:
		return chunks.Get().(*[chunkSize]byte)[:0]
	case keepsUp && size > largeSize/4: // or much of it would lie idle
		return large.Get().(*[largeSize]byte)[:0]
	}
	return make([]byte, 0, min(size, c.server.maxMessage+lastLine))
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

// writeToClient writes what is queued until readFromClient closes buffer, then
// closes the connection. One goroutine a client, from its first request. A Write
// that fails may have ended inside a line, so it is the last; buffer is still
// drained, so that nobody ever waits for a connection that is gone.
func (c *Client) writeToClient() {
	for msg := range c.buffer {
		if c.broken == nil {
			if c.broken = c.write(c.gather(msg)); c.broken != nil {
				close(c.closed)
				underTLS(c.connection).Close()
			}
		}
		recycle(msg)
		c.signalFlushed()
	}
	if c.broken == nil {
		// TLS says goodbye, and waits 5 s for a client that does not read.
		late := time.AfterFunc(drainTime+closeTime, func() { underTLS(c.connection).Close() })
		if c.drain {
			c.drainInput()
		}
		c.connection.Close()
		late.Stop()
	}
	c.depart()
}

// gather returns msg with what is queued behind it, up to a good Write's worth.
func (c *Client) gather(msg []byte) []byte {
	for len(msg) < maxWrite {
		select {
		case more := <-c.buffer: // nil once closed
			if more == nil {
				return msg
			}
			msg = append(msg, more...)
			recycle(more)
		default:
			return msg
		}
	}
	return msg
}

// write writes b in pieces that show awaitRoom whether the client reads.
func (c *Client) write(b []byte) error {
	for len(b) > 0 {
		c.limitWrite()
		n, err := c.connection.Write(b[:min(len(b), maxWrite)])
		if err != nil && (n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) || c.server.isClosing()) {
			return err // but not for a client that accepted a part of it
		}
		b = b[n:]
		if err == nil {
			c.signalFlushed()
		}
	}
	return nil
}

// limitWrite sets the write deadline. While the server closes that is workLoop's,
// for all that is left, and turnAway sets its own.
func (c *Client) limitWrite() {
	if c.server.writeTimeout == 0 || c.id == 0 || c.server.isClosing() {
		return
	}
	c.connection.SetWriteDeadline(time.Now().Add(c.server.writeTimeout))
	if c.server.isClosing() { // workLoop's may have come before ours
		c.connection.SetWriteDeadline(time.Now().Add(closeTime))
	}
}

func (c *Client) signalFlushed() {
	select {
	case c.flushed <- struct{}{}:
	default:
	}
}

func (c *Client) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
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

// ---- the other end: kvserver -c

// Errors of converse.
var (
	errStranger   = errors.New("no welcome")
	errSilent     = errors.New("it closed the connection without a word")
	errUnanswered = errors.New("it closed the connection before everything was answered")
)

// converse sends requests, or else the lines of in, to the server behind conn,
// and writes data to out and errors to errs. It sends and reads at once, so
// neither side waits for the other to finish. It returns whether all requests
// were answered, none with an error. progress, if not nil, is told now and then
// how many were answered so far.
func converse(conn net.Conn, requests []string, in io.Reader, out, errs io.Writer, progress func(n int)) (good bool, err error) {
	if len(requests) > 0 {
		in = strings.NewReader(strings.Join(requests, "\n") + "\n")
	}
	sent := make(chan sending, 1)
	go sendLines(conn, in, sent)

	r, w := bufio.NewReaderSize(conn, maxWrite), bufio.NewWriterSize(out, maxWrite)
	good = true
	answered := -1 // our Ack has an answer, too
	for start := true; ; {
		if r.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return false, fmt.Errorf("writing the answers: %w", err)
			}
		}
		// A line longer than the buffer comes in parts; its first says what it is.
		part, err := r.ReadSlice('\n')
		switch {
		case err == io.EOF && answered < 0:
			return false, errSilent
		case err == io.EOF:
			return wasAll(sent, answered, good, errs)
		case err != nil && err != bufio.ErrBufferFull:
			return false, err
		}
		before := answered
		switch {
		case answered < 0:
			if err := checkWelcome(part); err != nil {
				return false, err
			}
			answered++
		case !start || part[0] != ':':
			w.Write(part)
		case bytes.HasPrefix(part, []byte(": ")):
			w.Write(part[2:])
		case bytes.HasPrefix(part, []byte(":PONG")):
			w.Write(part)
			answered++
		case bytes.HasPrefix(part, []byte(":ERROR line ")):
			good = false
			answered++
			number, why, _ := strings.Cut(string(part[len(":ERROR line "):]), ":")
			n, _ := strconv.Atoi(number)
			w.Flush()
			fmt.Fprintf(errs, "line %d:%s", n-1, why) // our Ack was line 1
		default: // :OK
			answered++
		}
		start = err == nil
		if progress != nil && answered > before && answered%100_000 == 0 {
			progress(answered)
		}
	}
}

// checkWelcome tells whether the first line that comes is a kvserver's answer to
// an Ack.
func checkWelcome(line []byte) error {
	if bytes.HasPrefix(line, []byte(":OK ")) {
		return nil
	}
	if why, full := bytes.CutPrefix(line, []byte(":ERROR line 0: ")); full {
		return fmt.Errorf("%w: %s", errStranger, bytes.TrimSpace(why))
	}
	return fmt.Errorf("%w: this is no kvserver, it says %.40q", errStranger, line)
}

// wasAll returns what converse does when so many requests were answered and no
// more answers come.
func wasAll(sent <-chan sending, answered int, good bool, errs io.Writer) (bool, error) {
	select {
	case s := <-sent:
		switch {
		case s.requests > answered:
			return false, errUnanswered
		case s.err != io.EOF:
			return false, fmt.Errorf("reading the requests: %w", s.err)
		}
		if s.left {
			fmt.Fprintf(errs, "line %d: not sent, for it comes after a Quit\n", s.lines+1)
		}
		return good && !s.left, nil
	default: // not even everything was sent
		return false, errUnanswered
	}
}

// sending is what sendLines has sent.
type sending struct {
	lines    int
	requests int   // lines that are owed an answer: those that are not blank
	left     bool  // there was more behind a Quit
	err      error // that ended in, or io.EOF
}

// sendLines sends in to the server until its end or a Quit, flushes whenever in
// has nothing more to say for now, and then tells what it sent. One goroutine a
// converse.
func sendLines(conn net.Conn, in io.Reader, sent chan<- sending) {
	r, w := bufio.NewReaderSize(in, maxWrite), bufio.NewWriterSize(conn, maxWrite)
	w.WriteString("Ack\n")
	s := sending{err: io.EOF}
	for start, more := true, true; more; {
		if r.Buffered() == 0 && w.Flush() != nil {
			break
		}
		part, err := r.ReadSlice('\n')
		w.Write(part)
		ends := len(part) > 0 && part[len(part)-1] == '\n'
		if start && len(part) > 0 {
			line := trimCR(strings.TrimSuffix(string(part[:min(len(part), 8)]), "\n"))
			s.lines++
			if line != "" || !ends {
				s.requests++
			}
			if ends && lookUp(line) == quit {
				s.left, more = r.Buffered() > 0, false
			}
		}
		start = ends
		if err != nil && err != bufio.ErrBufferFull {
			s.err, more = err, false
		}
	}
	sent <- s
	w.Flush()
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}
