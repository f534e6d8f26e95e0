package main

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
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
	// messages in a client's buffer: as many as Project 0 (of CMU's 15-440) keeps for a slow reader
	maxBufferSize = 500
	maxShared     = 8         // while fewer messages wait, a new one may hold several replies
	maxMessage    = 128 << 10 // bytes in a message
	maxWrite      = 64 << 10  // a Write of this many bytes gets no further message (coalesce)

	// Bytes to ask for as the socket's send buffer, which Linux doubles. Left alone the buffer
	// could grow to 4 MiB, and the kernel would keep that much for a client that does not read.
	sendBuffer = 128 << 10

	maxChain  = 256      // queries in one chain, to bound its memory
	quietSize = 512      // bytes of a quiet client's read buffer
	burstSize = 64 << 10 // bytes of a read buffer; with lines over 8 KiB 4 times that, or one line

	// However much memory others take, a client gets a read buffer of grantedSize bytes and a chain
	// of grantedChain queries, and the key of its waiting Take may have grantedKey bytes.
	grantedSize  = 4 << 10
	grantedChain = 32
	grantedKey   = 2 << 10

	chunkSize = 16 << 10 // bytes of a small recycled message
	largeSize = maxMessage

	// The slowest steady reader takes steadyRate bytes a second, and a begun line that others wait
	// for must come as fast, unless it frees (givesWay). The reader's socket and ours hold at most
	// socketMost bytes together: 6 MiB in the reader's (Linux: tcp_rmem), what ours has, a margin.
	steadyRate = 256 << 10
	socketMost = 8 << 20

	// A client is a slow reader once its connection has taken no byte for slowAfter. If its sockets
	// hold much, this time is up to five times as long; if it was seen to read, slowAfter is added
	// (patience).
	slowAfter = time.Second
	lookTime  = slowAfter / 10 // a tick of a Write, a wait for memory, drainInput, hurry or giveUp
	dripTime  = 5 * slowAfter  // without room, after which the rate of a reader is measured

	// The time between two ticks of readFromClient. A tick gives back memory that was not needed
	// since the last one.
	quietAfter = time.Second

	// How long a line may take from its first byte to its end. Ticks of quietAfter count this time;
	// a tick does not count while replies wait for room, a Take waits, or the line waits for
	// memory.
	lineTime = 30 * time.Second

	// A client that sends more after its Take, or half-closes, is not read until the Take ends.
	// Meanwhile readFromClient checks this often whether the connection is still open.
	probeTime = time.Second

	drainTime = time.Second // for the client to take our last words and close
	// after so much silence a closing server expects nothing more from a client
	busyTime = 20 * time.Millisecond
)

// Client is one connection and what its goroutines share. readFromClient reads requests from the
// connection and sends them to workLoop, one chain at a time. The goroutine that holds the chain
// queues the replies in buffer, and writeToClient writes them to the connection.
//
// One goroutine at a time holds the client's chain. This holder also owns the outbox, and may read
// the chain's lines. The chain goes round:
//
//	readFromClient   makes the chain (parse) and sends it on queries
//	workLoop         has it wait for its turn, and runs it. A Take with seconds that finds no
//	                 value waits in takes. The others wait in batch for the Commit. Then workLoop
//	                 queues replies that are short and have room, and sends the chain back on done
//	deliver          is started by workLoop for all other replies: it waits for room, queues them,
//	                 and sends the chain back on done
//	readFromClient   has the chain again, and may send the next one. If it was a Keys or Dump, it
//	                 queues the replies itself, from the snapshot in the Query (listing)
//
// What each goroutine does with each field (R reads, W writes, S sends, T receives, C closes; for a
// rejected client workLoop does readFromClient's part, in reject), and what hands the field on:
//
//	                     readFromClient  workLoop  deliver  writeToClient  handed on by
//	connection           R, W, C         C         C        R, W, C        - (a net.Conn)
//	alive, index, share  -               RW        -        -              -
//	parked               -               RW        -        -              -
//	buffer               S, C            makes, S  S        T              the chain, to send
//	closed               R               R         R        C              closed once
//	progress             T               -         T        S, T (tell)    the latest word counts
//	done                 T               S         S        -              -
//	the chain, outbox    RW              RW        RW       -              queries, go, done
//	in                   RW              -         -        R (newBytes)   closing buffer
//	  its lines' memory  RW              R         R        -              queries, go, done
//	underWay, takeUntil  RW              -         -        -              -
//	reason               RW              R         -        -              depart
//	writeErr             -               R         -        RW             depart
//	pacedConn's fields   RW              R         R        RW             - (see there)
//
// How a connection ends, most often:
//
//	readFromClient   notes the reason (setReason), reads no more, and waits for the chain under
//	                 way. Then it closes buffer, tells workLoop (depart), and ends
//	writeToClient    writes what is queued, closes the connection, tells workLoop, and ends. If TLS
//	                 cannot say goodbye in time, a timer closes the connection (inTime)
//	workLoop         forgets the client when both have ended, and logs the reason (leave)
//
// Requests that were read before the reason came up are still run, except those after a Quit or a
// foreign first line, and unless the store has failed, or the closing server broke off a Keys or
// Dump before them. Other ways to end:
//
//	a Write fails                 writeToClient closes the channel closed: the chain's holder need
//	                              not reply. Then it closes the connection, so that Read fails
//	others need the memory that   the chain's holder closes the connection (isCutOff): Read and
//	its replies take              Write fail
//	the store's Commit fails      workLoop closes all connections without a word, and sends nil on
//	                              done for each chain
//	the server closes             workLoop ends all Reads (stopReading), and after closeTime all
//	                              Writes (hurry)
//	it has asked for nothing      there is no writeToClient: readFromClient closes the connection
//	it never becomes a client     receive, shakeHands, fewConns, welcome or reject closes the
//	                              connection, or the writeToClient that reject has started
type Client struct {
	// The fields that Project 0 has.
	connection net.Conn
	alive      int           // how many of its two goroutines run; 0: the client has gone
	closed     chan struct{} // closed by writeToClient when a Write has failed (isGone)

	// Messages from the chain's holder to writeToClient. workLoop makes it and starts writeToClient
	// at the client's first request, because 10,000 idle clients need neither. readFromClient
	// closes it, or reject. Only the chain's holder sends: if it has seen room, there is still room
	// when it sends.
	buffer chan []byte

	// Set before the goroutines start, read-only from then on.
	id     int // counted from 1, for the log; 0: rejected
	server *keyValueServer
	paced  *pacedConn // connection itself, or the one under its TLS

	// From workLoop or deliver to readFromClient: the chain, which has run (a dropped Take perhaps
	// not) and is answered; a Keys or Dump is not answered yet. nil: the store failed, and nobody
	// knows whether the chain has taken effect. One is under way at a time, so one slot is enough.
	done chan *Query

	// From writeToClient to the chain's holder: true if buffer has room again or the connection
	// takes bytes again, false if it took none for too long. One slot, because only the latest word
	// counts.
	progress chan bool

	index  int           // the client's place in clients; owned by workLoop
	share  share         // of workLoop's time; owned by workLoop
	parked *list.Element // the client's waiting Take in takes; owned by workLoop
	outbox outbox        // owned by the chain's holder

	// Owned by readFromClient. When it departs, it leaves in.newBytes to writeToClient, and reason
	// to workLoop.
	in        input
	underWay  bool      // a chain was sent, and readFromClient has not waited for it yet (await)
	takeUntil time.Time // when the waiting Take is told to stop; zero: none waits, or it was told
	reason    string    // why the connection ends, for the log; "": it does not

	writeErr error // of the Write that failed; owned by writeToClient until its departure
}

// newClient returns the client at the other end of conn.
func newClient(id int, conn net.Conn, s *keyValueServer) *Client {
	c := &Client{
		id: id, connection: conn, server: s, alive: 1,
		closed:   make(chan struct{}),
		done:     make(chan *Query, 1),
		progress: make(chan bool, 1),
	}

	// The connection of a test may come without a pacedConn.
	if c.paced, _ = underTLS(conn).(*pacedConn); c.paced == nil {
		c.paced = &pacedConn{Conn: conn, server: s}
		c.connection = c.paced
	}
	c.paced.progress = c.progress

	c.outbox = outbox{client: c, budget: &s.budget, maxMessage: s.maxMessage,
		core: slot{of: &s.cores}}
	return c
}

// underTLS returns the connection under conn's TLS, or conn itself if it has none.
func underTLS(conn net.Conn) net.Conn {
	if outer, isTLS := conn.(interface{ NetConn() net.Conn }); isTLS {
		return outer.NetConn()
	}
	return conn
}

// isPlain reports whether the connection is without TLS.
func (c *Client) isPlain() bool { return c.connection == c.paced }

// isGone reports whether a Write has failed. Any goroutine may ask.
func (c *Client) isGone() bool { return isClosed(c.closed) }

// addr returns the client's address, for the log.
func (c *Client) addr() string { return fmt.Sprint(c.connection.RemoteAddr()) }

