package main

import (
	"cmp"
	"container/heap"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Limits of the server.
const (
	// Once a batch has this many chains it is committed: enough to share one fsync (group commit),
	// few enough that the first one does not wait long.
	maxBatch = 64

	// How many times at most workLoop, when its queue is empty, yields before it commits, so that
	// readers (goroutines of readFromClient) that can run send what they have. Batches grow, and
	// fewer clients miss the batch: in memory the slowest percent of requests takes a quarter
	// less time, and on disk there are a tenth more writes a second.
	maxYields = 4

	// A batch does not wait for clients (gathering) if Commits take less time than slowCommit, as in
	// memory: that saves nothing. After one wait in vain the next 2 batches do not wait; after two
	// in a row the next 6 do not, then 14, and at most maxVain. These numbers are even: if the
	// batches of two groups of clients alternate, the other group's waits next time.
	slowCommit = 50 * time.Microsecond
	maxVain    = 62

	// How long workLoop works before it commits and answers: maxHeavyRound if the client's requests
	// take long, such as Updates of huge lists. A chain that is not done by then goes on later.
	maxRound      = 5 * time.Millisecond
	maxHeavyRound = time.Millisecond / 2

	// How many requests of a client workLoop runs between two looks at the clock: one at first,
	// twice as many after each look, up to maxStride, and one again if longTime has passed since
	// the last look. An Update, a Swap or a Remove counts as searchCost requests, because it may
	// search a long list. At a chain's end workLoop looks, too, however few they were.
	maxStride  = 64
	searchCost = 8
	longTime   = maxHeavyRound / 2

	// While some key has a deadline, workLoop looks for expired keys before each round and once in
	// expireTime. It looks at the clock after each expireStride deletions.
	expireTime   = 50 * time.Millisecond
	expireStride = 64

	// How far a client's time (share.finish) may be above what others have had
	// (keyValueServer.floor) before its next chain waits for a turn, if others want to run. Below
	// that, most chains run in the order in which they come, which costs nothing.
	maxLead = 64 * time.Microsecond

	fileCheckTime = time.Second // between two checks of the store's files

	defaultMaxLine = 1 << 20 // bytes of a line without its end, unless set

	defaultMaxClients   = 10_000 // 174 MB if all are quiet (memoryPerClient)
	defaultWriteTimeout = 5 * time.Minute
	defaultMaxQueues    = 1 << 30 // bytes
	// open files that are kept free for what is no client, handshake or watcher: the store, the log
	spareFiles    = 32
	maxRejecting  = 8    // of spareFiles: connections over maxClients that get time to read why
	maxHandshakes = 1000 // TLS handshakes under way; fewer with few files or little -max-memory
	maxSnapshots  = 4    // snapshots at a time, for Keys and Dump
	maxEnded      = 64   // buffers of long lines that are kept for others, if memory is limited
	maxWatchers   = 16   // HTTP connections of -http, at all addresses; one more replaces one

	// Bytes that are read of an HTTP request, or of a client's side of a TLS handshake, at most;
	// and what such a handshake takes.
	guestMost      = 64 << 10
	memoryPerShake = 128 << 10

	handshakeTime = 5 * time.Second // for a TLS handshake

	// seldomTime lies between two lines of log about an event that may happen a thousand times a
	// second (seldom).
	seldomTime = time.Minute

	memoryPerClient = 17 << 10 // bytes that a quiet client takes
	memoryOfTLS     = 28 << 10 // bytes more if it speaks TLS
	// bytes that a write takes in the store besides its key and value, on average at most
	memoryPerPair = 64

	collectTime = time.Second // between two collections of garbage because of refused writes

	// Bytes by which the data and the clients must have shrunk before the process gives memory
	// back at once. They must have shrunk by a quarter, too (freeMemory).
	giveBackMin = 16 << 20

	closeTime = time.Second // for last replies after Close; in reject and inTime for last words

	// How long acceptClient waits after Accept has failed: twice as long each time.
	minAcceptWait = 5 * time.Millisecond
	maxAcceptWait = time.Second
)

// Start returns these errors after Close, when it is called a second time, and without a store.
var (
	errClosed  = errors.New("the server is closed")
	errStarted = errors.New("the server was started before")
	errNoStore = errors.New("the server has no store: New was given nil")
)

// These errors end a TLS handshake: another connection has taken its place, or it does not end.
// errEndless ends an HTTP request, too.
var (
	errReplaced = errors.New("others came, and there is no place")
	errEndless  = fmt.Errorf("%d bytes came, and no end", guestMost)
)

// keyValueServer serves a store over TCP and unix sockets. Make one with New.
//
// Each acceptClient and each shakeHands feeds connections. Each client's readFromClient feeds
// queries, and so do a writeToClient that ends, a handshake that fails, API calls and HTTP
// requests. workLoop receives from both channels, and it alone uses the store and the list of
// clients.
type keyValueServer struct {
	// Read-only once started.
	listener     net.Listener   // the first of listeners
	listeners    []net.Listener // each has an acceptClient
	maxLine      int            // bytes of a request line, its end not counted
	maxClients   int
	maxMessage   int           // bytes in a message: the constant, except in tests
	partKeys     int           // keys that are walked at a time: the constant, except in tests
	writeTimeout time.Duration // for a client to take a byte of what is written; 0: no limit
	tls          *tls.Config   // nil: no TLS; unix sockets never have it
	handshakes   int           // under way at a time, but at least one for each listener
	version      string
	now          clock // the wall clock, by which keys expire: time.Now, except in tests
	// what the store reports: its opening, its lock, fsyncs, compactions; nil: it is in memory
	status  *storage.Status
	log     *slog.Logger
	started time.Time

	// From readers, departing goroutines, failed handshakes, API calls and HTTP requests to
	// workLoop; never closed. It has a buffer so that a sender seldom waits for workLoop to be
	// scheduled.
	queries chan *Query

	// From each acceptClient and shakeHands to workLoop. endAccepting closes it when all of these
	// goroutines have ended.
	connections chan net.Conn
	accepting   sync.WaitGroup // counts these goroutines

	// From workLoop to CountActive and CountDropped. oneCall admits one caller at a time, so the
	// one slot is free and workLoop never waits.
	countActive chan int

	// Closed by Close: acceptClient ends, workLoop ends with the last client, and readFromClient
	// stops waiting for a Take, for memory or for a snapshot. Goroutines that read, list or drain
	// input ask isClosing.
	closeSignal chan struct{}
	serving     chan struct{} // closed by serve: workLoop runs
	timeIsUp    chan struct{} // closed by workLoop, closeTime after Close: Writes end
	ended       chan struct{} // closed by workLoop, last: nobody accepts, and no client is left
	failed      chan error    // from workLoop to the caller of Failed; one slot, for one failure
	oneCall     chan struct{} // holds one token; the API call that took it owns closeCalled

	// Owned by the API call that holds the token of oneCall.
	closeCalled bool // Close was called

	// Any goroutine may use these.
	commits     storage.Histogram // seconds of each batch's Commit, if the store is not in memory
	batches     storage.Histogram // chains that each of these Commits was for
	logged      *logCounts        // nil: nobody counts
	budget      budget            // -max-memory and -max-queues
	cores       semaphore         // for long work: one slot fewer than cores, but at least one
	snapshots   semaphore         // for Keys and Dump: a snapshot keeps what is changed meanwhile
	shaking     semaphore         // for TLS handshakes, until workLoop is told how they ended
	lostReplies atomic.Int64      // replies that slow readers lost

	// Owned by workLoop.
	clients          []*Client
	db               kvstore.Store
	touched          []string      // a chain's keys, for Touch
	batch            []*Query      // chains that have run, ended Takes, countAlls: before Commit
	gathering        gathering     // for which clients the batch waits before its Commit
	turns            turnQueue     // clients that wait for their turn
	floor            time.Duration // highest spent of a client whose turn came: what the others had
	takes            takeQueues    // Takes that wait for a value
	round            round
	rejecting        int               // rejected connections that still have a writeToClient
	refusedClients   seldom            // connections over maxClients
	badHandshakes    seldom            // TLS handshakes that failed
	refusedByStore   seldom            // writes that the store has no room for (kvstore.Store.Room)
	refusedForMemory seldom            // writes refused because the memory is full
	overdue          overdue           // whether expired keys have yet to be deleted
	expired          int64             // keys that were deleted because they had expired
	commitFailed     bool              // nothing runs any more
	held             []*Query          // chains that wait for a Commit that finds room
	unsaved          map[string]bool   // keys that they, or chains in turns, have changed
	closing          bool              // stopReading was called
	closeTick        <-chan time.Time  // for hurry; nil: not set
	closeTicks       int               // since Close
	welcomed         int               // clients that have come
	departed         int               // clients that have gone
	largest          int64             // bytes, the most that budget.store was since FreeOSMemory
	collectedAt      time.Time         // when a refused write last started a collection
	requests         [queryTypes]int64 // how many of each type were run or refused
}

// seldom counts an event that may happen a thousand times a second and deserves one line of log
// in seldomTime.
type seldom struct {
	said  time.Time // when the last line was logged
	n     int       // events since then
	total int
}

// happened counts an event. If it is time for a line of log it returns the number of events since
// the last line, and 0 otherwise.
func (s *seldom) happened() (n int) {
	s.n++
	s.total++

	// Until it is time for a line, events add up.
	now := time.Now()
	if now.Sub(s.said) < seldomTime {
		return 0
	}

	n, s.said, s.n = s.n, now, 0
	return n
}

// New returns a server of db. The server owns db from Start until Close returns. With a nil db
// Start returns an error. The server logs nothing unless it is given a logger.
func New(db kvstore.KVStore) *keyValueServer {
	s := &keyValueServer{
		db:        kvstore.StoreOf(db),
		floor:     2 * maxRound,         // spent never sinks to 0 (schedule): 0 means a new client
		gathering: gathering{number: 3}, // so a client that has never written is not steady
		takes:     takeQueues{of: map[string]*list.List{}},
		batches:   storage.Histogram{Counts: true},

		// The caller may change these before Start.
		maxLine:      defaultMaxLine,
		maxClients:   defaultMaxClients,
		maxMessage:   maxMessage,
		partKeys:     partKeys,
		writeTimeout: defaultWriteTimeout,
		handshakes:   maxHandshakes,
		version:      "unknown",
		now:          time.Now,
		log:          slog.New(slog.DiscardHandler),

		queries:     make(chan *Query, maxBatch),
		connections: make(chan net.Conn),
		closeSignal: make(chan struct{}),
		serving:     make(chan struct{}),
		timeIsUp:    make(chan struct{}),
		ended:       make(chan struct{}),
		oneCall:     make(chan struct{}, 1),

		// One slot each, so that workLoop never waits for the receiver.
		countActive: make(chan int, 1),
		failed:      make(chan error, 1),

		budget: budget{maxQueues: defaultMaxQueues, fewKeys: fewKeys,
			anyLine: semaphore{slots: make(chan struct{}, 1)},
			freeing: semaphore{slots: make(chan struct{}, 1)},
			ended:   make(chan endedLine, maxEnded)},
		snapshots: semaphore{slots: make(chan struct{}, maxSnapshots)},

		// Where there are several cores, one is left for workLoop.
		cores: semaphore{slots: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))},
	}

	// The token: no call is under way.
	s.oneCall <- struct{}{}
	return s
}

// Start listens on port of localhost and serves until Close. It does not block. It returns an error
// if it cannot listen, if it was called before, after Close, and if the server has no store.
func (s *keyValueServer) Start(port int) error {
	listeners, err := listen(net.JoinHostPort("localhost", strconv.Itoa(port)))
	if err != nil {
		return err
	}
	if err := s.serve(listeners...); err != nil {
		closeAll(listeners)
		return err
	}
	return nil
}

// serve is Start with one or more listeners. Without an error they become the server's.
func (s *keyValueServer) serve(listeners ...net.Listener) error {
	<-s.oneCall
	defer func() { s.oneCall <- struct{}{} }()

	switch {
	case s.closeCalled:
		return errClosed
	case isClosed(s.serving):
		return errStarted
	case s.db == nil:
		return errNoStore
	}

	// All that the goroutines read is set before they start, so it needs no lock.
	s.started = time.Now()
	s.round.epoch = s.started
	s.listener, s.listeners = listeners[0], listeners
	s.noteMemory()

	// Until its handshake has ended, a TLS connection is one of few (fewConns). A unix socket has
	// no TLS.
	most := max(1, s.budget.handshakes(s.handshakes)/len(listeners))
	s.shaking.slots = make(chan struct{}, most*len(listeners))
	for _, listener := range listeners {
		if s.tls != nil && listener.Addr().Network() != "unix" {
			listener = &fewConns{Listener: listener, most: most}
		}
		s.accepting.Go(func() { s.acceptClient(listener) })
	}

	go s.endAccepting()
	go s.workLoop()
	close(s.serving)
	return nil
}

// CountActive returns how many clients are connected: 0 before Start and once Close has returned.
func (s *keyValueServer) CountActive() int { return s.ask(countActive) }

// CountDropped returns how many clients have left (not how many replies were dropped): 0 before
// Start and once Close has returned.
func (s *keyValueServer) CountDropped() int { return s.ask(countDropped) }

// ask asks workLoop for a count: countActive or countDropped.
func (s *keyValueServer) ask(what queryType) int {
	// One caller at a time, because the channel for the answer has one slot.
	<-s.oneCall
	defer func() { s.oneCall <- struct{}{} }()
	if !isClosed(s.serving) {
		return 0
	}

	// workLoop may end at any time, and then it neither receives nor answers.
	select {
	case s.queries <- &Query{queryType: what}:
	case <-s.ended:
		return 0
	}

	select {
	case n := <-s.countActive:
		return n
	case <-s.ended:
	}

	// workLoop has ended. It may have answered first.
	select {
	case n := <-s.countActive:
		return n
	default:
		return 0
	}
}

// Failed returns a channel that receives the error of the store's Commit if one fails. From then on
// the server answers no request. The caller must Close the server.
func (s *keyValueServer) Failed() <-chan error { return s.failed }

// Close ends the server. Requests that were read are run, except Takes that wait, and those after a
// Keys or Dump that is broken off. The replies are flushed to clients that take them within
// closeTime. It returns when no goroutine uses a client or the store any more: the store is the
// caller's again.
func (s *keyValueServer) Close() {
	<-s.oneCall
	if !s.closeCalled {
		s.closeCalled = true
		close(s.closeSignal)
		closeAll(s.listeners)
	}
	s.oneCall <- struct{}{}

	// The last replies take a while. The token is back, so others may ask for counts meanwhile.
	if isClosed(s.serving) {
		<-s.ended
	}
}

func (s *keyValueServer) isClosing() bool { return isClosed(s.closeSignal) }

// isClosed reports whether signal is closed. Nothing is ever sent on it.
func isClosed(signal <-chan struct{}) bool {
	select {
	case <-signal:
		return true
	default:
		return false
	}
}

// acceptClient hands every connection of listener over to workLoop; under TLS shakeHands does so
// when the handshake has ended. It runs as one goroutine for each listener, until Close closes
// that. Any other error of Accept, such as running out of file descriptors, may pass: acceptClient
// waits, twice as long each time, up to maxAcceptWait, and tries again.
func (s *keyValueServer) acceptClient(listener net.Listener) {
	// Handshakes under way are cancelled when acceptClient ends.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	wait := time.Duration(0)
	for {
		conn, err := listener.Accept()
		if err == nil {
			if wait > 0 {
				s.log.Info("accepting connections again")
				wait = 0
			}
			s.receive(ctx, conn)
			continue
		}

		// Log the first error only, and try again.
		if wait == 0 && !s.isClosing() {
			s.log.Error("cannot accept connections, trying again", "error", err)
		}
		wait = min(max(2*wait, minAcceptWait), maxAcceptWait)

		select {
		case <-time.After(wait):
		case <-s.closeSignal:
			return
		}
	}
}

// receive hands conn over to workLoop, at once or after a TLS handshake.
func (s *keyValueServer) receive(ctx context.Context, conn net.Conn) {
	guest, mustShake := conn.(*guest)
	if mustShake {
		conn = guest.Conn
	}

	// A test's connection may have no send buffer.
	if socket, ok := conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
		socket.SetWriteBuffer(sendBuffer)
	}

	if !mustShake {
		s.connections <- &pacedConn{Conn: conn, server: s}
		return
	}

	// The other side may be slow to shake hands, and others want to connect meanwhile. But while a
	// Commit lasts, workLoop takes no handshake that has ended, and then others wait for a slot
	// here.
	place := slot{of: &s.shaking}
	place.acquire(s.closeSignal) // once the server closes, handshakes are cancelled at once
	s.accepting.Go(func() {
		s.shakeHands(ctx, guest)
		place.release()
	})
}

// shakeHands does the TLS handshake with guest, for at most handshakeTime, and hands the connection
// over to workLoop. It runs as one goroutine for each new connection, so that a silent connection
// delays nobody. The connection is not counted as a client yet.
func (s *keyValueServer) shakeHands(ctx context.Context, guest *guest) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()

	// Until the handshake ends all bytes go through the guest, which counts those that come.
	paced := &pacedConn{Conn: guest, server: s}
	outer := tls.Server(paced, s.tls)
	err := outer.HandshakeContext(ctx)

	// Another connection may have taken its place, even while the last bytes came.
	if err == nil && !guest.leave() || errors.Is(err, net.ErrClosed) {
		err = errReplaced
	}
	if err != nil {
		guest.Close()
		s.queries <- &Query{queryType: handshakeFailed, key: fmt.Sprint(guest.RemoteAddr()),
			args: [2]string{err.Error()}}
		return
	}

	// The guest has given up its place, so its bytes are not counted any more.
	paced.Conn = guest.Conn
	s.connections <- outer
}

// fewConns is a listener with a limited number of connections. One more takes the place of the
// oldest that has sent nothing, or else of the oldest, so that nobody can keep others out.
type fewConns struct {
	net.Listener
	most   int
	guests []*guest // the oldest first; owned by Accept, which one goroutine calls
}

// guest is a connection that was accepted by fewConns. It has a place there until it leaves.
type guest struct {
	net.Conn
	received atomic.Int64 // bytes
	hasLeft  atomic.Bool  // it has no place any more
}

// Accept waits for a connection, and closes another one if there is no place for it.
func (f *fewConns) Accept() (net.Conn, error) {
	conn, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}

	// If all places are taken, free those of the connections that have left.
	if len(f.guests) == f.most {
		f.guests = slices.DeleteFunc(f.guests, func(g *guest) bool { return g.hasLeft.Load() })
	}

	// If no place was free, close the oldest that has sent nothing, or else the oldest.
	if len(f.guests) == f.most {
		i := slices.IndexFunc(f.guests, func(g *guest) bool { return g.received.Load() == 0 })
		f.guests[max(i, 0)].Close()
		f.guests = slices.Delete(f.guests, max(i, 0), max(i, 0)+1)
	}

	g := &guest{Conn: conn}
	f.guests = append(f.guests, g)
	return g, nil
}

// leave gives up the place. It reports whether the guest still had one.
func (g *guest) leave() bool { return g.hasLeft.CompareAndSwap(false, true) }

// Read reads, and fails once more than guestMost bytes have come.
func (g *guest) Read(p []byte) (n int, err error) {
	if n, err = g.Conn.Read(p); g.received.Add(int64(n)) > guestMost {
		return 0, errEndless
	}
	return n, err
}

// Close gives up the place and closes the connection. It does nothing once the guest has left:
// shakeHands may have passed the connection on.
func (g *guest) Close() error {
	if !g.leave() {
		return nil
	}
	return g.Conn.Close()
}

// endAccepting closes connections, which tells workLoop that no more of them come. It runs as one
// goroutine, until the last acceptClient and the last shakeHands have ended.
func (s *keyValueServer) endAccepting() {
	s.accepting.Wait()
	close(s.connections)
}