// readFromClient reads requests and has workLoop run them. It is one goroutine per client, from the
// connection's arrival until there is a reason to end. While a chain is under way it reads on;
// before it sends the next one it waits for the chain that is under way.
func (c *Client) readFromClient() {
	for c.reason == "" {
		burst, err := c.readLines()

		// Run the complete lines: one chain after the other, until there is a reason to end.
		for burst != "" && c.reason == "" && c.await() {
			var chain *Query
			if chain, burst = c.parse(burst); chain != nil {
				c.submit(chain)
			}
		}

		// The line that is not complete.
		switch {
		case c.reason != "":
		case err != nil:
			c.endInput(err)

		// maxLine does not count the line's end. Telnet ends a line with CR NUL LF, of which the LF
		// may not be here yet.
		case c.in.pending > c.server.maxLine+len("\r\x00"):
			c.skipLine(tooLong(c.server.maxLine))
		}
	}

	// The end. The chain under way is still answered, and its lines are in memory until then.
	c.in.lineSlot.release()
	c.in.pending = 0
	c.resizeBuf(0)
	c.await()
	c.in = input{line: c.in.line, newBytes: c.in.newBytes, counted: c.in.counted, granted: c.in.granted}
	c.countInput()
	c.server.budget.giveUpEnded(0)
	c.tellLoss()

	// A client that has asked for nothing has no writeToClient.
	if c.buffer == nil {
		c.connection.Close()
	} else {
		close(c.buffer) // now writeToClient closes the connection
	}
	c.depart()
}

// ---- input: bytes to lines, and lines to chains

// input turns what a client sends into lines. readFromClient owns it, except lent and queries while
// a chain that was made of them is under way: then the chain's holder owns these two.
type input struct {
	buf      []byte
	lent     []byte  // the buffer before buf: the strings of the chain under way point into it
	filled   bool    // the last Read filled buf
	pending  int     // bytes at the start of buf: a line that has begun and not ended
	line     int     // lines so far
	hadLine  bool    // a line was not blank, so HTTP cannot begin any more
	queries  []Query // memory of the chain, used again for the next one
	skipping bool    // the rest of a refused line is being skipped; pending is 0
	forLine  bool    // buf is larger than a burst's may be, for the begun line alone
	counted  int64   // bytes of buf, lent, queries and a Take's key that are counted in budget.inputs
	granted  int64   // those of buf, lent and queries that are counted in budget.granted
	takeKey  int     // bytes of a waiting Take's key, if it is long
	lineSlot slot    // of budget.anyLine or budget.freeing: buf may grow until the begun line ends

	ticking     bool          // a read deadline is set
	begunAtTick bool          // a line has begun, and was there when the deadline was set
	hardlyCame  bool          // the begun line hardly came in the last tick
	newBytes    int           // bytes read since the last tick
	lineTook    time.Duration // how long the begun line has been read
}

// midLine reports whether a line has begun and not ended.
func (in *input) midLine() bool { return in.pending > 0 || in.skipping }

// readLines waits for input. It returns the complete lines as one string, whose substrings will be
// keys and values, and the error that ends the input; a tick is no error. The string is good until
// the next wholeLines or passOn, and until then the chain's holder may read it.
func (c *Client) readLines() (burst string, err error) {
	in := &c.in
	if !c.resizeInput() {
		return "", nil
	}

	// Read may wait for hours, but while the client holds memory a tick ends it.
	c.setTick()
	space := in.buf[in.pending:]
	if in.forLine { // read little of the next line: only little can be moved out of the large buffer
		space = space[:min(len(space), grantedSize)]
	}
	n, err := c.connection.Read(space)

	if n > 0 {
		in.newBytes += n

		// A TLS client sends its hello first, and no line in that may be run.
		if in.line == 0 && in.buf[0] == tlsHandshake && c.isPlain() {
			in.line = 1
			c.answerFault("this port speaks no TLS")
			c.setReason(speaksTLS)
			return "", nil
		}

		// The chain under way is made of the other buffer, which wholeLines uses next.
		c.await()
		burst = in.wholeLines(n)
	}

	// A deadline that has passed means a tick, unless the server closes.
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.server.isClosing() {
		err = c.tick()
	}
	return burst, err
}

// tlsHandshake is the first byte of a TLS connection: a record of this type
// (RFC 8446, 5.1).
const tlsHandshake = 0x16

// wholeLines takes in n bytes, which Read has put after the pending ones. It returns the lines
// that are complete now. If a line is being skipped and ends among these bytes, the skipping ends.
//
// The lines are not copied. They stay in the buffer into which they were read, and the two buffers
// change places, so that the next Read uses the other one. readLines waits for the chains that were
// made of the lines (await) before it calls wholeLines again: by then the store has copied the keys
// and values that it keeps.
func (in *input) wholeLines(n int) (burst string) {
	end := in.pending + n
	in.filled = end == len(in.buf)
	last := in.pending + lastNewline(in.buf[in.pending:end]) + 1

	// No line is complete.
	if last == in.pending {
		if !in.skipping {
			in.pending = end
		}
		return ""
	}

	// The next line gets the whole time. A slot is given back now, because the requests of this
	// burst may wait long for room.
	in.lineTook, in.begunAtTick, in.hardlyCame = 0, false, false
	in.lineSlot.release()

	// The rest of a skipped line is not part of the burst.
	start := 0
	if in.skipping {
		start = bytes.IndexByte(in.buf[:end], '\n') + 1
		in.skipping = false
	}

	// The complete lines stay where they are. The begun line goes on in the other buffer.
	read := in.buf
	burst = unsafe.String(unsafe.SliceData(read[start:]), last-start)
	if size := in.lentSize(len(read)); len(in.lent) != size {
		in.lent = make([]byte, size)
	}
	in.buf, in.lent = in.lent, read
	in.pending = copy(in.buf, read[last:end])
	return burst
}

// lastNewline returns the index of the last newline in b, or -1. It searches block by block with
// IndexByte, because bytes.LastIndexByte looks at one byte at a time, and lines may be long.
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

// parse makes a chain of the first lines of burst, and returns it with the lines that are left. The
// chain is nil if all lines are blank. A Keys, a Dump, or a Take that may wait is a chain of its
// own. A Quit is the last request of its chain and of its connection.
func (c *Client) parse(burst string) (chain *Query, rest string) {
	in := &c.in
	before := in.queries
	in.queries = in.queries[:0]

	for alone := false; burst != "" && c.reason == "" && !alone; {
		// A chain of more than grantedChain queries needs memory. Without that the chain ends here.
		n := len(in.queries)
		if n == maxChain || n >= grantedChain && n == cap(in.queries) &&
			!c.acquireInput(len(in.buf), 2*n, c.server.budget.forBursts()) {
			break
		}
		end := strings.IndexByte(burst, '\n')
		line, whole := trimCR(burst[:end]), burst
		burst = burst[end+1:]
		in.line++
		if line == "" {
			continue
		}

		// A line that is no request keeps its place: its error is answered in turn.
		in.queries = append(in.queries, Query{})
		q := &in.queries[len(in.queries)-1]
		q.client, q.line = c, in.line
		isLong := len(line) > c.server.maxLine
		if isLong {
			q.refuse(tooLong(c.server.maxLine))
		} else {
			q.parse(line)
		}

		// The requests before such a request are a chain of their own.
		if alone = q.isAlone(); alone && len(in.queries) > 1 {
			in.queries, in.line, burst = in.queries[:len(in.queries)-1], in.line-1, whole
			break
		}

		// Some lines are the connection's last.
		if q.queryType == quit {
			c.setReason(itQuit)
		}
		if !in.hadLine && q.queryType == malformed {
			c.endIfForeign(q, line, isLong)
		}
		in.hadLine = true
	}

	// The older queries may still point to values of the store: let go of them.
	clear(before[min(len(in.queries), len(before)):])
	if len(in.queries) == 0 {
		return nil, burst
	}

	// Link them only now, because append may have moved them.
	for i := range in.queries[1:] {
		in.queries[i].next = &in.queries[i+1]
	}
	return &in.queries[0], burst
}

// endIfForeign ends the connection if its first line, of which q was made, seems to be another
// protocol's, and not just a wrong request.
func (c *Client) endIfForeign(q *Query, line string, isLong bool) {
	switch {
	case isLong && begun(line) != malformed: // a request that is too long
	case isLong:
		c.setReason(speaksNothing)
	case isHTTP(line):
		q.queryType, q.args[0] = foreign, badRequest
		c.setReason(speaksHTTP)
	case isRESP(line):
		q.queryType, q.args[0] = foreign, badRESP
		c.setReason(speaksRESP)
	}
}

// trimCR removes one CR, or the CR NUL that telnet sends (RFC 854), from the end of line.
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

// ---- chains: to workLoop and back

// submit has workLoop run chain. For a Keys or Dump it also queues the replies.
func (c *Client) submit(chain *Query) {
	switch {
	case chain.row().lists:
		c.list(chain)
	case chain.mayWait():
		c.sendTake(chain)
	default:
		c.send(chain)
	}
}

// send sends chain, which is made of the client's input, to workLoop. No other is under way.
func (c *Client) send(chain *Query) {
	c.countInput()
	c.sendOf(chain, len(c.in.lent))
}

// sendOf is send for a chain whose lines take text bytes of memory until it is answered.
func (c *Client) sendOf(chain *Query, text int) {
	short := burstSize // what lines that are not long may take
	if c.in.forLine {
		short = grantedInput
	}

	c.underWay = true
	c.outbox.waitingText = int64(max(0, text-short))
	c.server.queries <- chain
}