// workLoop owns the store and the list of clients: it alone changes them, in the one order that all
// clients see. It never waits for a client, because each of its sends has a free slot. It runs as
// one goroutine until Close, and then until the last client has left.
func (s *keyValueServer) workLoop() {
	defer close(s.ended)

	// Each is set to nil when it is closed, because select never chooses a nil channel.
	connections, closeSignal := s.connections, s.closeSignal

	always := make(chan struct{}) // always ready
	close(always)
	var expiry <-chan time.Time // for keys whose time is over, while no requests come; nil: not set

	// Somebody may change the store's files while no requests come.
	var fileCheck <-chan time.Time // nil: the store is in memory
	if s.status != nil {
		fileCheck = time.Tick(fileCheckTime)
	}

	// Until no more connections come and the last client has gone.
	for connections != nil || len(s.clients) > 0 || s.rejecting > 0 {
		var more chan struct{} // nil: no chain waits for its turn, no expired key to be deleted
		if len(s.turns) > 0 || s.overdue == someOverdue {
			more = always
		}
		if expiry == nil && s.db.Expiring() > 0 {
			expiry = time.After(expireTime)
		}

		select {
		case conn, open := <-connections:
			if !open {
				connections = nil
				s.stopReading()
			} else {
				s.welcome(conn)
			}

		case q := <-s.queries:
			s.runBatch(q)
		case <-more:
			s.runBatch(s.nextQuery())
		case <-s.gathering.timer:
			s.gathering.timedOut = true
			s.runBatch(s.nextQuery())

		case <-expiry:
			expiry = nil
			s.runBatch(nil)
		case <-fileCheck:
			s.checkFiles()
		case <-closeSignal:
			closeSignal = nil
			s.stopReading()
		case <-s.closeTick:
			s.hurry()
		}
	}

	s.log.Info("stopped", "clients_served", s.departed, "requests", s.requestsRun(),
		"replies_dropped", s.lostReplies.Load())
}

// checkFiles makes the store check its files, which Commit does, and look whether there is room for
// what is held. A batch that waits is committed soon anyway.
func (s *keyValueServer) checkFiles() {
	if len(s.batch) == 0 {
		s.commitStore()
		s.answerBatch()
	}
}

// welcome makes a client of conn, if there is a place for one more.
func (s *keyValueServer) welcome(conn net.Conn) {
	if s.closing || s.commitFailed {
		conn.Close()
		return
	}
	if len(s.clients) >= s.maxClients {
		s.reject(conn)
		return
	}

	// The client knows its place in the list, so that leave need not search for it.
	s.welcomed++
	c := newClient(s.welcomed, conn, s)
	c.index = len(s.clients)
	s.clients = append(s.clients, c)

	s.log.Debug("client came", "client", c.id, "addr", c.addr())
	go c.readFromClient()
}

// reject tells conn that the server is full. The rejected client is not in the list, and
// writeToClient is its only goroutine. At most maxRejecting connections at a time surely get the
// message. One more is closed at once.
func (s *keyValueServer) reject(conn net.Conn) {
	if n := s.refusedClients.happened(); n > 0 {
		s.log.Warn("turning clients away", "limit", s.maxClients, "since_last_line", n)
	}

	// The message looks like any other error.
	var why Query
	why.refuse(fmt.Sprintf("server is full (%d clients)", s.maxClients))
	message := why.appendEnd(nil, false, 0)

	// Rejected clients have at most maxRejecting goroutines.
	c := newClient(0, conn, s)
	if s.rejecting == maxRejecting {
		c.connection.Write(message) // does not wait, because the send buffer is empty
		c.paced.Close()
		return
	}

	// Closing at once could reset the connection, and the message would be lost.
	s.rejecting++
	c.paced.limit = time.Now().Add(closeTime) // the Write ends even if nothing is taken
	c.buffer = make(chan []byte, 1)
	c.outbox.queue(message)
	close(c.buffer)
	go c.writeToClient()
}

// runBatch takes q, if it is not nil, and all that is in the queue, runs chains for one round,
// commits them all at once, then answers. A batch that gathers is left open: the next call goes on
// with it.
func (s *keyValueServer) runBatch(q *Query) {
	// The round begins after expire, which has its own time limit.
	s.expire()
	s.round.begin()

	for yields := 0; ; q = s.nextQuery() {
		switch {
		case q != nil:
			s.dispatch(q)

		// The queue is empty. Of the clients that wait, the one with the least finish is next.
		case len(s.turns) > 0 && s.mayRun(&s.turns[0].share):
			sh := &heap.Pop(&s.turns).(*Client).share
			s.floor = max(s.floor, sh.spent)
			chain, next := sh.chain, sh.next
			sh.chain, sh.next = nil, nil // otherwise they stay in memory until its next turn
			s.runChain(chain, next)

		// The batch may grow: let readers run, who may be about to send.
		case yields < maxYields && s.mayGrow() && s.gathering.timer == nil:
			yields++
			runtime.Gosched()
			if len(s.queries) > 0 {
				s.round.begin() // the readers used the time until now
			}

		case s.mayGrow() && s.gathering.mustWait():
			return

		default:
			s.commit()
			if len(s.turns) > 0 {
				runtime.Gosched() // let readers that have something new run, and writers
			}
			return
		}
	}
}

// mayGrow reports whether there is a batch, and the next chains that come may join it.
func (s *keyValueServer) mayGrow() bool {
	return len(s.batch) > 0 && len(s.turns) == 0 && !s.isRoundOver()
}

// isRoundOver reports whether it is time to commit.
func (s *keyValueServer) isRoundOver() bool { return s.round.over || len(s.batch) >= maxBatch }

// mayRun reports whether a chain of sh's client may run before the Commit. A heavy client's chain
// runs only if the batch is empty, because others' replies would wait for it.
func (s *keyValueServer) mayRun(sh *share) bool {
	return !s.isRoundOver() && (len(s.batch) == 0 || !sh.isHeavy())
}

// nextQuery returns the next query in the queue, or nil if there is none.
func (s *keyValueServer) nextQuery() *Query {
	select {
	case q := <-s.queries:
		return q
	default:
		return nil
	}
}

// dispatch does what q asks of workLoop itself, or schedules the chain that q heads.
func (s *keyValueServer) dispatch(q *Query) {
	switch q.queryType {
	case countActive:
		s.countActive <- len(s.clients)
	case countDropped:
		s.countActive <- s.departed

	// /healthz uses countAll, too, to learn whether the server is well. So it is answered after
	// a Commit: while the disk hangs there must be no answer. (A full one gives an answer.)
	case countAll:
		s.batch = append(s.batch, q)

	case depart:
		s.leave(q.client)
	case stopTake, dropTake:
		s.endTake(q)

	// Anybody can make handshakes fail, and often, so they get one line of log in seldomTime.
	case handshakeFailed:
		if n := s.badHandshakes.happened(); n > 0 {
			s.log.Info("TLS handshakes failed", "since_last_line", n, "addr", q.key,
				"reason", q.value())
		}

	default:
		s.schedule(q)
	}
}

// ---- whose turn it is

// round is the time for which workLoop works before it commits and answers: the turns of some
// clients.
type round struct {
	epoch         time.Time     // the clock is time since epoch: time.Now would cost more
	began, looked time.Duration // when the round began, and when the clock was last looked at
	over          bool
}

// now is the time since epoch.
func (r *round) now() time.Duration { return time.Since(r.epoch) }

// begin starts a round.
func (r *round) begin() {
	r.began = r.now()
	r.looked, r.over = r.began, false
}

// charge adds the time since the last look at the clock to the spent time of sh's client. A time
// that is far longer than usual, though no list was searched, is a stall of the system and not the
// client's fault, so only a part of it counts.
func (r *round) charge(sh *share, searched bool) {
	now := r.now()
	took := now - r.looked
	counted := min(took, maxRound) // or this client would wait until all others have had as much
	if !searched {
		counted = min(counted, 2*sh.cost+maxLead)
	}

	sh.spent += counted
	sh.cost = (sh.cost + counted) / 2

	// A look at the clock costs time as well, so looks become rarer while requests are short.
	sh.stride = min(2*max(sh.stride, 1), maxStride)
	if took >= longTime {
		sh.stride = 1
	}

	// Others wait until the round is over, so it is shorter for a heavy client.
	limit := maxRound
	if sh.isHeavy() {
		limit = maxHeavyRound
	}
	r.looked, r.over = now, now-r.began > limit
}

// share is a client's share of workLoop's time. Clients are served much as in start-time fair
// queueing (Goyal, Vin and Cheng, 1996), but the one with the least finish is next, not with the
// least start. spent is kept near floor (schedule), which rises as clients leave turns (runBatch):
// so a client that was quiet goes before one that has spent much, and nobody waits for ever.
type share struct {
	spent  time.Duration // 0: the client is new
	cost   time.Duration // between two looks at the clock: a moving average
	stride int           // requests between two looks

	chain, next *Query // the chain that waits for its turn, and its first request that has not run

	wroteIn  int  // the number of the last batch in which the client wrote (gathering)
	isSteady bool // it also wrote in one of the two batches before that
}

// finish is the time that the client will have had at the next look at the clock, most likely.
func (s *share) finish() time.Duration { return s.spent + s.cost }

// isHeavy reports whether the client's requests of late take long.
func (s *share) isHeavy() bool { return s.cost >= longTime }

// turnQueue holds the clients whose chains wait for a turn, as a heap (container/heap) by finish.
type turnQueue []*Client

func (t turnQueue) Len() int           { return len(t) }
func (t turnQueue) Less(i, j int) bool { return t[i].share.finish() < t[j].share.finish() }
func (t turnQueue) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *turnQueue) Push(c any)        { *t = append(*t, c.(*Client)) }

func (t *turnQueue) Pop() any {
	last := len(*t) - 1
	c := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	return c
}

// gathering lets a batch of writes wait, before a slow Commit, for the clients that write in nearly
// every batch. Otherwise one half of the clients would send while the other half waits for the
// disk, and each half would pay for its own Commits. (A timer for group commit: Helland and others,
// Tandem Technical Report 88.1, 1988. Ours stops early: when the expected clients have come.)
type gathering struct {
	number   int              // of the batch, counting only batches that write
	writers  int              // chains of the batch that write
	steady   int              // clients that wrote in it and in one of the two batches before
	missing  int              // steady clients of the last batch that have not come back
	took     time.Duration    // for the last batch's Commit
	timer    <-chan time.Time // fires when the batch has waited long enough; nil: it does not wait
	began    time.Time        // when the wait began
	timedOut bool             // the wait is over, and clients are missing
	awaited  int              // missing clients when the wait began
	skip     int              // how many batches are not to wait, because waits were in vain
	vain     int              // what skip was after the last wait; 0: that wait was not in vain
}

// wrote notes that sh's client has written in the batch.
func (g *gathering) wrote(sh *share) {
	g.excuse(sh)
	g.writers++
	sh.isSteady = g.number-sh.wroteIn <= 2 // one of the two batches before
	sh.wroteIn = g.number
	if sh.isSteady {
		g.steady++
	}
}

// excuse notes that the batch need not wait for sh's client.
func (g *gathering) excuse(sh *share) {
	if sh.isSteady && sh.wroteIn == g.number-1 {
		g.missing--
	}
	sh.isSteady = false
}

// mustWait reports whether the batch is to wait, and if so, it sets the timer that ends the wait. A
// batch that does not wait only because earlier waits were in vain makes skip less by one.
func (g *gathering) mustWait() bool {
	switch {
	case g.took < slowCommit || g.writers == 0 || g.missing <= 0 || g.timedOut:
		return false
	case g.skip > 0:
		g.skip--
		return false
	}

	// A Commit that a wait saves is worth up to twice its duration, because it takes CPU time, too.
	// But the fewer are missing, the shorter the others wait for them.
	wait := min(2*g.took*time.Duration(g.missing)/time.Duration(g.missing+g.writers), maxRound)
	if g.timer == nil {
		g.timer, g.began, g.awaited = time.After(wait), time.Now(), g.missing
	}
	g.timedOut = time.Since(g.began) >= wait // a Reset for each client that comes costs more
	return !g.timedOut
}

// committed notes how long the batch's Commit took, and begins the next batch.
func (g *gathering) committed(took time.Duration) {
	if g.writers == 0 {
		return
	}

	// If most of those that were awaited did not come, wait less and less often.
	switch {
	case g.timedOut && g.missing > g.awaited/2:
		g.vain = min(2*g.vain+2, maxVain)
		g.skip = g.vain
	case g.timer != nil:
		g.vain = 0
	}
	*g = gathering{number: g.number + 1, missing: g.steady, took: took, skip: g.skip, vain: g.vain}
}

// schedule runs chain, or lines it up to wait for its turn: if its client is new, has had more of
// workLoop's time than others, or may not run before the Commit (mayRun).
func (s *keyValueServer) schedule(chain *Query) {
	sh := &chain.client.share
	isNew := sh.spent == 0

	// A client that was quiet is at most maxRound ahead of the others.
	sh.spent = max(sh.spent, s.floor-maxRound)

	// Nobody else wants to run now. (Without this rule the result is the same, for 2 % more CPU
	// time.)
	if len(s.turns) == 0 && len(s.batch) == 0 && len(s.queries) == 0 {
		s.runChain(chain, chain)
		return
	}

	// A new client waits for its first turn, because its requests may take long.
	if isNew {
		sh.spent, sh.cost = s.floor+maxLead, maxLead
	}

	// While clients have had about the same time, running chains as they come costs least.
	isFirst := len(s.turns) == 0 || sh.finish() < s.turns[0].share.finish()
	if isFirst && sh.finish() < s.floor+maxLead && s.mayRun(sh) {
		s.runChain(chain, chain)
	} else {
		s.lineUp(chain, chain)
	}
}

// lineUp puts chain's client into turns. next is the first request of chain that has not run.
func (s *keyValueServer) lineUp(chain, next *Query) {
	c := chain.client
	c.share.chain, c.share.next = chain, next
	heap.Push(&s.turns, c)
}

// touchLeast is how many requests with keys a chain must have before Touch pays.
const touchLeast = 8

// touch tells the store which keys chain will need, if that pays.
func (s *keyValueServer) touch(chain *Query) {
	if !s.db.TouchPays() {
		return
	}

	s.touched = s.touched[:0]
	for q := chain; q != nil; q = q.next {
		if q.row().effect != noKey {
			s.touched = append(s.touched, q.key)
		}
	}
	if len(s.touched) >= touchLeast {
		s.db.Touch(s.touched)
	}

	// The keys are parts of lines, and would keep these in memory.
	clear(s.touched)
}

// runChain runs chain from q on, until the chain or the round ends. A chain that has run waits in
// batch for its Commit; a Take that has found nothing waits in takes.
func (s *keyValueServer) runChain(chain, q *Query) {
	c := chain.client

	// A chain that goes on in a later round is prepared already.
	if q == chain {
		s.prepare(chain)
	}

	// left counts requests down to the next look at the clock. searched: a list was searched since
	// the last look.
	left, searched := c.share.stride, false
	wrote := false
	for ; q != nil && !s.commitFailed; q = q.next {
		wrote = s.run(q) || wrote

		// Look at the clock now and then, and at the chain's end, so that its time is its client's.
		if left--; q.row().searches {
			left -= searchCost - 1
			searched = true
		}
		if left <= 0 || q.next == nil {
			s.round.charge(&c.share, searched)
			left, searched = c.share.stride, false
		}
		if s.round.over && q.next != nil {
			s.lineUp(chain, q.next)
			return
		}
	}

	// A Take that found nothing waits in takes. A batch does not wait for a client that came
	// without a write.
	if isParked := chain.mayWait() && chain.n == 0; isParked {
		s.takes.add(chain)
		wrote = false
	} else {
		s.batch = append(s.batch, chain)
	}
	if wrote {
		s.gathering.wrote(&c.share)
	} else {
		s.gathering.excuse(&c.share)
	}
}

// run runs q, or refuses it. It reports whether q is a write, also if admit refuses it; but not if
// expireKey does.
func (s *keyValueServer) run(q *Query) (writes bool) {
	// q must not find an expired key, and a write needs room.
	if s.overdue != noneOverdue {
		s.expireKey(q)
	}
	writes = q.writes()
	if writes {
		s.admit(q)
	}
	s.requests[q.queryType]++

	// Stats is about the server's counters, which the store does not have.
	if q.queryType == stats {
		for _, row := range s.stats() {
			q.values = append(q.values, row.line())
		}
		q.answer(q.values)
		return false
	}

	// Run it. It may bring a value that a Take waits for.
	q.run(s.db, s.now)
	if s.takes.n > 0 {
		s.serveTakes(q)
	}
	return writes
}

// takeQueues holds the Takes that wait for a value: a queue for each key, oldest first. It belongs
// to workLoop. Each Take is a chain of its own that is under way, with memory of its own.
type takeQueues struct {
	of map[string]*list.List // queues of *Query by key; none is empty
	n  int                   // Takes in all queues
}

// add puts chain at the end of its key's queue.
func (t *takeQueues) add(chain *Query) {
	queue := t.of[chain.key]
	if queue == nil {
		queue = list.New()
		t.of[chain.key] = queue
	}
	chain.client.parked = queue.PushBack(chain)
	t.n++
}

// remove takes c's Take out of its queue and returns it.
func (t *takeQueues) remove(c *Client) (chain *Query) {
	chain = c.parked.Value.(*Query)
	queue := t.of[chain.key]
	if queue.Remove(c.parked); queue.Len() == 0 {
		delete(t.of, chain.key)
	}
	c.parked = nil
	t.n--
	return chain
}

// serveTakes hands the values that q has added to the Takes that wait for its key, the longest
// waiter first.
func (s *keyValueServer) serveTakes(q *Query) {
	if effect := q.row().effect; effect != adds && effect != replaces {
		return
	}

	// While a Take waits its key has no value, so all values are from q. If admit refuses a Take
	// the value stays, and the next Take is tried.
	for queue := s.takes.of[q.key]; queue != nil && queue.Len() > 0 && s.db.Count(q.key) > 0; {
		chain := s.takes.remove(queue.Front().Value.(*Query).client)
		s.admit(chain)
		chain.run(s.db, s.now)
		s.batch = append(s.batch, chain)
	}
}

// endTake ends the Take of q's client. If it waits for a value it is answered without one. If it
// still waits for its turn, stopTake has it run once, without waiting, and dropTake answers it
// without a value.
func (s *keyValueServer) endTake(q *Query) {
	c := q.client

	// The Take has had its turn, and waits for a value.
	if c.parked != nil {
		s.batch = append(s.batch, s.takes.remove(c))
		return
	}

	// Otherwise it waits for its turn, or its answer and q have crossed.
	switch place := slices.Index(s.turns, c); {
	case place < 0: // it is in batch or held, or was answered
	case q.queryType == dropTake:
		heap.Remove(&s.turns, place)
		s.batch = append(s.batch, c.share.chain)
		c.share.chain, c.share.next = nil, nil
	default:
		c.share.chain.seconds = 0
	}
}

// prepare starts the client's writeToClient at the first chain, and tells the store the keys.
func (s *keyValueServer) prepare(chain *Query) {
	c := chain.client
	if c.buffer == nil {
		c.buffer = make(chan []byte, maxBufferSize)
		c.alive++
		go c.writeToClient()
	}
	s.touch(chain)
}

// admit refuses q, a write, if there is no memory for it, or the store has no room for it.
func (s *keyValueServer) admit(q *Query) {
	// Memory never refuses requests that free, or it would stay full.
	if s.budget.limit > 0 && !q.frees() && s.lacksMemory(q) {
		q.refuse(fmt.Sprintf("the server's memory is full (%d bytes): Delete something first",
			s.budget.forData()))
		s.collect()
		if n := s.refusedForMemory.happened(); n > 0 {
			s.log.Error("writes are refused: the memory is full; Delete something, or raise "+
				"-max-memory", "limit", s.budget.forData(), "since_last_line", n)
		}
		return
	}

	// The log has the key of a Lease twice.
	bytes := int64(2*len(q.key) + len(q.value()) + len(q.newValue()))
	if err := s.db.Room(q.key, bytes, q.removes()); err != nil {
		why, todo := "the disk is full", "; make room"
		if !storage.IsFull(err) {
			why, todo = "the data cannot be saved", ""
		}
		q.refuse(fmt.Sprintf("%s, nothing was changed: %v", why, err))
		if n := s.refusedByStore.happened(); n > 0 {
			s.log.Error("writes are refused: "+why+todo, "since_last_line", n, "error", err)
		}
	}
}

// overdue says whether expired keys have yet to be deleted.
type overdue uint8

const (
	noneOverdue  overdue = iota
	someOverdue          // they are deleted by turns with the clients' requests
	stuckOverdue         // the disk has no room for the Deletes; the next batch tries again
)