// sendTake is send for a Take that may wait. Such a Take gets memory of its own, because the
// client's is used for what comes meanwhile.
func (c *Client) sendTake(q *Query) {
	// The key stays in memory while the Take waits. A long key counts like a begun line. If there
	// is no memory for it, the Take does not wait.
	in := &c.in
	if bytes := len(q.key); bytes > grantedKey {
		if b := &c.server.budget; !addUpTo(&b.inputs, int64(bytes), b.forInput()) {
			q.seconds = 0
			c.send(q)
			return
		}
		in.takeKey = bytes
		in.counted += int64(bytes)
	}

	c.takeUntil = time.Now().Add(time.Duration(q.seconds) * time.Second)
	c.sendOf(&Query{client: c, queryType: take, key: strings.Clone(q.key), seconds: q.seconds,
		line: q.line}, in.takeKey)
}

// await waits for the chain that is under way, if there is one. If the store failed, so that nobody
// knows whether the chain has taken effect, await ends the connection and returns false.
func (c *Client) await() bool {
	if c.underWay {
		c.underWay = false
		if c.awaitDone() == nil {
			c.setReason("the store failed")
			return false
		}
	}
	return true
}

// awaitDone waits for the chain that is under way to come back. If that is a Take, which may wait
// long, awaitDone looks now and then whether the connection is still open, because nobody reads it
// meanwhile.
func (c *Client) awaitDone() (chain *Query) {
	for c.mayTakeWait() {
		// If the Take's time is over, tell workLoop. A value may still come before it hears of
		// that.
		left := time.Until(c.takeUntil)
		if left <= 0 {
			c.stopWaiting(stopTake)
			break
		}

		// A Take takes nothing for a client that has gone, or once the server closes.
		select {
		case chain = <-c.done:
			c.noteTaken()
			return chain
		case <-time.After(min(left, probeTime)):
			if c.paced.isBroken() {
				c.stopWaiting(dropTake)
			}
		case <-c.closed:
			c.stopWaiting(dropTake)
		case <-c.server.closeSignal:
			c.stopWaiting(dropTake)
		}
	}

	return <-c.done
}

// mayTakeWait reports whether the chain that is under way is a Take that may wait, and was not told
// to stop.
func (c *Client) mayTakeWait() bool { return !c.takeUntil.IsZero() }

// noteTaken notes that no Take waits any more, or that it is told to stop. The read deadline may
// have been set for its end, so setTick has to set another.
func (c *Client) noteTaken() {
	c.takeUntil, c.in.ticking, c.in.takeKey = time.Time{}, false, 0
}

// stopWaiting tells workLoop to end the waiting Take, if there is one. how is stopTake or dropTake.
func (c *Client) stopWaiting(how queryType) {
	if c.mayTakeWait() {
		c.noteTaken()
		c.server.queries <- &Query{queryType: how, client: c}
	}
}

// ---- input: its time

// setTick sets a read deadline if the client holds memory or has begun a line. Read then ends
// within quietAfter, so that tick can give memory back and count the line's time. (While a Take may
// wait, Read ends at the latest with the Take's time.) One deadline serves many Reads, because
// setting one for each would slow down every burst.
func (c *Client) setTick() {
	in := &c.in

	// A client that holds nothing may be silent for as long as it likes.
	isQuiet := len(in.buf) == quietSize && in.queries == nil && !in.midLine() && in.takeKey == 0
	if in.ticking || isQuiet && !c.mayTakeWait() {
		return
	}

	// The end of a Take's waiting is a tick, too.
	end := time.Now().Add(quietAfter)
	if c.mayTakeWait() && (isQuiet || c.takeUntil.Before(end)) {
		end = c.takeUntil
	}
	in.ticking, in.begunAtTick = true, in.midLine()
	c.limitRead(end)
}

// limitRead sets the read deadline. When the server closes, workLoop sets one that has passed.
// limitRead may just have overwritten that, and then sets it again.
func (c *Client) limitRead(end time.Time) {
	c.connection.SetReadDeadline(end)
	if c.server.isClosing() {
		c.connection.SetReadDeadline(time.Now())
	}
}

// tick gives back memory that a quiet client does not need, gives up a line that hardly comes if
// others wait for its memory, and returns errUnended if the line takes too long. It waits for the
// chain under way first, because that holds memory, but not for a Take that waits. So a line's time
// stands still while replies to earlier requests wait for room.
func (c *Client) tick() error {
	in := &c.in

	// A Take that waits has memory of its own, so nothing below touches it.
	waits := time.Now().Before(c.takeUntil) && len(c.done) == 0
	if !waits {
		c.await()
	}

	// A line that was there at the last tick, and hardly comes, gives way to others that wait.
	isOld := in.begunAtTick && !waits
	if isOld && in.givesWay(&c.server.budget) {
		c.skipLine(tooLongNow)
	}

	c.shrinkInput()

	// A line that had begun when the deadline was set has taken one tick more.
	c.limitRead(time.Time{})
	if isOld {
		if in.lineTook += quietAfter; in.lineTook >= lineTime {
			return errUnended
		}
	}

	in.ticking, in.newBytes = false, 0
	return nil
}

// givesWay notes how much of the begun line, which was there at the last tick, has come since. It
// reports whether the line is to give its memory up: if it has hardly come in two ticks in a row,
// and others wait for memory. (In a single tick the server perhaps did not run, or did not read.) A
// line that frees stays while it comes at all, unless others that free wait.
func (in *input) givesWay(b *budget) bool {
	least, hardlyCameBefore := steadyRate, in.hardlyCame
	if in.isFreeing() && b.freeing.waiting.Load() == 0 {
		least = 1
	}
	in.hardlyCame = in.pending >= grantedSize && in.newBytes < least
	return hardlyCameBefore && in.hardlyCame && b.anyLine.waiting.Load() > 0
}

// errUnended ends a client whose line does not end. Otherwise a few bytes would hold a connection
// for ever (the Slowloris attack, 2009).
var errUnended = fmt.Errorf("the line was begun but not ended within %v", lineTime)

// ---- input: its memory

// need returns how many bytes more than a quiet client's the input takes if buf has size bytes and
// the chain holds so many queries. granted is what every client may have, and beyond is the rest.
func (in *input) need(size, queries int) (granted, beyond int64) {
	buffers := size + max(in.lentSize(size), len(in.lent))
	all := max(0, buffers-2*quietSize) + queries*querySize
	granted = int64(min(all, grantedInput))
	return granted, int64(all+in.takeKey) - granted
}

// lentSize returns the size of the other buffer, with which buf, of size bytes, changes places.
// After a long line only little is read.
func (in *input) lentSize(size int) int {
	if in.forLine {
		return min(size, grantedSize)
	}
	return size
}

// grantedInput is how many bytes the input of each client may take however much others take: two
// buffers and a chain.
const grantedInput = 2*grantedSize + grantedChain*querySize

// querySize is how many bytes a query in a chain takes.
const querySize = int(unsafe.Sizeof(Query{}))

// resizeInput makes buf as large as it is to be for the next Read: larger after a Read that filled
// it. If buf is full of one line without its end, resizeInput waits for memory. It returns false if
// the connection is to end.
func (c *Client) resizeInput() bool {
	in, b, size := &c.in, &c.server.budget, len(c.in.buf)

	// The long line has ended, and others may need its memory.
	if in.forLine && in.pending < grantedSize {
		in.forLine, size = false, min(size, grantedSize)
		c.resizeBuf(size)
		if !c.mayTakeWait() { // such a Take has memory of its own
			c.await()
		}
		c.passOn()
	}

	switch next := min(8*size, burstSize); {
	case size == 0:
		size = quietSize
	case in.filled && size < next && c.acquireInput(next, cap(in.queries), b.forBursts()):
		size = next

	// The lines are long: in a larger buffer fewer of them are incomplete, and have to be copied.
	case in.filled && in.pending > size/8 && size < 4*burstSize &&
		c.acquireInput(2*size, cap(in.queries), b.forBursts()):
		size *= 2

	// The line may have maxLine bytes and its end.
	case in.pending == size:
		size += min(size, max(c.server.maxLine+len("\r\x00\n")-size, 1))
		if !c.acquireInput(size, cap(in.queries), b.forBursts()) {
			in.forLine = true
			if !c.acquireForLine(size) && !c.awaitLineMemory(size) {
				return false
			}
			size = max(size, len(in.buf)) // another line's buffer may be larger
		}
	}

	c.resizeBuf(size)
	return true
}

// acquireInput counts in budget.inputs what a buf of size bytes and a chain of so many queries
// take, unless all inputs together would then take more than most bytes. It reports whether it did.
func (c *Client) acquireInput(size, queries int, most int64) bool {
	_, need := c.in.need(size, max(queries, grantedChain)) // each client may have so many
	more := max(0, need-c.in.counted)
	if more > 0 && !addUpTo(&c.server.budget.inputs, more, most) {
		return false
	}
	c.in.counted += more
	return true
}

// acquireForLine is acquireInput for the begun line. Rather than new memory, the line gets the
// buffer of a line that has ended, if there is one.
func (c *Client) acquireForLine(size int) bool {
	b := &c.server.budget
	for {
		select {
		case ended := <-b.ended:
			if c.takeOver(ended, size) {
				return true
			}
		default:
			return b.mayTakeLines() && c.acquireInput(size, cap(c.in.queries), b.forInput())
		}
	}
}

// endedLine is the buffer of a long line that has ended, for another long line of any client. To
// make one for each line would make much garbage.
type endedLine struct {
	buf     []byte
	counted int64 // its bytes that stay counted in budget.inputs
	at      time.Time
}