// expire deletes expired keys for about maxHeavyRound. Of those that are left, expireKey deletes
// the one that a request asks for. The next Commit makes the Deletes durable; after a crash before
// it they are done again.
func (s *keyValueServer) expire() {
	// If there was no room on disk, there may be now.
	s.overdue = noneOverdue
	if s.commitFailed || s.db.Expiring() <= 0 {
		return
	}

	// Many keys may expire at the same time: clients wait no longer than for a heavy client.
	now, began := s.now().UnixMilli(), time.Now()
	for n := 1; s.overdue == noneOverdue; n++ {
		key, isDue := s.db.NextDue(now)
		switch {
		case !isDue:
			return
		case s.deleteExpired(key) != nil:
			s.overdue = stuckOverdue
		case n%expireStride == 0 && time.Since(began) >= maxHeavyRound:
			s.overdue = someOverdue
		}
	}
}

// expireKey deletes q's key if that has expired. It refuses q if the store has no room for the
// Delete (kvstore.Store).
func (s *keyValueServer) expireKey(q *Query) {
	if q.row().effect == noKey {
		return
	}

	if at, goes := s.db.Deadline(q.key); goes && at <= s.now().UnixMilli() {
		if err := s.deleteExpired(q.key); err != nil {
			q.refuse(fmt.Sprintf("the key's time is over, but it cannot be deleted: %v", err))
		}
	}
}

// deleteExpired deletes key, which has expired, if the disk has room for that.
func (s *keyValueServer) deleteExpired(key string) error {
	if err := s.db.Room(key, int64(len(key)), math.MaxInt); err != nil {
		return err
	}

	s.db.Delete(key)
	s.expired++
	return nil
}

// ---- budget: -max-memory and -max-queues

// budget says how much memory there is for the data and for what clients make the server hold. Many
// goroutines of clients, and the collector's gcPacer, count in the same fields, so these are
// atomic.
//
// Of -max-memory a reserve is not shared out. Of the rest three quarters are for data, an eighth is
// for queues and an eighth is for input, which gets a part of the reserve, too. So messages that
// nobody reads, and lines that do not end, take nothing from the data. A client can make the
// server hold:
//
//	what             one client, at most          all clients, at most    at that limit
//	values           -                            data                    writes are refused, except
//	                                                                      those that free
//	its bursts       eight of burstSize, and      half of forInput, and   they are read in pieces of
//	                 maxChain queries             grantedInput for each   grantedSize, and in chains
//	                                                                      of grantedChain
//	a line that has  its buffer, up to            forInput, grantedInput  it waits for memory or a
//	begun            -max-line, and grantedSize   for each; with slots    slot (anyLine, freeing);
//	                                              (mayHaveSlot) also      one that hardly comes is
//	                                              forQueues, three lines  skipped while others wait
//	lines that have  -                            maxEnded buffers of     a line that has begun
//	ended                                         forInput, for           takes their memory
//	                                              quietAfter (passOn)
//	a chain that     the same                     bursts and lines as     if such lines alone exceed
//	waits                                         above; long lines       queues, others' long lines
//	                                              (waitingText) count     wait; if the sum is over
//	                                              with replies, too       queues, a client that
//	                                                                      takes nothing is cut
//	replies          maxBufferSize of maxMessage, queues, a quarter more  a client that takes
//	                 one being made, one being    for replies that have   nothing loses them; after
//	                 written                      begun, and two of       Ack, or in a Keys or Dump,
//	                                              chunkSize a client      it is cut; a reply of over
//	                                                                      maxShared messages that
//	                                                                      has begun waits
//	lists that wait  16 bytes a value of maxChain counted in queues       as with replies, also
//	                 Gets                         while they wait         after a reply that may not
//	                                                                      be dropped (shed)
//	their values     those that others removed    half of the reserve     the rest counts as data; a
//	                                                                      client that takes nothing,
//	                                                                      or drips, is cut if the
//	                                                                      data needs their memory
//	keys to be       16 bytes a key, in parts of  half of queues          the next Keys or Dump
//	listed           maxList, or queues/4 if less                         waits
//	copied keys      all that a Keys lists        half of queues          the Keys keeps its
//	                                                                      snapshot
//	snapshots        one: what others change      maxSnapshots; with the  the next Keys or Dump
//	                                              values of lists         waits; a client that takes
//	                                                                      nothing, or drips, is cut
//	a Take that      1 KiB, and its key; after    long keys count as      it does not wait; the rest
//	waits            a half-close 3 KiB           lines                   counts as data
//	                                                                      (memoryPerClient)
//	goroutines       three, and Client            memoryPerClient each,   one more client is told
//	                                              at most half of what    that the server is full
//	                                              data may take
//	TLS handshakes   memoryPerShake               half of the reserve     one more takes the place of
//	                                                                      another (fewConns), and
//	                                                                      waits (shaking) until
//	                                                                      workLoop knows of its end
//	requests of      guestMost                    maxWatchers             one more takes the place of
//	-http                                                                 another
//	sockets          sendBuffer, twice, and what  -                       not counted: it is the
//	                 the kernel takes in                                  kernel's memory
//
// Without -max-memory data and input have no limit. With -max-queues 0 queues have their eighth of
// -max-memory, and without that, too, they have no limit.
type budget struct {
	// Read-only once started, in bytes.
	limit     int64 // that the process may take (-max-memory); 0: no limit
	reserve   int64 // of limit: the program, garbage, input, removed values, handshakes, what is not counted
	maxQueues int64 // that all queues may take (-max-queues); 0: no limit
	fewKeys   int   // keys in a list that acquires no memory: the constant, except in tests

	// In use, in bytes.
	queued       atomic.Int64 // replies, lists and copied keys that wait
	keyLists     atomic.Int64 // of queued: keys to be listed
	waitingLines atomic.Int64 // lines whose replies wait, beyond a short burst's (waitingText)
	inputs       atomic.Int64 // read buffers, chains, long keys of Takes, beyond what each may have
	granted      atomic.Int64 // the rest of them: what each client may have (grantedInput)
	store        atomic.Int64 // store and clients, as workLoop last noted them
	pinned       atomic.Int64 // values that waiting replies would keep if others removed them all

	// The most that ofClients was since the last collection, as far as workLoop looked.
	mostOfClients atomic.Int64

	// What else was alive after the last collection: most likely values that are pinned and were
	// removed from the store (removed), and all the rest (other).
	removed, other atomic.Int64

	// Each has one slot, for a line beyond the share of input: any line, and a line that frees.
	anyLine, freeing semaphore

	// Buffers of lines that have ended, for others (passOn), and when there was the last one, in
	// Unix nanoseconds. inputs counts them.
	ended   chan endedLine
	endedAt atomic.Int64
}

// How -max-memory is shared out: reserveMin bytes and a fifth (reserveShare) are the reserve, but
// no more than half. Of the rest an eighth each is for queues (queuesShare) and for input
// (inputShare). Input also gets a quarter of the reserve (inputOfReserve).
const (
	reserveMin     = 24 << 20
	reserveShare   = 5
	queuesShare    = 8
	inputShare     = 8
	inputOfReserve = 4
)

// limitTo sets -max-memory and -max-queues, before the server starts.
func (b *budget) limitTo(memory, queues int64) {
	b.limit, b.maxQueues = memory, queues
	b.reserve = min(reserveMin+memory/reserveShare, memory/2)
}

// collected notes that live bytes were alive at a collection. What is neither in the store nor in
// the most that clients had since the last one is unknown. (While clients' memory goes up and down
// fast, too little counts as unknown.) What is pinned takes memory of the reserve, up to a half
// of that, so that no write is refused for it.
func (b *budget) collected(live int64) {
	unknown := max(0, live-b.store.Load()-max(b.ofClients(), b.mostOfClients.Swap(0)))
	removed := min(unknown, b.pinned.Load(), b.reserve/2)
	b.removed.Store(removed)
	b.other.Store(unknown - removed)
}

// shared is how many bytes are shared out.
func (b *budget) shared() int64 { return b.limit - b.reserve }

// forData is the limit for the data and for memory whose use is not known (other).
func (b *budget) forData() int64 {
	return b.shared() - b.shared()/queuesShare - b.shared()/inputShare
}

// clients returns how many clients there may be, if each takes perClient bytes while it is quiet:
// all together take at most half of what the data may take.
func (b *budget) clients(perClient int64) int { return int(b.forData() / 2 / perClient) }

// handshakes returns how many TLS handshakes may be under way: at most so many, and as many as fit
// into half of the reserve.
func (b *budget) handshakes(most int) int {
	if b.limit == 0 {
		return most
	}
	return min(most, int(b.reserve/2/memoryPerShake))
}

// forQueues is how many bytes all queues may take; 0: no limit.
func (b *budget) forQueues() int64 {
	switch {
	case b.limit == 0:
		return b.maxQueues
	case b.maxQueues == 0:
		return b.shared() / queuesShare
	}
	return min(b.maxQueues, b.shared()/queuesShare)
}

// ofClients is how many bytes the queues, the waiting lines and the input of all clients take.
func (b *budget) ofClients() int64 {
	return b.queued.Load() + b.waitingLines.Load() + b.inputs.Load() + b.granted.Load()
}

// data is about how many bytes of forData are in use.
func (b *budget) data() int64 { return b.store.Load() + b.other.Load() }

// fits reports whether there is memory for a write that takes bytes more, if it may use ofReserve
// bytes of the reserve.
func (b *budget) fits(bytes, ofReserve int64) bool {
	return b.data()+bytes <= b.forData()+ofReserve
}

// isAtLimit reports whether all queues together have reached their limit.
func (b *budget) isAtLimit() bool { return !b.mayQueue(0) }

// isCrowded reports whether all queues and waitingLines have together reached that limit.
func (b *budget) isCrowded() bool { return !b.mayQueue(b.waitingLines.Load()) }

// needsPinned reports whether the removed values that replies still pin are many, and do not fit
// into forData beside the data. Then clients that read too slowly must give up what they have
// pinned.
func (b *budget) needsPinned() bool {
	removed := min(b.removed.Load(), b.pinned.Load())
	return b.limit > 0 && removed > b.shared()/queuesShare && !b.fits(removed, 0)
}

// mayQueue reports whether bytes more may be queued.
func (b *budget) mayQueue(bytes int64) bool {
	most := b.forQueues()
	return most == 0 || b.queued.Load()+bytes < most
}

// The lists of all Keys and Dumps may take half of what is for queues. A single list may take half
// of that, or maxList bytes if that is less. A list of up to fewKeys may always be made.
const (
	maxList    = 64 << 20
	listsShare = 2
)