// passOn gives up the memory of the long line that has ended, and of its chain. Others may have the
// buffer, unless there are maxEnded, or all inputs together have more than forInput.
func (c *Client) passOn() {
	in, b := &c.in, &c.server.budget
	ended := endedLine{in.lent, min(in.counted, int64(len(in.lent))), time.Now()}
	in.lent, in.queries = nil, nil

	if len(ended.buf) > grantedSize && b.inputs.Load() <= b.forInput() {
		select {
		case b.ended <- ended:
			in.counted -= ended.counted
			b.endedAt.Store(ended.at.UnixNano())
		default:
		}
	}
	c.countInput()
}

// takeOver makes ended's buffer the client's buf, if it has size bytes and long lines may get
// memory. Otherwise it gives the buffer up.
func (c *Client) takeOver(ended endedLine, size int) bool {
	in, b := &c.in, &c.server.budget
	if len(ended.buf) < size || !b.mayTakeLines() {
		b.inputs.Add(-ended.counted)
		return false
	}

	copy(ended.buf, in.buf[:in.pending])
	in.buf, in.filled = ended.buf, false
	in.counted += ended.counted
	c.countInput()
	return true
}

// giveUpEnded gives up the buffer of one ended line, if the time since its end is least or more.
// Each client calls it when it becomes quiet and when it goes, so there are no more such buffers
// than clients that use them; a busy client calls it at each tick, with quietAfter.
func (b *budget) giveUpEnded(least time.Duration) {
	select {
	case ended := <-b.ended:
		if time.Since(ended.at) < least {
			select {
			case b.ended <- ended:
				return
			default: // others have filled the place
			}
		}
		b.inputs.Add(-ended.counted)
	default:
	}
}

// awaitLineMemory waits until buf may have size bytes for the begun line. What a line may take:
//
//   - like a burst, a part of half of forInput (resizeInput);
//   - a part of all forInput, unless lines whose replies wait take too much (mayTakeLines);
//   - a buffer of that part, from a line that has ended (passOn);
//   - whatever it needs, if it has the only slot of anyLine: without this slot all lines, half
//     read, could wait for each other for ever;
//   - whatever it needs, if it has the only slot of freeing, which is for requests that free.
//
// A line that hardly comes gives way to others that wait (givesWay). awaitLineMemory returns false
// if the connection is to end.
func (c *Client) awaitLineMemory(size int) bool {
	in, b := &c.in, &c.server.budget

	// A client that waits for its own replies must not keep others from a slot.
	if !c.await() {
		return false
	}

	b.anyLine.waiting.Add(1)
	defer b.anyLine.waiting.Add(-1)
	if in.isFreeing() {
		b.freeing.waiting.Add(1)
		defer b.freeing.waiting.Add(-1)
	}

	// While other lines end, the buffer of one comes soon, and a slot would make more garbage.
	isSoon := time.Now().UnixNano()-b.endedAt.Load() < int64(lookTime)

	// Nobody tells when there is other memory again, so this looks now and then.
	for ; len(in.buf) < size && !in.lineSlot.taken && !c.acquireForLine(size); isSoon = false {
		var anyLine, freeing chan struct{} // nil: not now
		if !isSoon && c.mayHaveSlot(&b.anyLine) {
			anyLine = b.anyLine.slots
		}
		if !isSoon && c.mayHaveSlot(&b.freeing) {
			freeing = b.freeing.slots
		}

		select {
		case ended := <-b.ended:
			c.takeOver(ended, size)
		case anyLine <- struct{}{}:
			in.lineSlot = slot{of: &b.anyLine, taken: true}
		case freeing <- struct{}{}:
			in.lineSlot = slot{of: &b.freeing, taken: true}
		case <-time.After(lookTime):
		case <-c.server.closeSignal:
			c.setReason(weClose)
			return false
		}

		// While this client waited for the slot, others may have taken the memory.
		if in.lineSlot.taken && !c.mayHaveSlot(in.lineSlot.of) {
			in.lineSlot.release()
		}
	}

	// Nothing was read meanwhile, so a whole tick begins.
	in.ticking, in.hardlyCame, in.newBytes = false, false, 0
	return true
}

// mayHaveSlot reports whether the begun line may have a slot of anyLine or freeing now. A request
// that frees makes memory for all others, so freeing is for these alone. Lines that had a slot may
// keep their memory for long after their ends, because a Commit lasts, a Keys waits for its turn,
// or nobody reads replies: so they have a limit. All input and waiting lines together may have the
// shares of input and of queues, and one maxLine more, so that a single line is never refused.
func (c *Client) mayHaveSlot(of *semaphore) bool {
	b := &c.server.budget
	switch {
	case b.inputs.Load()+b.waitingLines.Load() > b.forInput()+b.forQueues()+int64(c.server.maxLine):
		return false
	case of == &b.freeing:
		return c.in.isFreeing()
	}
	return b.mayTakeLines()
}

// isFreeing reports whether the begun line is a request that frees.
func (in *input) isFreeing() bool { return begun(in.buf[:in.pending]).row().effect == frees }

// countInput makes counted what the input needs now.
func (c *Client) countInput() {
	in, b := &c.in, &c.server.budget
	granted, counted := in.need(len(in.buf), cap(in.queries))
	if granted != in.granted || counted != in.counted {
		b.granted.Add(granted - in.granted)
		b.inputs.Add(counted - in.counted)
		in.granted, in.counted = granted, counted
	}
}

// resizeBuf makes buf size bytes long, and keeps what is pending.
func (c *Client) resizeBuf(size int) {
	if in := &c.in; size != len(in.buf) {
		in.buf = append(make([]byte, 0, size), in.buf[:in.pending]...)[:size]
		in.filled = false
	}
	c.countInput()
}

// shrinkInput gives back memory that the client did not need since the last tick. No chain is under
// way, except a Take that waits, or an error, which have memory of their own.
func (c *Client) shrinkInput() {
	in := &c.in
	clear(in.queries[:cap(in.queries)]) // what they found could pin memory of the store

	// The smallest size that would have been enough.
	size := quietSize
	for size <= max(in.newBytes, in.pending) {
		size *= 8
	}

	least := quietAfter // for a buffer that a busy client may soon use again
	if size == quietSize {
		least = 0
	}
	c.server.budget.giveUpEnded(least)
	if size < burstSize {
		in.lent, in.queries = nil, nil
	}
	c.resizeBuf(min(size, len(in.buf)))
}

// ---- the end of the input

// Why a connection ends: texts for the log. tellLoss looks for the first two.
const (
	itClosed = "it closed"
	itQuit   = "it quit"
	weClose  = "the server closes"

	// No line of the client's may be run: a web page may have made a browser send them, or they are
	// pieces of binary data.
	speaksHTTP    = "it speaks HTTP"
	speaksRESP    = "it speaks RESP"
	speaksTLS     = "it speaks TLS"
	speaksNothing = "its first line is too long, and none of our requests"
)

// setReason notes why nothing more is read. The first reason stays.
func (c *Client) setReason(why string) {
	if c.reason == "" {
		c.reason = why
	}
}

// skipLine has the begun line skipped, and answers an error.
func (c *Client) skipLine(why string) {
	// A first line that begins no request may be another protocol's: what follows could be
	// anything.
	in := &c.in
	isOurs := in.hadLine || begun(in.buf[:in.pending]) != malformed

	in.lineSlot.release()
	in.pending, in.skipping, in.hadLine = 0, true, true
	in.line++
	c.answerFault(why)
	if !isOurs {
		c.setReason(speaksNothing)
	}
}

// tooLongNow is the error if others need the memory of a line.
const tooLongNow = "too long for the memory that is left, skipped"

func tooLong(maxLine int) string {
	return "longer than " + strconv.Itoa(maxLine) + " bytes, skipped"
}

// answerFault answers the client's last line with an error.
func (c *Client) answerFault(why string) {
	q := &Query{client: c, line: c.in.line}
	q.refuse(why)
	if c.await() {
		c.sendOf(q, 0)
	}
}

// endInput ends the connection because of err, Read's or tick's.
func (c *Client) endInput(err error) {
	in := &c.in

	// A client that has only closed its own side may still wait for its Take's answer.
	if !errors.Is(err, io.EOF) {
		c.stopWaiting(dropTake)
	}

	// Of the begun line only these two facts are needed. A Take that waits, perhaps for an hour, has
	// memory of its own.
	hasBegun := in.pending > 0
	isLong := hasBegun && len(trimCR(string(in.buf[:in.pending]))) > c.server.maxLine
	if c.mayTakeWait() {
		in.lent, in.queries, in.pending = nil, nil, 0
		c.resizeBuf(0)
	}

	switch {
	case !c.await(): // await has noted the reason
	case errors.Is(err, io.EOF):
		// The last line may be torn, so it is not run.
		if hasBegun {
			in.line++
			if isLong {
				c.answerFault(tooLong(c.server.maxLine))
			} else {
				c.answerFault("the last line has no newline at its end, so it was not run")
			}
		}
		c.setReason(itClosed)

	case c.server.isClosing(): // which is why Read ended
		c.setReason(weClose)

	// A line that is being skipped was counted and answered when that began.
	case err == errUnended && !in.skipping:
		in.line++
		c.answerFault(err.Error())
	}

	// This is the reason if there was none before.
	c.setReason(err.Error())
}

// tellLoss tells a client that leaves how many replies it lost since its last PONG. No chain is
// under way.
func (c *Client) tellLoss() {
	// For any other reason the connection is broken, or the server ends it.
	lost := c.outbox.lostSincePong
	if lost == 0 || c.reason != itClosed && c.reason != itQuit {
		return
	}

	why := fmt.Sprintf("%d replies were dropped, for nothing was read for over a second; after "+
		"Ack none is", lost)
	c.outbox.replyAll(&Query{queryType: lastWord, line: c.in.line, args: [2]string{why}})
}

// depart tells workLoop that one of the client's goroutines has ended.
func (c *Client) depart() {
	c.server.queries <- &Query{queryType: depart, client: c}
}

// ---- Keys and Dump

// partKeys is how many keys are walked or cloned before others may work. A walk of fewer is not
// broken off when the server closes.
const partKeys = 1000

// A list of up to fewKeys does not wait for memory. When a part is full, about sampleKeys of its
// keys are sorted to find its middle.
const (
	fewKeys    = 4096
	sampleKeys = 1024
)

// sortSlice is how many comparisons a sort makes before it lets others work.
const sortSlice = 2000

// listing answers a Keys or Dump from one snapshot of the store, in the order of the keys.
// readFromClient's goroutine does that; workLoop only takes the snapshot.
//
// If there is not enough memory for all keys, the listing walks the snapshot once for each part of
// them. If one part is enough, a Keys copies the keys when there is memory for that, and gives the
// snapshot up before the client reads them.
type listing struct {
	*Query       // the request with its snapshot; n: first the keys in the store, then lines
	place  slot  // of the server's snapshots
	wanted int   // keys that are asked for, at most; negative: not known yet
	most   int   // keys in a part, at most
	listed int64 // bytes that are counted in budget.keyLists
	held   int64 // bytes that are counted in budget.queued
}

// list answers a Keys or Dump. No chain is under way.
func (c *Client) list(q *Query) {
	l := &listing{Query: q, place: slot{of: &c.server.snapshots}}

	// Others may take long to read their Keys. A Keys that holds a long line does not wait for them
	// while lines have more than their share, because meanwhile no other line would get a slot
	// (mayHaveSlot).
	stop, b := c.server.closeSignal, &c.server.budget
	if c.in.forLine && b.inputs.Load() > b.forInput() {
		stop = c.server.serving // this channel is closed, so acquire does not wait
	}

	// A snapshot keeps in memory what is removed meanwhile, so there are few at a time.
	switch {
	case l.place.acquire(stop):
	case c.server.isClosing():
		c.setReason(weClose)
		return
	default:
		q.refuse(tooLongNow)
		c.send(q)
		return
	}
	defer l.giveUp()

	// workLoop takes the snapshot.
	if c.send(q); !c.await() {
		return
	}
	if q.snapshot == nil {
		c.outbox.replyAll(&Query{queryType: lastWord, line: q.line,
			args: [2]string{"this store cannot list its keys"}})
		return
	}

	// The request waits from here on, and the snapshot keeps all that others remove meanwhile.
	c.outbox.listing = l
	defer func() { c.outbox.listing = nil }()
	defer c.outbox.countAsWaiting(q)()
	c.outbox.pin(c.server.budget.store.Load())

	if l.countWanted() && l.awaitKeysMemory() && l.reply() {
		c.outbox.replyAll(&Query{queryType: listEnd, n: l.n})
	}
}

// giveUp gives up the snapshot and the memory of the list, if there are any.
func (l *listing) giveUp() {
	l.special = nil
	l.client.outbox.pin(0)
	l.place.release()
	l.noteSize(0)
	l.client.server.budget.keyLists.Add(-l.listed)
	l.listed = 0
}

// noteSize notes in budget.queued that the list takes bytes of memory.
func (l *listing) noteSize(bytes int64) {
	l.client.server.budget.queued.Add(bytes - l.held)
	l.held = bytes
}

// walk calls see with each key that is asked for. The key is the store's string: as long as see
// keeps it, it keeps memory of the store. walk returns false if see does, the client has gone, or
// the server closes.
func (l *listing) walk(see func(key string) bool) bool {
	passed := 0
	for key := range l.snapshot.All() {
		// Now and then let others work, and look whether it is worth going on.
		if passed++; passed%l.client.server.partKeys == 0 {
			if l.client.outbox.core.yield(); l.client.isGone() || l.mustStop(passed) {
				return false
			}
		}

		if strings.HasPrefix(key, l.value()) && !see(key) {
			return false
		}
	}
	return true
}

// countWanted finds out how many keys are asked for. It returns false if the walk was broken off.
func (l *listing) countWanted() bool {
	// With few keys, or if all are asked for and fit, there is nothing to find out.
	l.wanted, l.n = l.n, 0
	fits := int64(l.wanted)*stringSize <= l.client.server.budget.forList()
	if l.wanted >= 0 && (l.wanted <= l.client.server.budget.fewKeys || fits && l.value() == "") {
		return true
	}

	// A walk of many keys takes long, so it needs a core.
	core := &l.client.outbox.core
	core.acquire(nil)
	defer core.release()

	l.wanted = 0
	return l.walk(func(string) bool {
		l.wanted++
		return true
	})
}

// awaitKeysMemory waits until there is memory for a part of the keys, and takes that memory. It
// returns false if the server closes meanwhile.
func (l *listing) awaitKeysMemory() bool {
	b := &l.client.server.budget
	bytes := min(int64(max(l.wanted, 1))*stringSize, b.forList())
	l.most = int(bytes / stringSize)

	// While it waits it counts as waiting for a snapshot. So a listing that has memory, and whose
	// client does not read, is cut off (decide).
	if l.most > b.fewKeys {
		waiting := &l.place.of.waiting
		waiting.Add(1)
		defer waiting.Add(-1)

		// Nobody tells when a list is given up, so this looks now and then.
		for !b.acquireList(bytes) {
			select {
			case <-time.After(lookTime):
			case <-l.client.server.closeSignal:
				l.client.setReason(weClose)
				return false
			}
		}
		l.listed = bytes
	}

	l.noteSize(bytes)
	return true
}

// reply queues the replies, part by part. It returns false if the client has gone or the server
// closes.
func (l *listing) reply() bool {
	// All parts use the same memory.
	part, last, more := make([]string, 0, l.most), "", true
	for more {
		var wanted bool
		if part, more, wanted = l.nextPart(part[:0], last); !wanted {
			return false
		}

		// These are all the keys, and a Keys needs nothing else, so the snapshot may go.
		if last == "" && !more && l.queryType == keys {
			l.copyKeys(part)
		}

		for few := range slices.Chunk(part, maxChain) {
			l.client.outbox.replyAll(l.queriesFor(few))
			if l.client.isGone() || l.mustStop(len(part)) {
				return false
			}
		}

		if more {
			last = part[len(part)-1]
		}
	}
	return true
}

// nextPart appends to part the first keys after last, in order, up to l.most of them. more reports
// whether there are others after them. wanted is false if nobody wants the keys any more.
func (l *listing) nextPart(part []string, last string) (keys []string, more, wanted bool) {
	// A walk and a sort take long, so they need a core.
	core := &l.client.outbox.core
	core.acquire(nil)
	defer core.release()

	// The walk has the keys in no order. Keys up to last were in earlier parts. Of the others the
	// part keeps the smallest. Once it is full, keys from beyond on are left to a later part.
	beyond := ""
	if !l.walk(func(key string) bool {
		switch {
		case key <= last || more && key >= beyond:
			return true

		// The part is as large as it may be: its second half is left to a later one.
		case len(part) == l.most:
			more = true
			if part, beyond = l.firstHalf(part); key >= beyond {
				return true
			}
		}
		part = append(part, key)
		return true
	}) {
		return nil, false, false
	}

	return part, more, l.sort(part)
}

// firstHalf returns about half of keys, in the same memory: all those before beyond.
func (l *listing) firstHalf(keys []string) (half []string, beyond string) {
	// The median of a sample is near enough to the median of all.
	sample := make([]string, 0, 2*sampleKeys)
	for i := 0; i < len(keys); i += max(len(keys)/sampleKeys, 1) {
		sample = append(sample, keys[i])
	}
	slices.Sort(sample)
	beyond = sample[len(sample)/2]

	half = keys[:0]
	for i, key := range keys {
		if i%partKeys == 0 {
			l.client.outbox.core.yield()
		}
		if key < beyond {
			half = append(half, key)
		}
	}
	return half, beyond
}

// copyKeys gives the keys memory of their own, if there is enough, and gives up the snapshot.
func (l *listing) copyKeys(keys []string) {
	// Half of the memory for queues is left for replies.
	b := &l.client.server.budget
	bytes := kvstore.SizeOf(keys) + int64(len(keys)*stringSize)
	if !addUpTo(&b.queued, bytes, b.forQueues()/2) {
		return
	}

	// Clone them in pieces: few allocations, and no large ones unless keys are long.
	l.giveUp()
	l.held = bytes
	for few := range slices.Chunk(keys, l.client.server.partKeys) {
		copy(few, kvstore.CloneAll(few))
	}
}

// sort sorts keys, and lets others work meanwhile. If the server closes or the client has gone, it
// gives up and returns false, because millions of keys take seconds.
func (l *listing) sort(keys []string) bool {
	core := &l.client.outbox.core

	// Only the comparison can look around during a sort.
	stops, compared := false, 0
	slices.SortFunc(keys, func(a, b string) int {
		if compared++; compared%sortSlice == 0 {
			core.yield()
			stops = stops || l.client.isGone() || l.mustStop(len(keys))
		}

		if stops { // the rest of the sort takes no time
			return 0
		}
		return strings.Compare(a, b)
	})
	return !stops
}