// forList is how many bytes the list of a Keys or Dump may take.
func (b *budget) forList() int64 {
	if most := b.forQueues(); most > 0 {
		return min(maxList, max(most/listsShare/2, int64(b.fewKeys)*stringSize))
	}
	return maxList
}

// acquireList counts bytes more for the list of a Keys or Dump, if the lists may take them.
func (b *budget) acquireList(bytes int64) bool {
	return addUpTo(&b.keyLists, bytes, b.forQueues()/listsShare)
}

// forInput is how many bytes the buffers and chains of all clients may take beyond grantedInput; 0:
// no limit.
func (b *budget) forInput() int64 { return b.shared()/inputShare + b.reserve/inputOfReserve }

// forBursts is how many of these bytes bursts may take. The rest is left for long lines.
func (b *budget) forBursts() int64 { return b.forInput() / 2 }

// mayTakeLines reports whether a long line may get memory now. If the lines whose replies wait have
// reached the limit of the queues, clients that take too little are cut first.
func (b *budget) mayTakeLines() bool { return b.limit == 0 || b.waitingLines.Load() < b.forQueues() }

// addUpTo adds bytes to sum, unless sum would then be more than most; 0: no limit.
func addUpTo(sum *atomic.Int64, bytes, most int64) bool {
	for {
		before := sum.Load()
		if before+bytes > most && most > 0 {
			return false
		}
		if sum.CompareAndSwap(before, before+bytes) {
			return true
		}
	}
}

// lacksMemory reports whether there is no memory for q. A write that leaves the store no larger may
// use half of the reserve: while there is a snapshot, even such a write copies memory.
func (s *keyValueServer) lacksMemory(q *Query) bool {
	s.noteMemory()
	if s.budget.fits(q.memory(), 0) {
		return false
	}

	// Count room that was freed inside slabs, too. It is used again.
	return !s.budget.fits(q.memory()-s.db.Reclaim(), 0) &&
		!(s.budget.fits(0, s.budget.reserve/2) && q.makesLess(s.db))
}

// collect starts a collection, at most once in collectTime: until the next collection, memory that
// nobody uses any more, such as values of a reply, counts as data.
func (s *keyValueServer) collect() {
	if now := time.Now(); now.Sub(s.collectedAt) >= collectTime {
		s.collectedAt = now
		go runtime.GC()
	}
}

// noteMemory tells the budget how many bytes the store and the clients take.
func (s *keyValueServer) noteMemory() {
	b := &s.budget
	b.mostOfClients.Store(max(b.mostOfClients.Load(), b.ofClients()))
	b.store.Store(s.db.Footprint() + int64(len(s.clients))*s.perClient())
}

// perClient is how many bytes a quiet client takes.
func (s *keyValueServer) perClient() int64 {
	if s.tls != nil {
		return memoryPerClient + memoryOfTLS
	}
	return memoryPerClient
}

// freeMemory gives memory back to the system when the data and the clients have shrunk by a quarter
// and by giveBackMin. The collector alone would wait for minutes while nothing is allocated.
func (s *keyValueServer) freeMemory() {
	now := s.budget.store.Load()
	if s.largest = max(s.largest, now); now < s.largest/4*3 && s.largest-now > giveBackMin {
		s.largest = now
		go debug.FreeOSMemory()
	}
}

// semaphore limits how many goroutines at a time have something that is scarce.
type semaphore struct {
	slots   chan struct{} // holds a token for each slot that is taken
	waiting atomic.Int64  // goroutines that wait for a slot, or for memory (list, begun line)
}

// slot is one place in a semaphore, taken or not. One goroutine at a time owns it.
type slot struct {
	of    *semaphore
	taken bool
}

// acquire waits for a slot. It returns false if stop is closed first. A nil stop is never closed.
func (s *slot) acquire(stop <-chan struct{}) bool {
	// Most often a slot is free, and the goroutine does not count as waiting.
	select {
	case s.of.slots <- struct{}{}:
		s.taken = true
		return true
	default:
	}

	// Count this goroutine: while somebody waits, decide cuts a slow reader of a Keys or Dump.
	s.of.waiting.Add(1)
	defer s.of.waiting.Add(-1)

	select {
	case s.of.slots <- struct{}{}:
		s.taken = true
		return true
	case <-stop:
		return false
	}
}

// release gives the slot back, if it is taken.
func (s *slot) release() {
	if s.taken {
		s.taken = false
		<-s.of.slots
	}
}

// yield lets other goroutines have the slot and the core in the middle of long work. The scheduler
// by itself would let it work for 10 ms.
func (s *slot) yield() {
	if s.taken {
		s.release()
		runtime.Gosched()
		s.acquire(nil)
	}
}

// isAwaited reports whether the slot is taken and others wait for one.
func (s *slot) isAwaited() bool { return s.taken && s.of.waiting.Load() > 0 }

// applyLimits gives s the limits that c asks for, as far as the process may open so many files, and
// -max-memory is enough for so many clients.
func applyLimits(s *keyValueServer, c config) {
	s.maxLine, s.writeTimeout = int(c.maxLine), c.writeTimeout
	s.budget.limitTo(c.maxMemory, c.maxQueues)

	// Near the limit Go's garbage collector works harder.
	if c.maxMemory > 0 {
		debug.SetMemoryLimit(c.maxMemory)
		s.noteMemory()
		if !s.budget.fits(0, 0) {
			s.log.Warn("writes are refused: the data takes more memory than -max-memory leaves for it; "+
				"Delete something, or raise it", "bytes", s.budget.data(), "limit", s.budget.forData())
		}
	}

	// Each connection is an open file. Some files are for other uses.
	files := storage.OpenFiles() - spareFiles
	if c.http != "" {
		files -= maxWatchers
	}
	if s.tls != nil {
		s.handshakes = max(1, min(maxHandshakes, files/4))
		files -= s.handshakes
	}

	// The rest is for clients, as far as there is memory for them. If it is less than -max-clients
	// (or its default), the log says so: not as a warning if memory is the reason.
	most, level, why := files, slog.LevelWarn, "the process may not open more files: see ulimit -n"
	if n := s.budget.clients(s.perClient()); c.maxMemory > 0 && n < most {
		most, level, why = n, slog.LevelInfo, "-max-memory has no room for more"
	}
	if s.maxClients = max(1, min(c.maxClients, most)); s.maxClients < c.maxClients {
		s.log.Log(context.Background(), level, "fewer clients than -max-clients: "+why,
			"max_clients", s.maxClients, "asked", c.maxClients, "files", storage.OpenFiles())
	}
}

// gcPacer chooses how much garbage there may be before it is collected. Go lets the heap double.
// But nearly all of our heap is data that a collection does not even read, so a collection costs
// little and may come sooner: the process takes a third less memory.
type gcPacer struct {
	server  *keyValueServer
	percent int // that was last set (GOGC)
}

// Garbage is collected once it has so many bytes: garbageMin, one for each garbageShare bytes that
// are alive, and as many as are in objects with pointers, because a collection reads these.
const garbageMin, garbageShare = 16 << 20, 16

// follow calls choose now and after each collection: a collection runs the finalizer of an object
// to which nothing points. The finalizers run on a goroutine of Go's runtime.
func (p *gcPacer) follow() {
	p.choose()
	type unused struct{ p *gcPacer }
	runtime.SetFinalizer(&unused{p}, func(*unused) { p.follow() })
}

// choose sets the collector's percentage, and tells the budget how many bytes are alive.
func (p *gcPacer) choose() {
	// The first is from the last collection, the second from now. Both cost little to read.
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/heap:bytes"}}
	metrics.Read(samples)
	live, linked := int64(samples[0].Value.Uint64()), int64(samples[1].Value.Uint64())
	p.server.budget.collected(live)

	// What is pinned takes the place of garbage. However little is alive, Go lets the heap grow to
	// 4 MiB times the percentage. So percent is about 700 at most: 28 MiB.
	garbage := garbageMin + live/garbageShare + min(linked, live) - p.server.budget.removed.Load()
	garbage = max(garbage, garbageMin/4)
	percent := int(garbage * 100 / max(live, garbageMin/6))

	// Setting it stops all goroutines for a moment, so small changes are left out.
	if percent < p.percent*9/10 || percent > p.percent*10/9 {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
}

// ---- the end of a batch

// commit makes what the batch did durable, then answers. If there is no room for that now, some
// chains wait (hold). If it fails otherwise no client may learn what the chains did, and every
// connection ends.
func (s *keyValueServer) commit() {
	// Reads are committed, too: they may have seen a write that is not durable yet.
	if len(s.batch) > 0 {
		s.commitStore()
	}
	s.answerBatch()
}

// answerBatch answers the batch, after its Commit: no client learns earlier what its chains have
// done.
func (s *keyValueServer) answerBatch() {
	for i, chain := range s.batch {
		switch c := chain.client; {
		case chain.queryType == countAll && s.commitFailed:
			close(chain.asker)
		case chain.queryType == countAll:
			chain.asker <- s.stats()
		case s.commitFailed:
			c.done <- nil
		default:
			c.answer(chain)
		}
		s.batch[i] = nil
	}
	s.batch = s.batch[:0]

	// Other goroutines ask at any time what the store takes, and only workLoop can see that.
	s.noteMemory()
	s.freeMemory()
}

// commitStore commits what the batch did, and measures how long that takes. If it fails, nothing
// runs any more, unless there only is no room now (hold).
func (s *keyValueServer) commitStore() {
	if s.commitFailed {
		return
	}

	began := s.round.now()
	err := s.db.Commit()

	// Without a batch it was checkFiles' Commit, perhaps with expired keys' Deletes or what is held.
	if took := s.round.now() - began; len(s.batch) > 0 {
		s.gathering.committed(took)
		if s.status != nil {
			s.commits.Observe(took.Seconds())
			s.batches.Observe(float64(len(s.batch)))
		}
	}

	// There is no room now: some chains wait for a later Commit, and the others are answered.
	if errors.Is(err, storage.ErrNoRoom) {
		s.hold()
		return
	}
	if s.unsaved != nil {
		s.batch = append(s.held, s.batch...)
		s.held, s.unsaved = nil, nil
	}

	// What the batch did is not known to be on disk, so no client is told anything.
	if err != nil {
		s.commitFailed = true
		s.failed <- err
		for _, c := range s.clients {
			c.paced.Close() // without an error line: to write one could take long
		}
	}
}

// hold takes those chains out of the batch that have changed what is not durable, or may tell of
// it: they wait until a Commit finds room. So reads go on while the store is full. (Stats may count
// what is not durable.)
func (s *keyValueServer) hold() {
	if s.unsaved == nil {
		s.unsaved = map[string]bool{}
	}
	note := func(chain, end *Query) {
		for q := chain; q != end; q = q.next {
			if q.changed() {
				s.unsaved[q.key] = true
			}
		}
	}

	// A chain that waits for its turn may have changed something, too.
	for _, c := range s.turns {
		note(c.share.chain, c.share.next)
	}
	for _, chain := range s.batch {
		note(chain, nil)
	}

	answered := s.batch[:0]
	for _, chain := range s.batch {
		if !s.mayTell(chain) {
			answered = append(answered, chain)
			continue
		}
		s.held = append(s.held, chain)
		for q := chain; q != nil; q = q.next {
			q.keep() // it may be held for long
		}
	}
	clear(s.batch[len(answered):])
	s.batch = answered
}

// mayTell reports whether chain may tell of what is not durable: a request of it is about a key in
// unsaved, or about all keys. An Expire without seconds has no key any more, so it may be about
// any.
func (s *keyValueServer) mayTell(chain *Query) bool {
	for q := chain; q != nil; q = q.next {
		v := q.row()
		if v.lists || v.effect != noKey && (q.key == "" || s.unsaved[q.key]) {
			return true
		}
	}
	return false
}

// leave notes that one of c's goroutines has ended. If it was the last one, c leaves the list.
func (s *keyValueServer) leave(c *Client) {
	// A rejected client is not in the list.
	if c.id == 0 {
		s.rejecting--
		return
	}
	s.gathering.excuse(&c.share)
	if c.alive--; c.alive > 0 {
		return
	}

	// The last client in the list takes c's place.
	last := s.clients[len(s.clients)-1]
	s.clients[c.index], last.index = last, c.index
	s.clients[len(s.clients)-1] = nil
	s.clients = s.clients[:len(s.clients)-1]
	s.departed++

	// If a Write failed, that is the reason to log. That reading ended may be an effect of it.
	level, reason := slog.LevelDebug, c.reason
	switch {
	case c.outbox.cutFor != "":
		level, reason = slog.LevelWarn, c.outbox.cutFor
	case c.writeErr != nil:
		reason = c.writeErr.Error()
		if errors.Is(c.writeErr, errTookNothing) {
			level = slog.LevelWarn
		}
	}

	if c.outbox.lostReplies > 0 {
		level, reason = slog.LevelWarn, fmt.Sprintf("slow reader, %d replies dropped; then %s",
			c.outbox.lostReplies, reason)
	}

	s.log.Log(context.Background(), level, "client left", "client", c.id, "addr", c.addr(),
		"reason", reason)
}

// stopReading begins the end of the server: no more requests are read. A second call does nothing.
// Writes end with timeIsUp. A client that has sent something within the last second, or has much to
// read, gets drainTime to take its last replies (drainInput).
func (s *keyValueServer) stopReading() {
	if s.closing {
		return
	}
	s.closing = true
	s.log.Info("stopping", "clients", len(s.clients))

	// Reads that wait end now.
	now := time.Now()
	for _, c := range s.clients {
		c.connection.SetReadDeadline(now)
	}
	s.closeTick = time.After(lookTime)
}

// hurry ends all Writes when closeTime is over. It counts ticks: a while in which the whole process
// stood still counts as one tick.
func (s *keyValueServer) hurry() {
	if s.closeTicks++; s.closeTicks < int(closeTime/lookTime) {
		s.closeTick = time.After(lookTime)
		return
	}

	s.closeTick = nil
	close(s.timeIsUp)
	now := time.Now()
	for _, c := range s.clients {
		c.paced.SetWriteDeadline(now)
	}
}

// counter is a row of Stats and /metrics.
type counter struct {
	name  string // it ends in _total if it counts events
	help  string // a sentence that says what the value is
	value any    // a number, or the version's text, which /metrics shows as a label
}

// line returns c as Stats shows it.
func (c counter) line() string { return fmt.Sprint(c.name, " ", c.value) }

// write writes c in the text format of Prometheus.
func (c counter) write(w io.Writer) {
	name, labels, value := c.name, "", c.value
	if text, isText := value.(string); isText {
		name, labels, value = "info", fmt.Sprintf("{%s=%q}", c.name, text), 1
	}

	// Prometheus wants the type of the number.
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	fmt.Fprintf(w, "# HELP kvserver_%s %s\n# TYPE kvserver_%s %s\nkvserver_%s%s %v\n",
		name, c.help, name, kind, name, labels, value)
}

// stats returns the rows that Stats and /metrics both show. Only workLoop calls it. To add a row,
// give it a name that ends in _total if it counts events, and a sentence of help, and add it to
// protocol.Stats in the same place. A value that changes by itself is an exception in
// TestWatchHasTheCountersOfStats.
func (s *keyValueServer) stats() []counter {
	// The memory rows below are to be up to date.
	s.noteMemory()

	rows := []counter{
		{"version", "Always 1; its label is the version.", s.version},
		{"uptime_seconds", "Since the server began to serve.", int(time.Since(s.started).Seconds())},
		{"clients", "Connections now.", len(s.clients)},
		{"clients_left_total", "Connections that have ended.", s.departed},
	}

	for t := put; t <= quit; t++ {
		verb, n := strings.ToLower(verbs[t].name), s.requests[t]
		if t == expire {
			n += s.requests[timeLeft]
		}
		rows = append(rows, counter{verb + "_requests_total",
			"Requests of the kind " + verb + " that were run.", n})
	}

	rows = append(rows, []counter{
		{"refused_requests_total", "Lines that were answered with an error.",
			s.requests[malformed] + s.requests[foreign]},
		{"replies_dropped_total", "Replies that clients lost because they did not read.",
			s.lostReplies.Load()},
		{"queued_bytes", "Replies of all clients that wait to be read.", s.budget.queued.Load()},
		{"queued_limit_bytes", "How much they may be (-max-queues); 0: no limit.", s.budget.forQueues()},
		{"writes_refused_total", "Writes that were refused: no room on disk or in memory, or spoiled files.",
			s.refusedByStore.total + s.refusedForMemory.total},
		{"waiting_takes", "Takes that wait for a value.", s.takes.n},
		{"expired_keys_total", "Keys that were deleted because their time was over.", s.expired},
		{"clients_refused_total", "Connections over -max-clients, which were refused.", s.refusedClients.total},
		{"tls_handshakes_failed_total", "TLS handshakes that failed or were given up.",
			s.badHandshakes.total},
	}...)

	// A store may not know how much it holds (kvstore.Store).
	keys, values, bytes := s.db.Size()
	if keys < 0 {
		return rows
	}
	return append(rows, []counter{
		{"keys", "Keys in the store.", keys},
		{"values", "Values in the store.", values},
		{"expiring_keys", "Keys that have a deadline (Expire, Lease).", s.db.Expiring()},
		{"data_bytes", "Keys and values together.", bytes},
		{"memory_bytes", "What the data and the clients take in memory, without queued replies.",
			s.budget.data()},
		{"memory_limit_bytes", "Writes that need more are refused; 0: no limit.", s.budget.forData()},
		{"process_bytes", "What the process takes from the system.", processBytes()},
	}...)
}

// processBytes is how many bytes of memory the process has from the system, without the program's
// own code.
func processBytes() uint64 {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() - samples[1].Value.Uint64()
}

// requestsRun returns how many requests were run or refused.
func (s *keyValueServer) requestsRun() (n int64) {
	for _, some := range s.requests {
		n += some
	}
	return n
}

// ---- listening

// unixPrefix stands before the path in the address of a unix socket.
const unixPrefix = "unix:"

// listen listens on addr. A peer that has vanished is noticed after 30 s: keep-alive asks three
// times, after 15, 20 and 25 s of silence. (If the peer has not confirmed what was
// written to it, the kernel sends that again instead, for minutes.) The host localhost means
// 127.0.0.1 and ::1, if the machine has both, because many clients try only one of them. localhost
// is not looked up.
func listen(addr string) (listeners []net.Listener, err error) {
	if path, isUnix := strings.CutPrefix(addr, unixPrefix); isUnix {
		return listenUnix(path)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}

	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	}

	// The kernel asks silent peers whether they are still there.
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}

	// The first address tells which port is free, and the second address gets the same port.
	isAnyPort := port == "0"
	for _, host := range hosts {
		var listener net.Listener
		listener, err = config.Listen(context.Background(), "tcp", net.JoinHostPort(host, port))
		switch {
		case err == nil:
			listeners = append(listeners, listener)
			_, port, _ = net.SplitHostPort(listener.Addr().String())

		// One of the two addresses is enough: the machine does not have this one, or any port
		// would do and this one is not free there.
		case isAny(err, noAddress...) || isAnyPort && len(listeners) > 0:

		default:
			closeAll(listeners)
			return nil, err
		}
	}

	// The machine has none of the addresses.
	if len(listeners) == 0 {
		return nil, err
	}
	return listeners, nil
}

// isAny reports whether err is one of targets.
func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

// errNoSocket is returned by listenUnix if there is a file of another kind.
var errNoSocket = errors.New("there is a file that is no socket")

// listenUnix listens on a unix socket at path, to which its user and group may connect. It replaces
// the socket of a server that has died. Closing the listener removes the socket.
func listenUnix(path string) ([]net.Listener, error) {
	// A file that is no socket stays.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, errNoSocket
	}

	// A server that was killed leaves its socket behind, and nobody listens on it.
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
	} else if isAny(err, refused...) {
		os.Remove(path)
	}

	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}

	// Its mode, and its directory's, decide who may connect.
	err = os.Chmod(path, 0o660)
	made, statErr := os.Lstat(path)
	if err = cmp.Or(err, statErr); err != nil {
		listener.Close()
		return nil, err
	}

	// Go's own Close would remove any file at path; unixListener removes only this socket.
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	return []net.Listener{&unixListener{listener, path, made}}, nil
}

// unixListener removes its socket when it is closed, unless another server has put one in its
// place.
type unixListener struct {
	net.Listener
	path string
	made fs.FileInfo
}