// queriesFor returns a chain that answers the keys found, and counts its lines in n.
func (l *listing) queriesFor(found []string) *Query {
	if l.queryType == keys {
		l.n += len(found)
		return &Query{queryType: keys, values: found, bytes: kvstore.SizeOf(found)}
	}

	// A Dump: each key with its list is a query of the chain, and so is the time that it has left.
	chain := make([]Query, 0, 2*len(found))
	for _, key := range found {
		chain = append(chain, Query{client: l.client, queryType: pair, key: key})
		q := &chain[len(chain)-1]
		q.values = l.snapshot.View(q.args[:0], key)

		if at, goes := l.snapshot.Deadline(key); goes {
			chain = append(chain, Query{client: l.client, queryType: pairTime, key: key,
				values: []string{secondsLeft(at, l.client.server.now())}})
		}
	}

	// Link them, and note what is in them.
	for i := range chain {
		q := &chain[i]
		q.bytes = kvstore.SizeOf(q.values)
		l.n += len(q.values)
		if i > 0 {
			chain[i-1].next = q
		}
	}
	return &chain[0]
}

// mustStop reports whether the listing is to stop because the server closes: if the work at hand,
// with n keys, takes long. Then it notes the reason, and there is no :OK.
func (l *listing) mustStop(n int) bool {
	if n < l.client.server.partKeys || !l.client.server.isClosing() {
		return false
	}
	l.client.setReason(weClose)
	return true
}

// ---- outbox: replies to messages

// outbox turns replies into messages and queues them for writeToClient. Replies share messages.
// While maxShared messages wait, the client's next requests wait, too. Once the client is slow, up
// to maxBufferSize messages may wait, and a message after the first maxShared holds one reply.
// Replies beyond that are dropped if they are a Get's, or the error of a refused request, and the
// client has not sent Ack; others wait.
//
// The goroutine that holds the client's chain owns the outbox. For a Keys or Dump, and for other
// long work, it needs a slot of cores.
type outbox struct {
	// Set before the goroutines start, read-only from then on.
	client     *Client // whose buffer, closed, progress and paced are used
	budget     *budget
	maxMessage int // bytes in a message, at most: the constant, except in tests

	core        slot     // for work that takes long
	acked       bool     // the client has sent Ack: every request is answered
	slow        bool     // the latest word from progress was false
	listing     *listing // the Keys or Dump that is being answered; nil: none is
	next        *Query   // the first query whose reply is not formatted yet
	unformatted int64    // bytes still to be formatted, at most, by which newMessage chooses a size
	piece       int      // bytes in a message now: fewer than maxMessage while all queues are at their limit
	claimed     int64    // bytes of the reply in hand that count as queued before they are
	waitingText int64    // bytes of the chain's buffer beyond a short burst's (sendOf); 0: none
	valueLists  int64    // bytes of the waiting chain's lists that count as queued
	pinned      int64    // bytes of values that the chain keeps, and that count in budget.pinned

	// How fast the client takes the replies of the waiting chain: the time without room since the
	// rate was last measured, and how many bytes the connection had taken then (noteWait).
	blocked time.Duration
	taken   int64
	drips   bool // the rate was below steadyRate when it was last measured

	lostSincePong int    // replies dropped since the last PONG
	lostReplies   int    // replies dropped in all
	cutFor        string // why the outbox ended the connection, if it did
}

// answer queues the replies of chain, which has run, and sends the chain back. It runs on
// workLoop's goroutine and never waits: replies that are long or find no room are left to deliver.
func (c *Client) answer(chain *Query) {
	size := c.outbox.measure(chain)

	// Replies that are long, or have no room now, are deliver's.
	if size > int64(min(chunkSize, c.outbox.maxMessage)) || size > 0 && len(c.buffer) > 0 &&
		(len(c.buffer) >= maxShared || c.server.budget.isAtLimit()) {
		go c.deliver(chain, size)
		return
	}

	c.outbox.reply(chain, size, true)
	c.done <- chain
}

// deliver is answer for replies that take time. It is one goroutine for one chain, until the
// replies are queued or dropped.
func (c *Client) deliver(chain *Query, size int64) {
	giveBack := c.outbox.countAsWaiting(chain)

	c.outbox.core.acquire(nil)
	c.outbox.reply(chain, size, false)
	c.outbox.core.release()
	giveBack()

	// From here on the chain is readFromClient's.
	c.done <- chain
}

// countAsWaiting counts what chain keeps in memory while it waits: its long lines in
// budget.waitingLines instead of budget.inputs; the slices of its lists in budget.queued; and their
// values, which others may remove from the store, in budget.pinned. giveBack undoes all of this.
func (o *outbox) countAsWaiting(chain *Query) (giveBack func()) {
	b, long := o.budget, o.waitingText
	b.waitingLines.Add(long)
	b.inputs.Add(-long)

	// Count each Get, because each may keep another version of the same list.
	values := int64(0)
	o.valueLists = 0
	for q := chain; q != nil; q = q.next {
		o.valueLists += q.listSize()
		values += q.pinnedSize()
	}
	b.queued.Add(o.valueLists)
	o.pin(values)
	o.blocked, o.taken, o.drips = 0, o.client.paced.taken.Load(), false

	return func() {
		o.pin(0)
		b.queued.Add(-o.valueLists)
		b.waitingLines.Add(-long)
		b.inputs.Add(long)
	}
}

// listSize returns how many bytes the slice of q's values takes, without their text.
func (q *Query) listSize() int64 { return int64(len(q.values)) * stringSize }

// pinnedSize returns how many bytes of values q keeps in memory even if others remove them from the
// store.
func (q *Query) pinnedSize() int64 {
	if q.bytes > kvstore.ViewMost {
		return q.bytes
	}
	return 0
}

// pin notes in budget.pinned that the chain keeps so many bytes of values.
func (o *outbox) pin(values int64) {
	o.budget.pinned.Add(values - o.pinned)
	o.pinned = values
}

// replyAll queues the replies of chain, of whatever size. It waits for room.
func (o *outbox) replyAll(chain *Query) {
	o.core.acquire(nil)
	size := o.measure(chain)
	o.reply(chain, size, false)
	o.core.release()
}

const stringSize = 16 // bytes of a string beside its text

// measure returns how many bytes the replies of chain take, and notes the size of each reply. It
// looks at no value, because there may be many.
func (o *outbox) measure(chain *Query) (size int64) {
	// An Ack is valid for the requests after it in the chain.
	acked := o.acked
	for q := chain; q != nil; q = q.next {
		acked = acked || q.queryType == ack
		q.size = q.replySize(acked)
		size += q.size
	}
	return size
}

// reply queues the replies to chain's requests, left bytes in all. It formats none before there is
// room for it. hasRoom means that the caller is workLoop, which does not wait: it has seen room for
// all of them in one message.
func (o *outbox) reply(chain *Query, left int64, hasRoom bool) {
	var msg []byte // nil, or a message that was begun when there was room
	shared := false
	for q := chain; q != nil; q = q.next {
		o.acked = o.acked || q.queryType == ack
		if q.size < 0 { // shed
			left += q.size
			o.drop(q)
		}
		if q.size <= 0 {
			continue
		}
		o.next = q

		// The message is full, or is for one reply: this reply begins the next message.
		if msg != nil && (!shared || int64(len(msg))+q.size > int64(o.piece)) {
			o.queue(msg)
			msg = nil
		}

		// A reply that begins a message needs room: nothing is formatted only to be dropped.
		if msg == nil {
			if o.client.isGone() {
				return
			}
			if !hasRoom && !o.awaitRoom(o.messages(q), q, false) {
				o.drop(q)
				left -= q.size
				continue
			}

			// While few messages wait, this one may also hold the replies that follow.
			if shared = len(o.client.buffer) < maxShared; shared {
				o.unformatted = left
			} else {
				o.unformatted = q.size
			}
			msg = o.firstMessage(q)
		}

		msg = o.format(msg, q)
		o.uncount(q)
		left -= q.size

		// A PONG has told what was lost.
		if q.queryType == ping {
			o.lostSincePong = 0
		}
	}

	o.next = nil
	if msg != nil {
		o.queue(msg)
	}
}

// messages returns in how many messages q's reply fits.
func (o *outbox) messages(q *Query) int {
	return int((q.size + int64(o.maxMessage) - 1) / int64(o.maxMessage))
}

// firstMessage returns the message in which q's reply begins. There is room for it. While all
// queues together are over their limit, the reply's messages are small.
func (o *outbox) firstMessage(q *Query) (msg []byte) {
	o.piece = o.maxMessage
	if o.budget.isAtLimit() {
		o.piece = min(o.maxMessage, chunkSize)
	}

	o.claim(q.size)
	return o.newMessage()
}

// cloneWaiting clones the short lists of replies that wait, so that they keep no memory of the
// store.
func (o *outbox) cloneWaiting() {
	for q := o.next; q != nil; q = q.next {
		q.keep()
	}
}

// shed gives up those replies after the one in hand that may be dropped, because others need the
// memory that they keep and the client takes nothing. The client has not sent Ack so far. shed
// reports whether it has, later in the chain.
func (o *outbox) shed() (acked bool) {
	for q := o.next.next; q != nil; q = q.next {
		acked = acked || q.queryType == ack
		if q.size > 0 && q.mayDrop(acked) {
			o.valueLists -= q.listSize()
			o.budget.queued.Add(-q.listSize())
			o.pin(o.pinned - q.pinnedSize())
			q.values, q.args, q.size = nil, [2]string{}, -q.size
		}
	}
	return acked
}

// format appends q's reply to msg. It queues messages that are full, and returns the one in which
// the reply ends, or nil if the connection takes no more.
func (o *outbox) format(msg []byte, q *Query) []byte {
	// The query stays in memory until the client's next chain, and must not pin the list.
	values := q.values
	q.values = nil

	// Nearly always the message has room for the whole reply.
	if int64(len(msg))+q.size <= int64(o.piece) {
		for _, v := range values {
			msg = q.appendLine(msg, v)
		}
		return q.appendEnd(msg, o.acked, o.lostSincePong)
	}

	for _, v := range values {
		if len(msg)+q.lineExtra()+len(v) <= o.piece {
			msg = q.appendLine(msg, v)
			continue
		}

		// The line does not fit, so it is split.
		for _, text := range q.parts(v) {
			if msg = o.split(msg, q, text); msg == nil {
				return nil
			}
		}
	}

	return o.split(msg, q, string(q.appendEnd(nil, o.acked, o.lostSincePong)))
}

// split appends text, a piece of q's reply, to msg. If it does not fit, split fills and queues the
// message and goes on in the next. A reply that has begun always ends, so split waits for room. It
// returns nil if the connection takes no more.
func (o *outbox) split(msg []byte, q *Query, text string) []byte {
	for {
		n := min(len(text), o.piece-len(msg))
		msg = append(msg, text[:n]...)
		if text = text[n:]; text == "" {
			return msg
		}

		// The message is full.
		o.queue(msg)
		if o.awaitRoom(1, q, true); o.client.isGone() {
			return nil
		}
		msg = o.newMessage()
	}
}

// drop gives up q's reply, and counts it.
func (o *outbox) drop(q *Query) {
	q.values = nil
	o.lostSincePong++
	o.lostReplies++
	o.client.server.lostReplies.Add(1)
}

// claim counts all bytes of a reply of several messages as queued before they are, because a reply
// that has begun must end, whatever others queue meanwhile. It does not claim a reply of more than
// maxShared full messages, nor one that would take the queues more than a quarter over their limit:
// such a reply waits for room message by message.
func (o *outbox) claim(size int64) {
	most := o.budget.forQueues()
	if size > int64(o.piece) && size <= int64(maxShared*o.maxMessage) &&
		addUpTo(&o.budget.queued, size, most+most/4) {
		o.claimed = size
	}
}

// uncount ends the counts of q's reply, which has been formatted.
func (o *outbox) uncount(q *Query) {
	// Sizes are upper bounds, so more may be claimed than the reply has taken.
	if o.claimed > 0 {
		o.budget.queued.Add(-o.claimed)
		o.claimed = 0
	}

	// Its values are in messages now. (A Keys or Dump keeps its snapshot.)
	if o.pinned > 0 && o.listing == nil {
		o.pin(o.pinned - q.pinnedSize())
	}
}

// queue sends msg to writeToClient. There must be room for it.
func (o *outbox) queue(msg []byte) {
	o.unformatted -= int64(len(msg))

	// The claimed bytes are counted already.
	used := min(o.claimed, int64(len(msg)))
	o.claimed -= used
	o.budget.queued.Add(int64(cap(msg)) - used)

	o.client.buffer <- msg

	// A reply of many messages takes long, and others may want the core.
	o.core.yield()
}

// fate is what becomes of a reply that needs room.
type fate uint8

const (
	isQueued  fate = iota // there is room
	waits                 // until there is room; so do the client's later requests
	isDropped             // because its client takes nothing
	isCutOff              // with its client's connection, because others need the memory
)

// decide returns the fate of a reply of n messages, and the reason if its client is cut off. A
// reply without room waits. If its client is slow, the reply is dropped if mayDrop; otherwise the
// client is cut off
//
//   - if mayCut, and all queues and waiting chains together are over their limit (isCrowded);
//   - if its chain pins values, and writes need the memory of such values (needsPinned);
//   - if others wait for their Keys or Dump, and this is one.
//
// In the last two cases a client that drips is cut off, too. In the first case it is cut off only
// if the lines of waiting chains take so much memory that no other long line gets any
// (mayTakeLines).
func (o *outbox) decide(n int, mayDrop, mayCut bool) (what fate, why string) {
	// The rule of the queue: few shared messages, or many single ones.
	waiting := len(o.client.buffer)
	hasRoom := waiting < maxShared
	if o.slow {
		hasRoom = waiting+n <= maxBufferSize
	}

	// Claimed bytes are counted already.
	noneMore := o.claimed == 0 && o.budget.isAtLimit()

	switch {
	// With nothing queued a reply may always begin: writeToClient tells of room only when it takes
	// a message out.
	case waiting == 0 || hasRoom && !noneMore:
		return isQueued, ""
	case o.slow && mayDrop:
		return isDropped, ""

	case (o.slow || o.drips && !o.budget.mayTakeLines()) && mayCut && o.budget.isCrowded():
		return isCutOff, fmt.Sprintf("it took no replies, and what waits for all clients takes %d "+
			"bytes (-max-queues)", o.budget.queued.Load()+o.budget.waitingLines.Load())
	case (o.slow || o.drips) && o.pinned > 0 && o.budget.needsPinned():
		return isCutOff, "it took a long reply too slowly, and others need the memory of its values"
	case (o.slow || o.drips) && o.listing != nil && o.listing.place.isAwaited():
		return isCutOff, "it took its Keys or Dump too slowly, and others wait for theirs"
	}
	return waits, ""
}

// awaitRoom waits until there is room for n messages of q's reply. It returns false if the reply is
// dropped. It returns true, too, if the connection is gone: writeToClient then empties buffer.
func (o *outbox) awaitRoom(n int, q *Query, hasBegun bool) bool {
	mayDrop := q.mayDrop(o.acked) && !hasBegun // a reply that has begun is not dropped

	// A client may be cut after Ack, while it waits for a Keys or Dump, and if it has sent long lines
	// (waitingText). If it is slow, a reply that may be dropped is dropped instead. (For pinned values
	// any client may be cut: see decide.)
	mayCut := o.acked || o.listing != nil || o.waitingText > 0

	for {
		// Look at what the connection did last.
		select {
		case taken := <-o.client.progress:
			o.slow = !taken
		default:
		}

		// If others need the memory of this chain, give up the replies that may be dropped.
		if o.slow && !mayDrop && !mayCut && (o.budget.isCrowded() || o.budget.needsPinned()) {
			mayCut = o.shed()
		}

		switch what, why := o.decide(n, mayDrop, mayCut); what {
		case isQueued:
			return true
		case isDropped:
			return false
		case isCutOff:
			o.cutFor = why
			o.client.paced.Close()
		}

		// writeToClient tells when it has taken a message out, even if the connection is gone.
		o.awaitProgress()
	}
}

// awaitProgress waits for word from writeToClient; if the chain pins values, for slowAfter at most.
// Others may have the core meanwhile.
func (o *outbox) awaitProgress() {
	// A reply that waits keeps no core. Its short lists are cloned, so that they keep no memory of
	// the store; its long ones count as pinned.
	had := o.core.taken
	o.core.release()
	o.cloneWaiting()

	// A Write of one message may go on for long, byte by byte, without a word.
	began := time.Now()
	var rateCheck <-chan time.Time // nil: the chain pins no values that others may need
	if o.pinned > 0 {
		rateCheck = time.After(slowAfter)
	}
	select {
	case taken := <-o.client.progress:
		o.slow = !taken
	case <-rateCheck:
	}
	o.noteWait(time.Since(began))

	if had {
		o.core.acquire(nil)
	}
}

// noteWait adds d to the time without room, and measures the rate after dripTime. It allows for
// socketMost/16 bytes more, because a steady reader's socket may take nothing until a sixteenth of
// its buffer is free.
func (o *outbox) noteWait(d time.Duration) {
	o.blocked += min(d, slowAfter) // if it was more, perhaps this process stood still

	// The rate can be told after dripTime.
	if o.blocked >= dripTime {
		taken := o.client.paced.taken.Load()
		o.drips = float64(taken-o.taken+socketMost/16) < steadyRate*o.blocked.Seconds()
		o.blocked, o.taken = 0, taken
	}
}

// tellRoom wakes a chain's holder that waits for room. writeToClient calls it when it has taken a
// message out of buffer. If progress holds a word already, tellRoom sends nothing: that word wakes
// the chain's holder.
func (c *Client) tellRoom() {
	select {
	case c.progress <- true:
	default:
	}
}

// chunks and large are the memory of messages that were written, to be used again.
var (
	chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}
	large  = sync.Pool{New: func() any { return new([largeSize]byte) }}
)

// newMessage returns an empty message with room for unformatted, or for piece if that is less. If
// the message fills one of large, it borrows that. If the client keeps up, it borrows one of chunks
// if that is enough, or one of large if over a quarter of it is needed. Any other message takes no
// more memory than it needs.
func (o *outbox) newMessage() []byte {
	size := int(min(o.unformatted, int64(o.piece)))

	// Memory that is used again has one of two sizes.
	switch keepsUp := len(o.client.buffer) == 0; {
	case keepsUp && size <= chunkSize:
		return chunks.Get().(*[chunkSize]byte)[:0]
	case size == largeSize, keepsUp && size > largeSize/4: // with less, much of it would lie idle
		return large.Get().(*[largeSize]byte)[:0]
	}
	return make([]byte, 0, size)
}