func (l *unixListener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(l.made, now) {
		os.Remove(l.path)
	}
	return l.Listener.Close()
}

// closeAll closes listeners.
func closeAll(listeners []net.Listener) {
	for _, listener := range listeners {
		listener.Close()
	}
}

// Errors of listening and connecting, with their numbers on Windows: somebody else listens there
// (WSAEADDRINUSE); the machine does not have the address (WSAEADDRNOTAVAIL), or no address of its
// kind; nobody listens there (WSAECONNREFUSED).
var (
	inUse     = []error{syscall.EADDRINUSE, syscall.Errno(10048)}
	noAddress = []error{syscall.EADDRNOTAVAIL, syscall.Errno(10049), syscall.EAFNOSUPPORT,
		syscall.EPROTONOSUPPORT}
	refused = []error{syscall.ECONNREFUSED, syscall.Errno(10061)}
)

// ---- watching: HTTP

const (
	watchTime   = 2 * time.Second // for workLoop to answer askStats
	requestTime = 5 * time.Second // for an HTTP request to be read
	// for its response to be written; net/http/pprof adds the time of a profile
	answerTime  = 10 * time.Second
	profileTime = 60 * time.Second // of a profile or a trace, at most
)

// statsFor gets the rows of stats from workLoop for an HTTP request, once all earlier requests are
// durable. If the data is not open, or no answer comes in time, it answers w with an error, and
// returns nil.
func (s *keyValueServer) statsFor(w http.ResponseWriter, r *http.Request) []counter {
	// Until the data is open there is no workLoop to ask.
	why := s.stage()
	if why == "" && isClosed(s.serving) {
		if rows := s.askStats(r.Context()); rows != nil {
			return rows
		}
	}

	http.Error(w, cmp.Or(why, "the server does not answer"), http.StatusServiceUnavailable)
	return nil
}

// askStats asks workLoop for the rows of stats. It returns nil if there is no answer in time, if
// the store has failed, or if the server has ended.
func (s *keyValueServer) askStats(ctx context.Context) []counter {
	ctx, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()

	// The answer has a slot, so workLoop does not wait even if it comes too late.
	asker := make(chan []counter, 1)
	select {
	case s.queries <- &Query{queryType: countAll, special: &special{asker: asker}}:
	case <-s.ended:
	case <-ctx.Done():
	}

	select {
	case rows := <-asker:
		return rows
	case <-s.ended:
	case <-ctx.Done():
	}
	return nil
}

// stage says what the store is doing until it is open; "" once it is open.
func (s *keyValueServer) stage() string {
	if s.status == nil {
		return ""
	}
	return s.status.Stage()
}

// metrics answers /metrics: the rows of Stats, and further ones, in the text format of Prometheus.
func (s *keyValueServer) metrics(w http.ResponseWriter, r *http.Request) {
	// Until the data is open there are no rows of Stats.
	var rows []counter
	active := 0
	if s.stage() == "" {
		if rows = s.statsFor(w, r); rows == nil {
			return
		}
		active = 1
	}

	rows = append(rows, counter{"active",
		"1 if it serves; 0 while it opens its data, or stands by.", active})
	rows = append(rows, s.watched()...)

	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	for _, row := range rows {
		row.write(w)
	}

	// For a store in memory no Commit is measured.
	if s.status == nil {
		return
	}

	writeHistogram(w, "commit_seconds", "How long it took until what a batch did was durable.",
		&s.commits)
	writeHistogram(w, "batch_chains", "How many chains of requests were committed together.",
		&s.batches)
	writeHistogram(w, "fsync_seconds",
		"How long the disk, or etcd, took to confirm what was written.", &s.status.Fsyncs)
}

// watched returns the rows that only /metrics shows.
func (s *keyValueServer) watched() (rows []counter) {
	// A store in memory has no log that could be taken over or compacted.
	if s.status != nil {
		rows = append(rows,
			counter{"takeovers_total", "How often the data was taken over from a server that had died.",
				s.status.Takeovers.Load()},
			counter{"compactions_total", "How often the log was compacted, since the start.",
				s.status.Compactions.Load()})

		// Only a lock in etcd has to be confirmed again and again.
		if at := s.status.Confirmed(); !at.IsZero() {
			rows = append(rows, counter{"lock_age_seconds",
				"Since etcd last confirmed that the data is ours.", time.Since(at).Seconds()})
		}
	}

	// The server's log cannot say that it cannot be written.
	if s.logged != nil {
		rows = append(rows,
			counter{"log_lines_lost_total", "Lines of log that could not be written.",
				s.logged.lost.Load()},
			counter{"log_errors_total", "Errors in the log.", s.logged.errors.Load()},
			counter{"last_error_timestamp_seconds",
				"When the last error was logged, as a Unix time; 0: never.",
				s.logged.last.Load()})
	}

	// Go's runtime counts these.
	runtimes := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(runtimes)

	return append(rows,
		counter{"go_goroutines", "Goroutines now.", runtimes[0].Value.Uint64()},
		counter{"go_heap_bytes", "Objects in Go's heap.", runtimes[1].Value.Uint64()},
		counter{"go_memory_bytes", "What Go has mapped.", runtimes[2].Value.Uint64()},
		counter{"go_gc_cycles_total", "Collections of garbage.", runtimes[3].Value.Uint64()})
}

// writeHistogram writes h in the text format of Prometheus.
func writeHistogram(w io.Writer, name, help string, h *storage.Histogram) {
	fmt.Fprintf(w, "# HELP kvserver_%s %s\n# TYPE kvserver_%s histogram\n", name, help, name)

	atMost, all, sum := h.Read()
	for i, n := range atMost {
		fmt.Fprintf(w, "kvserver_%s_bucket{le=\"%g\"} %d\n", name, h.Bounds()[i], n)
	}
	fmt.Fprintf(w, "kvserver_%s_bucket{le=\"+Inf\"} %d\nkvserver_%s_sum %g\nkvserver_%s_count %d\n",
		name, all, name, sum, name, all)
}

// logCounts counts lines of log, for /metrics.
type logCounts struct {
	lost, errors atomic.Int64 // lines that could not be written; lines of errors
	last         atomic.Int64 // when the last error was logged, as a Unix time; 0: never
}

// note is called for each attribute of each line of log. If that is the level, and the level is
// Error, note counts the line. It is a slog.HandlerOptions.ReplaceAttr that changes nothing.
func (n *logCounts) note(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.LevelKey && a.Value.Any() == slog.LevelError {
		n.errors.Add(1)
		n.last.Store(time.Now().Unix())
	}
	return a
}

// watchAt serves -http at addr, which is no unix socket, until the Closer is closed.
func (s *keyValueServer) watchAt(addr string) (io.Closer, error) {
	listeners, err := listen(addr)
	if err != nil {
		return nil, err
	}

	// It asks for no password, so warn if other machines may reach it.
	at := listeners[0].Addr().(*net.TCPAddr)
	if !at.IP.IsLoopback() {
		s.log.Warn("anyone who can reach this address can watch the server", "addr", at.String())
	}
	s.log.Info("watching", "metrics", "http://"+at.String()+"/metrics")

	// Requests for another host name than this and localhost are refused (onlyFor).
	host, _, _ := net.SplitHostPort(addr)
	return s.watch(listeners, host), nil
}

// watch serves counters, health checks and profiles over HTTP, each listener on a goroutine.
func (s *keyValueServer) watch(listeners []net.Listener, host string) *http.Server {
	server := &http.Server{
		Handler:      s.watchHandler(host),
		ReadTimeout:  requestTime,
		WriteTimeout: answerTime,
		ErrorLog:     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}

	// An idle connection would take one of the maxWatchers places.
	server.SetKeepAlivesEnabled(false)
	for _, listener := range listeners {
		go server.Serve(&fewConns{Listener: listener, most: maxWatchers / len(listeners)})
	}
	return server
}

// watchHandler returns the handler of watch. Requests must be for host, localhost or an address.
func (s *keyValueServer) watchHandler(host string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.metrics)

	// It goes through workLoop and the disk, so it fails when one of them hangs.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if s.statsFor(w, r) != nil {
			io.WriteString(w, "ok\n")
		}
	})

	// A server that loads its data, or stands by, is alive, and must not be restarted.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "alive\n")
	})

	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "/metrics\n/healthz\n/livez\n/debug/pprof/\n")
	})

	// They share one handler, because only one of them may run at a time.
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("GET /debug/pprof/", oneAtATime(profiles))

	return onlyFor(host, mux)
}

// onlyFor passes on to next only requests whose Host is an address, localhost or host. Otherwise
// somebody could let the name of a web site lead to our address, and a browser would let the site's
// page read what the server answers (DNS rebinding).
func onlyFor(host string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The port may be missing, and an IPv6 address is in brackets.
		name, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			name = r.Host
		}
		name = strings.Trim(name, "[]")

		// Such a page comes with its own name, never with an address or localhost.
		if name != "" && net.ParseIP(name) == nil && !strings.EqualFold(name, "localhost") &&
			!strings.EqualFold(name, host) {
			http.Error(w,
				fmt.Sprintf("this is not %.100q: ask for an address or localhost, or give the "+
					"name in -http", name), http.StatusForbidden)
			return
		}

		next.ServeHTTP(w, r)
	})
}

// oneAtATime refuses a request while another one is under way, and a request for more than
// profileTime. After each request it rests as long as that took, but at most a second, because some
// profiles stop the whole process.
func oneAtATime(next http.Handler) http.Handler {
	free := make(chan struct{}, 1)
	free <- struct{}{}

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// With a body, FormValue would read a form of up to 32 MiB, and put more into files.
		r.Body = http.NoBody
		seconds, _ := strconv.ParseFloat(r.FormValue("seconds"), 64)
		if seconds > profileTime.Seconds() {
			http.Error(w, fmt.Sprintf("seconds=%v is too long: at most %v", seconds,
				profileTime.Seconds()), http.StatusBadRequest)
			return
		}

		// A request that waited here would keep a place (maxWatchers) from others.
		select {
		case <-free:
		default:
			http.Error(w, "another profile is being taken: try again when it is done",
				http.StatusServiceUnavailable)
			return
		}

		// The pause gives clients back the time that the profile took from them.
		began := time.Now()
		defer func() {
			time.AfterFunc(min(time.Since(began), time.Second), func() { free <- struct{}{} })
		}()
		next.ServeHTTP(w, r)
	})
}