// recycle takes back memory that was borrowed for msg.
func recycle(msg []byte) {
	switch cap(msg) {
	case chunkSize:
		chunks.Put((*[chunkSize]byte)(msg[:chunkSize]))
	case largeSize:
		large.Put((*[largeSize]byte)(msg[:largeSize]))
	}
}

// ---- messages to the connection

// writeToClient writes what is queued until readFromClient closes buffer, then closes the
// connection. It is one goroutine per client, from the client's first request. A Write that failed
// may have ended inside a line, so no other follows; buffer is still emptied, so that nobody ever
// waits for a connection that is gone.
func (c *Client) writeToClient() {
	for msg := range c.buffer {
		// Messages that wait after it go along, which makes room.
		msg, size := c.coalesce(msg)
		c.tellRoom()

		// After a Write that failed the messages are only taken out.
		if c.writeErr == nil {
			if _, c.writeErr = c.connection.Write(msg); c.writeErr != nil {
				close(c.closed)
				c.paced.Close()
			}
		}
		recycle(msg)
		c.server.budget.queued.Add(-size)
	}

	// A client that has not closed its own side gets time to take our last words. (After a Write that
	// failed nothing of this takes time.)
	c.inTime(func() { closeWrite(c.connection) })
	c.drainInput()
	c.inTime(func() { c.connection.Close() })

	c.depart()
}

// inTime calls end, and closes the connection if that takes longer than closeTime: TLS would wait
// for a client that does not read.
func (c *Client) inTime(end func()) {
	late := time.AfterFunc(closeTime, func() { c.paced.Close() })
	defer late.Stop()
	end()
}

// coalesce returns msg with the messages that wait after it, up to a good Write's worth, and how
// many bytes they all are in budget.queued. Half of the memory for queues is left for replies.
func (c *Client) coalesce(msg []byte) (all []byte, size int64) {
	size = int64(cap(msg))
	for len(msg) < maxWrite {
		select {
		case more := <-c.buffer: // nil once closed
			if more == nil {
				return msg, size
			}
			size += int64(cap(more))

			// If both do not fit into the first, a larger one takes them.
			n, b := len(msg)+len(more), &c.server.budget
			if wants := int64(largeSize - cap(msg)); n > cap(msg) && n <= largeSize &&
				addUpTo(&b.queued, wants, b.forQueues()/2) {
				size += wants
				together := append(large.Get().(*[largeSize]byte)[:0], msg...)
				recycle(msg)
				msg = together
			}
			msg = append(msg, more...)
			recycle(more)

		// A small Write now is better than a larger one later.
		default:
			return msg, size
		}
	}
	return msg, size
}

// drainInput reads on once our side has ended, until the client ends its own, for at most
// drainTime. If a socket is closed with unread input, or before more input comes, the connection is
// reset, and the client loses replies that it has not read yet (RFC 1122, 4.2.2.13). When the
// server closes, a client that has sent nothing since the last tick, and had time to read
// everything, is closed after busyTime of silence. Any other may just pause between two reads.
func (c *Client) drainInput() {
	var scratch [4 << 10]byte
	for left, quiet := drainTime, time.Duration(0); left > 0; {
		// How long the client may be silent.
		silence := drainTime
		if c.server.isClosing() && c.in.newBytes == 0 && c.paced.timeToRead(time.Now()) <= busyTime {
			silence = busyTime
		}
		if quiet >= silence {
			return
		}

		began, tick := time.Now(), min(left, silence-quiet, lookTime)
		c.connection.SetReadDeadline(began.Add(tick))
		n, err := c.connection.Read(scratch[:])
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}

		// If the wait took more than a tick, perhaps this process stood still.
		took := min(time.Since(began), tick)
		left -= took
		if quiet += took; n > 0 {
			quiet = 0
		}
	}
}

// pacedConn is a connection that sees how fast the other side reads. With TLS it lies under that,
// because a tls.Conn cannot go on after a Write that timed out, and a pacedConn can.
//
// Write goes on until all bytes are taken, or one of its limits has passed. It looks in ticks of
// lookTime, or of slowAfter once the client is slow, and counts ticks in which no byte was taken.
// It counts bytes, not Writes, because a Write of 64 KiB to a steady reader of 300 kB/s was seen to
// take 1.8 s. It counts ticks, not time, because if this whole process stands still for a while,
// that is one tick.
//
// The fields belong to the Write that is under way. There is one at a time: writeToClient's; before
// there is one, a TLS handshake's, reject's, or that of TLS in a Close. (If TLS itself answers
// during a Read, its lock keeps the two apart.) Other goroutines use only Conn, writing and taken.
type pacedConn struct {
	net.Conn
	server   *keyValueServer
	progress chan bool // the client's; nil before there is a client
	limit    time.Time // when everything must be written, set before the first Write; zero: no limit
	until    time.Time // the write deadline that Write has set; zero: the next Write sets one

	// Bytes that a reader at steadyRate has not read yet, as of unreadAt.
	unread   int
	unreadAt time.Time

	// For any goroutine.
	writing atomic.Bool  // a Write is under way; for isBroken
	taken   atomic.Int64 // bytes in all; for noteWait

	// The connection took bytes after a pause. So the client reads: if its sockets had had room,
	// they would have taken these bytes without a pause.
	resumed bool
}

// Write writes b. It fails when no byte was taken for -write-timeout, limit has passed, or the
// server has been closing for closeTime. It asks for the time only if until is zero, and when a
// deadline has passed, because doing so in each Write would slow down every reply.
func (p *pacedConn) Write(b []byte) (n int, err error) {
	p.writing.Store(true)
	defer p.writing.Store(false)
	if p.until.IsZero() {
		p.setDeadline(time.Now(), lookTime)
	}

	// The time without a byte taken. It begins below 0, because the first tick, which may have
	// begun before this Write, does not count.
	stalled, tick := -lookTime, lookTime
	for {
		m, err := p.Conn.Write(b[n:])
		n += m

		// Note what was taken.
		p.taken.Add(int64(m))
		p.unread = min(p.unread+m, socketMost)
		slow := tick == slowAfter
		p.resumed = p.resumed || m > 0 && stalled >= 2*lookTime
		if m > 0 && slow {
			p.tell(true)
			p.until = time.Time{} // it is too far away for the next Write
		}

		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}

		// A tick is over.
		now := time.Now()
		p.unread = int(p.timeToRead(now).Seconds() * steadyRate)
		if isClosed(p.server.timeIsUp) || !p.limit.IsZero() && !now.Before(p.limit) {
			return n, err
		}

		if m > 0 {
			stalled, tick = 0, lookTime
		} else {
			if stalled += tick; stalled >= p.patience() {
				tick = slowAfter // look less often
				p.tell(false)
			}
			if most := p.server.writeTimeout; most > 0 && stalled >= most {
				return n, fmt.Errorf("%w for %v (-write-timeout)", errTookNothing, most)
			}
		}

		p.setDeadline(now, tick)
	}
}

// isBroken reports whether the connection is known to be broken. A Write that is under way will
// notice that itself; otherwise a Write of no bytes tells. Any goroutine may ask.
func (p *pacedConn) isBroken() bool {
	if p.writing.Load() {
		return false
	}
	p.Conn.SetWriteDeadline(time.Now().Add(lookTime)) // the last one may have passed
	_, err := p.Conn.Write(nil)
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// errTookNothing ends a client that has taken no byte for -write-timeout.
var errTookNothing = errors.New("it took nothing")

// tell tells the holder of the client's chain whether the connection takes bytes. That replaces
// what that holder has not received yet.
func (p *pacedConn) tell(taken bool) {
	select {
	case <-p.progress: // what is there is old
	default:
	}

	// The slot is free now. progress is nil before there is a client.
	select {
	case p.progress <- taken:
	default:
	}
}

// patience returns for how long a steady reader may take no byte. That is longer than slowAfter if
// its socket holds much that it has not read: Linux opens a closed receive window again only once a
// sixteenth of the buffer is free, which with 6 MiB at steadyRate is 1.5 s later
// (__tcp_select_window). Twice that leaves time for the reader's pauses. It is longer, too, for a
// client that was seen to read: a window that opens in small steps was seen to stand still for 1.7
// s between two reads.
func (p *pacedConn) patience() time.Duration {
	patience := slowAfter + time.Duration(p.unread/8)*time.Second/steadyRate
	if p.resumed {
		patience += slowAfter
	}
	return patience
}

// timeToRead returns how long a reader at steadyRate needs for what it has not read yet.
func (p *pacedConn) timeToRead(now time.Time) time.Duration {
	return max(0, time.Duration(p.unread)*time.Second/steadyRate-now.Sub(p.unreadAt))
}

// setDeadline makes Conn's Write return within a tick.
func (p *pacedConn) setDeadline(now time.Time, tick time.Duration) {
	p.unreadAt, p.until = now, now.Add(tick)
	if !p.limit.IsZero() && p.limit.Before(p.until) {
		p.until = p.limit
	}
	p.SetWriteDeadline(p.until)

	// workLoop may just have set a deadline that has passed: set it again.
	if isClosed(p.server.timeIsUp) {
		p.SetWriteDeadline(now)
	}
}

// CloseWrite ends our side of the connection.
func (p *pacedConn) CloseWrite() error { return closeWrite(p.Conn) }

// closeWrite ends our side of conn, if the two sides can end one by one.
func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
