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
	// Chains that workLoop runs before it commits and hands them back: enough
	// to share one fsync, few enough that the first does not wait long.
	maxBatch = 64

	// How often workLoop, with its queue empty, lets the readers that can run
	// send what they have, before it commits. Batches grow, and nobody waits
	// for a second turn: a quarter off the slowest percent's time in memory,
	// a tenth more writes a second on disk.
	maxYields = 4

	// A Commit that takes less is over before its clients could come back: a batch need not
	// wait for them. After waits in vain up to maxVain batches do not wait.
	slowCommit = time.Millisecond
	maxVain    = 63

	// How long workLoop works before it commits and answers: maxHeavyTurn for a client whose
	// requests take long, such as Updates of huge lists. A chain with more to do goes on later.
	maxTurn      = 5 * time.Millisecond
	maxHeavyTurn = time.Millisecond / 2

	// Requests of a client between two looks at the clock: one at first, then twice as many after
	// each look, up to maxStride; one again when two looks lay longTime apart. An Update, a Swap or
	// a Remove, which may have a long list to search, counts as several.
	maxStride  = 64
	searchCost = 8
	longTime   = maxHeavyTurn / 2

	// How often workLoop looks for keys that go, beside a look at each turn, while there are any;
	// and how many it deletes between two looks at the clock.
	expireTime   = 50 * time.Millisecond
	expireStride = 64

	// How far beyond the floor a client's time may be before its next chain waits for a turn. Up to
	// there chains run in the order in which they come, which costs nothing.
	maxLead = 64 * time.Microsecond

	fileCheckTime = time.Second // between two checks of the store's files while nobody asks

	defaultMaxLine = 1 << 20 // bytes of a line without its end, unless set

	defaultMaxClients   = 10_000 // with 17 KB for each that is quiet, 170 MB
	defaultWriteTimeout = 5 * time.Minute
	defaultMaxQueues    = 1 << 30 // bytes
	// open files, of those that the process may have, for all but clients: the log, a compaction
	spareFiles    = 32
	maxRejecting  = 8    // of these, connections over maxClients that get time to hear so
	maxHandshakes = 1000 // TLS handshakes under way; fewer where files are few
	maxSnapshots  = 4    // snapshots at a time, for Keys and Dump
	maxWatchers   = 16   // HTTP connections, at all addresses; one more takes the place of one

	// between two lines of log about what may happen a thousand times a second
	seldomTime = time.Minute

	memoryPerClient = 17 << 10 // bytes that a quiet client takes
	memoryOfTLS     = 28 << 10 // more, if it speaks TLS
	// bytes that a write takes in the store beside its key and value, at most
	memoryPerPair = 64

	collectTime = time.Second // between two collections because writes are refused

	// Bytes by which the data and the clients must have shrunk until the process gives back
	// memory at once, where that is a quarter of it.
	giveBackMin = 16 << 20

	closeTime = time.Second // for a client to take its last replies once Close was called

	// How long acceptClient waits after Accept failed: doubled each time.
	minAcceptWait = 5 * time.Millisecond
	maxAcceptWait = time.Second
)

// What Start returns after Close, when the server was started before, and without a store.
var (
	errClosed  = errors.New("the server is closed")
	errStarted = errors.New("the server was started before")
	errNoStore = errors.New("the server has no store: New was given nil")
)

// errReplaced ends a handshake in whose place another one is.
var errReplaced = errors.New("others came, and there is no room")

// keyValueServer serves a store over TCP and unix sockets. Make one with New.
//
// Every acceptClient and shakeHands feeds connections. Every client's readFromClient feeds queries,
// as do writeToClient when it ends, a handshake that fails, and the calls from outside. workLoop
// receives from both, and it alone changes the store and the list of clients.
type keyValueServer struct {
	// Read-only once started.
	listener     net.Listener   // the first of listeners
	listeners    []net.Listener // each has an acceptClient
	maxLine      int            // bytes of a request line, its end not counted
	maxClients   int
	maxMessage   int           // bytes in a message: the constant, but for tests
	partKeys     int           // that are walked at a time: the constant, but for tests
	writeTimeout time.Duration // for a client to accept a byte of what is written; 0: for ever
	tls          *tls.Config   // nil: none; unix sockets never have it
	handshakes   int           // under way at a time, but at least one a listener
	version      string
	now          clock // the wall clock, by which keys go: time.Now, but for tests
	// what opening the store, its lock, fsyncs and compactions report; nil: it is in memory
	status  *storage.Status
	log     *slog.Logger
	started time.Time

	// Readers, departing goroutines, failed handshakes, API calls and /metrics to workLoop; never
	// closed. Room for some, so that a sender seldom waits for workLoop to be scheduled.
	queries chan *Query

	// Each acceptClient and shakeHands to workLoop. endAccepting closes it when all of these
	// have ended.
	connections chan net.Conn
	accepting   sync.WaitGroup // of them

	// workLoop to CountActive and CountDropped. oneCall lets one asker in, so its one
	// slot is free and workLoop never waits.
	countActive chan int

	// Closed by Close: acceptClient and workLoop end, and readFromClient waits no longer for a
	// Take, for memory or for a snapshot. isClosing is asked while one reads, lists and writes.
	closeSignal chan struct{}
	serving     chan struct{} // closed by serve: workLoop runs
	timeIsUp    chan struct{} // closed by workLoop, closeTime after Close: no more replies are written
	ended       chan struct{} // closed by workLoop, last: nobody accepts, and no client is left
	failed      chan error    // workLoop to whoever asks Failed; one slot for the one failure
	oneCall     chan struct{} // holds one token; the API call that took it owns what is below

	// Owned by the API call that has the token of oneCall.
	closed bool // Close was called

	commits storage.Histogram // how long each took, where that is of interest; for any goroutine
	batches storage.Histogram // how many chains were in each of these
	logged  *logCounts        // nil: nobody counts

	budget      budget       // -max-memory and -max-queues
	cores       semaphore    // for what takes long: one slot less than cores, but at least one
	snapshots   semaphore    // for Keys and Dumps: each keeps in memory what is changed meanwhile
	lostReplies atomic.Int64 // by slow readers

	// Owned by workLoop.
	clients       []*Client
	db            kvstore.Store
	touched       []string      // a chain's keys, while the store is told them
	batch         []*Query      // chains that have run and wait for Commit
	gathering     gathering     // for whom it waits before its Commit
	turns         turnQueue     // who waits for one
	floor         time.Duration // the highest spent of a client that left turns for its turn
	takes         takeQueues    // Takes that wait for a value
	turn          turn
	rejecting     int              // connections that are being rejected
	full          seldom           // turning clients away
	badHandshakes seldom           // handshakes that failed
	noRoom        seldom           // writes refused because the disk is full, or its files are spoiled
	noMemory      seldom           // and because the memory is
	overdue       overdue          // whether there are keys whose time is over
	expired       int              // keys that went because their time was over
	commitFailed  bool             // nothing runs any more
	closing       bool             // stopReading was called
	closeTick     <-chan time.Time // for hurry; nil: not set
	closeTicks    int              // since Close
	welcomed      int              // clients so far
	departed      int              // of these, gone
	largest       int64            // bytes of the store and the clients, since memory was last given back
	collectedAt   time.Time        // when a refused write last made the collector run
	requests      [queryTypes]int
}

// seldom is something that may happen a thousand times a second, and is worth a
// line of log a minute.
type seldom struct {
	said  time.Time
	n     int // times since then
	total int
}

// happened counts one time more. It returns how many there were when it is
// time to say that, and 0 otherwise.
func (s *seldom) happened() (n int) {
	s.n++
	s.total++

	// Until it is time for a line again the times add up, and that line says all of them.
	now := time.Now()
	if now.Sub(s.said) < seldomTime {
		return 0
	}

	n, s.said, s.n = s.n, now, 0
	return n
}

// turn is the time for which workLoop works before it commits and answers.
type turn struct {
	epoch         time.Time     // since which the clock runs: cheaper than to ask for the time
	began, looked time.Duration // since epoch
	over          bool
}

// begin begins a turn.
func (t *turn) begin() {
	t.began = time.Since(t.epoch)
	t.looked, t.over = t.began, false
}

// charge adds the time since the last look at the clock to what the client of sh has spent. Without
// a search of a list a time that is far longer than usual is a stall of the system, not the client's
// fault: it counts little.
func (t *turn) charge(sh *share, floor time.Duration, searched bool) {
	now := time.Since(t.epoch)
	took := now - t.looked
	counted := took
	if !searched {
		counted = min(took, 2*sh.cost+maxLead)
	}

	// No more than a turn counts, for by then the client has waited for all others.
	sh.spent = min(sh.spent+counted, floor+maxTurn)
	sh.cost = (sh.cost + counted) / 2

	// A look at the clock costs time, too, so there are fewer while requests are short.
	sh.stride = min(2*max(sh.stride, 1), maxStride)
	if took >= longTime {
		sh.stride = 1
	}

	// Others wait until the turn is over, so a heavy client gets a shorter one.
	limit := maxTurn
	if sh.isHeavy() {
		limit = maxHeavyTurn
	}
	t.looked, t.over = now, now-t.began > limit
}

// share is what a client has had of workLoop's time. Clients are served as in start-time fair
// queueing (Goyal, Vin and Cheng, 1996): first is the one that will have had least when its turn
// ends. spent is kept within maxTurn of floor, which rises with the turns that are given: so a
// client that was quiet goes before one that has spent much, and nobody waits for ever.
type share struct {
	spent  time.Duration // 0: the client is new
	cost   time.Duration // between two looks at the clock, as of late
	stride int           // requests between these

	chain, next *Query // that waits for its turn, and its first request that has not run

	wroteIn  int  // the number of the last batch in which the client wrote (gathering)
	isSteady bool // it has written in one of the two before that, too
}

// finish is how much the client will have spent if the next turn costs as much as the last.
func (s *share) finish() time.Duration { return s.spent + s.cost }

// isHeavy tells whether the client's requests take long, as of late.
func (s *share) isHeavy() bool { return s.cost >= longTime }

// turnQueue are the clients whose chains wait, as a heap (container/heap) by finish.
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

// gathering has a batch of writes wait, before a slow Commit, for the clients that wrote in the last
// batch and come each time. Otherwise one half of the clients would send while the other half waits
// for the disk, and each half would pay for Commits of its own. (A timer for group commit: Helland
// and others, Tandem Technical Report 88.1, 1988. Ours stops early, when those have come.)
type gathering struct {
	number  int              // of the batch, among those that write
	writes  bool             // it does
	steady  int              // clients that have written in it, and in one of the two before
	missing int              // steady clients of the last one that have not come back
	took    time.Duration    // the last one's Commit
	over    <-chan time.Time // when it has waited long enough; nil: it does not wait
	isOver  bool             // it has
	skip    int              // how many batches do not wait, for others have waited in vain
	vain    int              // skip, as it was after the last of these
}

// came notes that the client of sh has written in the batch.
func (g *gathering) came(sh *share) {
	g.left(sh)
	g.writes = true
	sh.isSteady, sh.wroteIn = g.number-sh.wroteIn <= 2, g.number
	if sh.isSteady {
		g.steady++
	}
}

// left notes that there is no need to wait for the client of sh.
func (g *gathering) left(sh *share) {
	if sh.isSteady && sh.wroteIn == g.number-1 {
		g.missing--
	}
	sh.isSteady = false
}

// begin tells whether the batch waits, and sees to it that it does not wait too long.
func (g *gathering) begin() bool {
	switch {
	case g.took < slowCommit || !g.writes || g.missing <= 0 || g.isOver:
		return false
	case g.over != nil:
		return true
	case g.skip > 0:
		g.skip--
		return false
	}
	g.over = time.After(min(g.took/2, maxTurn))
	return true
}

// next notes how long the batch's Commit took. Another batch begins.
func (g *gathering) next(took time.Duration) {
	if !g.writes {
		return
	}

	// Clients that come later each time are not worth a wait: try it less and less often.
	switch {
	case g.isOver:
		g.vain = min(2*g.vain+1, maxVain)
		g.skip = g.vain
	case g.over != nil:
		g.vain = 0
	}
	*g = gathering{number: g.number + 1, missing: g.steady, took: took, skip: g.skip, vain: g.vain}
}

// New returns a server of db, without which it does not start. The server owns it from Start to
// Close. It logs nothing unless it is given a logger.
func New(db kvstore.KVStore) *keyValueServer {
	s := &keyValueServer{
		db:        kvstore.StoreOf(db),
		floor:     2 * maxTurn,          // so a client that has spent 0 is new
		gathering: gathering{number: 3}, // so one that has never written is not steady
		takes:     takeQueues{of: map[string]*list.List{}},
		batches:   storage.Histogram{Counts: true},

		// What the caller may change before Start.
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

		// One slot each, so that workLoop never waits for the goroutine that receives.
		countActive: make(chan int, 1),
		failed:      make(chan error, 1),

		budget: budget{maxQueues: defaultMaxQueues, fewKeys: fewKeys,
			anyLine: semaphore{slots: make(chan struct{}, 1)},
			freeing: semaphore{slots: make(chan struct{}, 1)}},
		snapshots: semaphore{slots: make(chan struct{}, maxSnapshots)},

		// One core is left for workLoop, where there are several.
		cores: semaphore{slots: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))},
	}

	// The token: no call is under way.
	s.oneCall <- struct{}{}
	return s
}

// Start listens on port of localhost and serves until Close. It does not block.
// It returns an error when it cannot listen, the second time, after Close, and without a
// store.
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

// serve is Start with listeners, at least one, which become the server's.
func (s *keyValueServer) serve(listeners ...net.Listener) error {
	<-s.oneCall
	defer func() { s.oneCall <- struct{}{} }()

	switch {
	case s.closed:
		return errClosed
	case isClosed(s.serving):
		return errStarted
	case s.db == nil:
		return errNoStore
	}

	// All that the goroutines read is set before they start, so it needs no lock.
	s.started = time.Now()
	s.turn.epoch = s.started
	s.listener, s.listeners = listeners[0], listeners
	s.noteMemory()

	// A TLS connection is a guest of fewConns until its handshake has ended; a unix socket has no
	// TLS.
	for _, listener := range listeners {
		if s.tls != nil && listener.Addr().Network() != "unix" {
			listener = &fewConns{Listener: listener, most: max(1, s.handshakes/len(listeners))}
		}
		s.accepting.Go(func() { s.acceptClient(listener) })
	}

	go s.endAccepting()
	go s.workLoop()
	close(s.serving)
	return nil
}

// CountActive returns how many clients are connected: 0 before Start and once
// Close has returned.
func (s *keyValueServer) CountActive() int { return s.ask(countActive) }

// CountDropped returns how many clients have left: 0 before Start and once
// Close has returned.
func (s *keyValueServer) CountDropped() int { return s.ask(countDropped) }

// ask has workLoop answer a count.
func (s *keyValueServer) ask(what queryType) int {
	// There is one asker at a time, for the answer has one slot.
	<-s.oneCall
	defer func() { s.oneCall <- struct{}{} }()
	if !isClosed(s.serving) {
		return 0
	}

	// workLoop may end at any time, and then nobody receives or answers.
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

	// The query came too late, or the answer just in time.
	select {
	case n := <-s.countActive:
		return n
	default:
		return 0
	}
}

// Failed returns a channel that receives the error of the store's Commit, if
// one fails. From then on the server answers nothing; Close it.
func (s *keyValueServer) Failed() <-chan error { return s.failed }

// Close ends the server: requests that were read are run, but for those behind a Keys or Dump that
// is broken off, and their replies are flushed to clients that take them within closeTime. It
// returns when no goroutine uses a client or the store any more: the store is the caller's again.
func (s *keyValueServer) Close() {
	<-s.oneCall
	if !s.closed {
		s.closed = true
		close(s.closeSignal)
		closeAll(s.listeners)
	}
	s.oneCall <- struct{}{}

	// The last replies take a while, and meanwhile others may ask for the counts.
	if isClosed(s.serving) {
		<-s.ended
	}
}

func (s *keyValueServer) isClosing() bool { return isClosed(s.closeSignal) }

// isClosed tells whether signal, on which nothing is sent, is closed.
func isClosed(signal <-chan struct{}) bool {
	select {
	case <-signal:
		return true
	default:
		return false
	}
}

// acceptClient hands every connection of listener over to workLoop: under TLS, shakeHands
// does so once the handshake has ended. One goroutine a listener, until Close closes that.
// Any other error, such as running out of file descriptors, may pass: it waits a little
// longer each time and tries again.
func (s *keyValueServer) acceptClient(listener net.Listener) {
	// The handshakes of its connections end when it does.
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

		// Log it once, but try again and again.
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

	// The connection of a test has no such buffer.
	if socket, ok := conn.(interface{ SetWriteBuffer(bytes int) error }); ok {
		socket.SetWriteBuffer(sendBuffer)
	}

	// The other side may take its time for a handshake, and others want to connect meanwhile.
	if mustShake {
		s.accepting.Go(func() { s.shakeHands(ctx, guest) })
		return
	}
	s.connections <- &pacedConn{Conn: conn, server: s}
}

// shakeHands begins TLS with guest and hands it over to workLoop. One goroutine for each new
// connection, for at most handshakeTime, so that a connection that does not go on delays nobody. It
// is not counted as a client yet.
func (s *keyValueServer) shakeHands(ctx context.Context, guest *guest) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()

	// Until the handshake ends all goes through the guest, which notes whether a byte has come.
	paced := &pacedConn{Conn: guest, server: s}
	outer := tls.Server(paced, s.tls)
	err := outer.HandshakeContext(ctx)

	// Its place may have gone to another connection, even while the last bytes came.
	if err == nil && !guest.leave() || errors.Is(err, net.ErrClosed) {
		err = errReplaced
	}
	if err != nil {
		guest.Close()
		s.queries <- &Query{queryType: handshakeFailed, key: fmt.Sprint(guest.RemoteAddr()),
			value: err.Error()}
		return
	}

	// It has given up its place, so nobody asks any more whether a byte has come.
	paced.Conn = guest.Conn
	s.connections <- outer
}

// endAccepting tells workLoop that nobody comes any more. One goroutine, until the last
// acceptClient and the last shakeHands have ended.
func (s *keyValueServer) endAccepting() {
	s.accepting.Wait()
	close(s.connections)
}

// workLoop owns the store and the clients: whatever is done to them is done
// here, in the one order that everybody sees. It never waits for a client: its
// sends all have a free slot. It runs until Close, then until the last client
// has left.
func (s *keyValueServer) workLoop() {
	defer close(s.ended)

	// The loop sets each to nil when its case is over: select never chooses a nil channel.
	connections, closeSignal := s.connections, s.closeSignal

	always := make(chan struct{}) // always ready
	close(always)
	var alarm <-chan time.Time // nil: not set

	// Somebody may change the store's files while nobody asks for anything.
	var fileCheck <-chan time.Time // nil: the store is in memory
	if s.status != nil {
		ticker := time.NewTicker(fileCheckTime)
		defer ticker.Stop()
		fileCheck = ticker.C
	}

	// Until nobody comes any more and the last has gone.
	for connections != nil || len(s.clients) > 0 || s.rejecting > 0 {
		var more chan struct{} // nil: no chain waits for its turn, and no key to be deleted
		if len(s.turns) > 0 || s.overdue == someOverdue {
			more = always
		}
		if alarm == nil && s.db.Expiring() > 0 {
			alarm = time.After(expireTime)
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
		case <-s.gathering.over:
			s.gathering.isOver = true
			s.runBatch(s.nextQuery())

		case <-alarm:
			alarm = nil
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

// checkFiles has the store check its files. Where a batch waits its Commit does that soon.
func (s *keyValueServer) checkFiles() {
	if len(s.batch) == 0 {
		s.commitStore()
	}
}

// welcome makes a client of conn.
func (s *keyValueServer) welcome(conn net.Conn) {
	if s.closing || s.commitFailed {
		conn.Close()
		return
	}
	if len(s.clients) >= s.maxClients {
		s.reject(conn)
		return
	}

	// A client knows its place in the list, so that nobody searches for it when it leaves.
	s.welcomed++
	c := newClient(s.welcomed, conn, s)
	c.index = len(s.clients)
	s.clients = append(s.clients, c)

	s.log.Debug("client came", "client", c.id, "addr", c.addr())
	go c.readFromClient()
}

// reject tells conn that there are enough clients. writeToClient does that,
// alone: such a client is in nobody's list. When many come at once some are
// closed without the time to take the message in.
func (s *keyValueServer) reject(conn net.Conn) {
	if n := s.full.happened(); n > 0 {
		s.log.Warn("turning clients away", "limit", s.maxClients, "since_last_line", n)
	}

	// The other side reads an error like any other.
	why := Query{queryType: malformed, value: fmt.Sprintf("server is full (%d clients)",
		s.maxClients)}
	full := why.appendEnd(nil, false, 0)

	// No more than some at a time cost a goroutine.
	c := newClient(0, conn, s)
	if s.rejecting == maxRejecting {
		c.connection.Write(full) // into an empty send buffer, so without waiting
		c.paced.Close()
		return
	}

	// To close at once could reset the connection, and then the message is lost.
	s.rejecting++
	c.paced.limit = time.Now().Add(closeTime) // it ends even where nothing is taken
	c.buffer = make(chan []byte, 1)
	c.outbox.queue(full)
	close(c.buffer)
	go c.writeToClient()
}

// runBatch takes q, if there is one, and all that is in the queue, runs chains for a turn,
// commits it all at once, then answers. A batch that gathers is left open: the next call goes on
// with it.
func (s *keyValueServer) runBatch(q *Query) {
	// A turn is for requests: expire has a time limit of its own.
	s.expire()
	s.turn.begin()

	for yields := 0; ; q = s.nextQuery() {
		switch {
		case q != nil:
			s.dispatch(q)

		// Nothing more comes: of those that wait, the one that will have had least is next.
		case len(s.turns) > 0 && s.mayRun(&s.turns[0].share):
			sh := &heap.Pop(&s.turns).(*Client).share
			s.floor = max(s.floor, sh.spent)
			chain, next := sh.chain, sh.next
			sh.chain, sh.next = nil, nil // or they would stay in memory until its next turn
			s.runChain(chain, next)

		// The batch may grow.
		case yields < maxYields && s.mayGrow() && s.gathering.over == nil:
			yields++
			runtime.Gosched()
			if len(s.queries) > 0 {
				s.turn.begin() // that was others' time
			}

		case s.mayGrow() && s.gathering.begin():
			return

		default:
			s.commit()
			if len(s.turns) > 0 {
				runtime.Gosched() // for the readers that have something new, and the writers
			}
			return
		}
	}
}

// mayGrow tells whether there is a batch that may take in what comes next.
func (s *keyValueServer) mayGrow() bool {
	return len(s.batch) > 0 && len(s.turns) == 0 && !s.isTurnOver()
}

// isTurnOver tells whether it is time to commit.
func (s *keyValueServer) isTurnOver() bool { return s.turn.over || len(s.batch) >= maxBatch }

// mayRun tells whether the chain of sh may run before the Commit. A heavy client's may not run
// behind others that have run, for they would wait for it.
func (s *keyValueServer) mayRun(sh *share) bool {
	return !s.isTurnOver() && (len(s.batch) == 0 || !sh.isHeavy())
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

// dispatch does what q asks for, if that is for workLoop itself, or takes the chain that it heads.
func (s *keyValueServer) dispatch(q *Query) {
	switch q.queryType {
	case countActive:
		s.countActive <- len(s.clients)
	case countDropped:
		s.countActive <- s.departed

	// Whether the server is well is asked with it: while the disk hangs there must be no answer.
	case countAll:
		s.batch = append(s.batch, q)

	case depart:
		s.leave(q.client)
	case stopTake, dropTake:
		s.endTake(q)

	// Anybody can make handshakes fail, as often as he likes: a line a minute says so.
	case handshakeFailed:
		if n := s.badHandshakes.happened(); n > 0 {
			s.log.Info("TLS handshakes failed", "since_last_line", n, "addr", q.key,
				"reason", q.value)
		}

	default:
		s.schedule(q)
	}
}

// schedule runs chain, or has it wait for its turn: where its client has had more of
// workLoop's time than others.
func (s *keyValueServer) schedule(chain *Query) {
	sh := &chain.client.share
	isNew := sh.spent == 0

	// A quiet client may catch up on at most maxTurn of the time that it did not use.
	sh.spent = max(sh.spent, s.floor-maxTurn)

	// Where nobody else wants a turn there is nobody to go behind.
	if len(s.turns) == 0 && len(s.batch) == 0 && len(s.queries) == 0 {
		s.runChain(chain, chain)
		return
	}

	// A new client waits for its first turn, for its requests may take long.
	if isNew {
		sh.spent, sh.cost = s.floor+maxLead, maxLead
	}

	// While clients have had about as much, to run chains as they come costs least.
	isFirst := len(s.turns) == 0 || sh.finish() < s.turns[0].share.finish()
	if isFirst && sh.finish() < s.floor+maxLead && s.mayRun(sh) {
		s.runChain(chain, chain)
	} else {
		s.lineUp(chain, chain)
	}
}

// lineUp has chain, of which next is the first request that has not run, wait for its turn.
func (s *keyValueServer) lineUp(chain, next *Query) {
	c := chain.client
	c.share.chain, c.share.next = chain, next
	heap.Push(&s.turns, c)
}

// touchLeast is how many requests with keys a chain has for which it pays to tell the store the
// keys.
const touchLeast = 8

// touch tells the store which keys chain will need, if it wants to know.
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

	// Otherwise the keys would keep the lines that they are parts of.
	clear(s.touched)
}

// runChain runs chain from q on, until its end or that of the turn. A chain that has
// run waits in batch for its Commit.
func (s *keyValueServer) runChain(chain, q *Query) {
	c := chain.client

	// A chain that goes on has begun in another turn.
	if q == chain {
		s.begin(chain)
	}

	left, searched := c.share.stride, false // until the next look at the clock, and since the last
	wrote := false
	for ; q != nil && !s.commitFailed; q = q.next {
		wrote = s.run(q) || wrote

		// Look at the clock now and then, and at the end, for what comes then is another's.
		if left--; q.row().searches {
			left -= searchCost - 1
			searched = true
		}
		if left <= 0 || q.next == nil {
			s.turn.charge(&c.share, s.floor, searched)
			left, searched = c.share.stride, false
		}
		if s.turn.over && q.next != nil {
			s.lineUp(chain, q.next)
			return
		}
	}

	// A Take that found nothing is not done. Whoever has not written does not come again before the
	// Commit.
	if isParked := chain.mayWait() && chain.n == 0; isParked {
		s.takes.add(chain)
		wrote = false
	} else {
		s.batch = append(s.batch, chain)
	}
	if wrote {
		s.gathering.came(&c.share)
	} else {
		s.gathering.left(&c.share)
	}
}

// run runs q, unless it is refused. It tells whether q is one that writes.
func (s *keyValueServer) run(q *Query) (writes bool) {
	// It finds no key whose time is over, and adds nothing to what is full.
	if s.overdue != noneOverdue {
		s.expireKey(q)
	}
	writes = q.writes()
	if writes {
		s.admit(q)
	}
	s.requests[q.queryType]++

	// The store knows nothing of the server's counters.
	if q.queryType == stats {
		for _, row := range s.stats() {
			q.values = append(q.values, row.line())
		}
		q.answer(q.values)
		return false
	}

	// What it brings may be what others wait for.
	q.run(s.db, s.now)
	if s.takes.n > 0 {
		s.serveTakes(q)
	}
	return writes
}

// takeQueues are the Takes that wait for a value, for each key in the order in which they came.
// They are workLoop's. Each is a chain of its own, under way, with memory of its own.
type takeQueues struct {
	of map[string]*list.List // of *Query, none is empty
	n  int                   // Takes in all of them
}

// add has chain wait behind the others.
func (t *takeQueues) add(chain *Query) {
	queue := t.of[chain.key]
	if queue == nil {
		queue = list.New()
		t.of[chain.key] = queue
	}
	chain.client.parked = queue.PushBack(chain)
	t.n++
}

// remove returns c's Take, which waits no longer.
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

// serveTakes gives the value that q has brought to the Take that has waited longest for it.
func (s *keyValueServer) serveTakes(q *Query) {
	if effect := q.row().effect; effect != adds && effect != replaces {
		return
	}

	// A Take waited, so the key had no value before q. If admit refuses a Take, the value is still
	// there, and the next Take is tried.
	for queue := s.takes.of[q.key]; queue != nil && queue.Len() > 0 && s.db.Count(q.key) > 0; {
		chain := s.takes.remove(queue.Front().Value.(*Query).client)
		s.admit(chain)
		chain.run(s.db, s.now)
		s.batch = append(s.batch, chain)
	}
}

// endTake ends a client's Take. One that waits for a value is answered without one. One that still
// waits for its turn may look once (stopTake), or is answered without a value (dropTake).
func (s *keyValueServer) endTake(q *Query) {
	c := q.client

	// It has had its turn, and waits for a value.
	if c.parked != nil {
		s.batch = append(s.batch, s.takes.remove(c))
		return
	}

	// Else it waits for its turn, or its answer and q have crossed.
	switch place := slices.Index(s.turns, c); {
	case place < 0: // it has been answered
	case q.queryType == dropTake:
		heap.Remove(&s.turns, place)
		s.batch = append(s.batch, c.share.chain)
		c.share.chain, c.share.next = nil, nil
	default:
		c.share.chain.seconds = 0
	}
}

// begin starts the client's writeToClient, at its first chain, and tells the store the keys.
func (s *keyValueServer) begin(chain *Query) {
	c := chain.client
	if c.buffer == nil {
		c.buffer = make(chan []byte, maxBufferSize)
		c.alive++
		go c.writeToClient()
	}
	s.touch(chain)
}

// admit refuses a write for which there is no room.
func (s *keyValueServer) admit(q *Query) {
	// The memory always lets in what frees, or it would stay full.
	if !q.frees() && s.isFull(q) {
		q.refuse(fmt.Sprintf("the server's memory is full (%d bytes): Delete something first",
			s.budget.limit))
		s.budget.refused.Store(time.Now().Unix())
		s.collect()
		if n := s.noMemory.happened(); n > 0 {
			s.log.Error("writes are refused: the memory is full; Delete something, or raise "+
				"-max-memory", "limit", s.budget.limit, "since_last_line", n)
		}
		return
	}

	// A Lease has its key in the log twice.
	bytes := int64(2*len(q.key) + len(q.value) + len(q.newValue))
	if err := s.db.Room(bytes, q.frees()); err != nil {
		why, todo := "the disk is full", "; make room"
		if !storage.IsFull(err) {
			why, todo = "the data cannot be saved", ""
		}
		q.refuse(fmt.Sprintf("%s, nothing was changed: %v", why, err))
		if n := s.noRoom.happened(); n > 0 {
			s.log.Error("writes are refused: "+why+todo, "since_last_line", n, "error", err)
		}
	}
}

// overdue says whether there are keys whose time is over.
type overdue uint8

const (
	noneOverdue  overdue = iota
	someOverdue          // they are deleted in turn with the clients' requests
	stuckOverdue         // the disk has no room for that; perhaps it has a little later
)

// expire deletes keys whose time is over, for about maxHeavyTurn; expireKey hides the others. The
// next Commit makes these Deletes durable; after a crash before it they are done again.
func (s *keyValueServer) expire() {
	// The disk may have room by now, so what was stuck is tried again.
	s.overdue = noneOverdue
	if s.commitFailed || s.db.Expiring() <= 0 {
		return
	}

	// Many may go at one time: clients wait no longer for them than for a heavy client.
	now, began := s.now().UnixMilli(), time.Now()
	for n := 1; s.overdue == noneOverdue; n++ {
		key, isDue := s.db.NextDue(now)
		switch {
		case !isDue:
			return
		case s.deleteExpired(key) != nil:
			s.overdue = stuckOverdue
		case n%expireStride == 0 && time.Since(began) >= maxHeavyTurn:
			s.overdue = someOverdue
		}
	}
}

// expireKey deletes the key that q is about, if its time is over.
func (s *keyValueServer) expireKey(q *Query) {
	if q.row().effect == noKey {
		return
	}

	if at, goes := s.db.Deadline(q.key); goes && at <= s.now().UnixMilli() {
		if err := s.deleteExpired(q.key); err != nil {
			q.refuse(fmt.Sprintf("the key's time is over, but the disk is full: %v", err))
		}
	}
}

// deleteExpired deletes a key whose time is over, if the disk has room for that.
func (s *keyValueServer) deleteExpired(key string) error {
	if err := s.db.Room(int64(len(key)), true); err != nil {
		return err
	}

	s.db.Delete(key)
	s.expired++
	return nil
}

// isFull tells whether there is no memory for q. One that leaves the store no larger may use half
// of the reserve, for beside a snapshot even that takes memory.
func (s *keyValueServer) isFull(q *Query) bool {
	if s.budget.limit == 0 {
		return false
	}

	s.noteMemory()
	if s.budget.fits(q.memory(), 0) {
		return false
	}

	// What was freed in the middle of slabs can be used again, and a write that leaves the store no
	// larger may use half of the reserve.
	return !s.budget.fits(q.memory()-s.db.Reclaim(), 0) &&
		!(s.budget.fits(0, s.budget.reserve/2) && q.makesLess(s.db))
}

// collect has the collector find out what is alive, at most once in collectTime: until then what
// somebody has let go of, such as the values of a reply, counts as data.
func (s *keyValueServer) collect() {
	if now := time.Now(); now.Sub(s.collectedAt) >= collectTime {
		s.collectedAt = now
		go runtime.GC()
	}
}

// noteMemory tells the budget what the store and the clients take.
func (s *keyValueServer) noteMemory() {
	perClient := memoryPerClient
	if s.tls != nil {
		perClient += memoryOfTLS
	}
	s.budget.store.Store(s.db.Footprint() + int64(len(s.clients)*perClient))
}

// freeMemory gives memory back to the system when the data and the clients have shrunk by a quarter:
// the collector alone, with nothing new to be kept, would wait for minutes.
func (s *keyValueServer) freeMemory() {
	now := s.budget.store.Load()
	if s.largest = max(s.largest, now); now < s.largest/4*3 && s.largest-now > giveBackMin {
		s.largest = now
		go debug.FreeOSMemory()
	}
}

// ---- budget: -max-memory and -max-queues

// budget is how much memory there is for the data, and for what clients make the server hold.
// Clients work on many goroutines, and the collector's pacer on another, so what they count
// together is atomic.
//
// Of -max-memory a reserve is not shared out. Of the rest three quarters are for data, an eighth
// for queues and an eighth for lines: a client that does not read, or does not end its line, takes
// little from the data. What a client can make the server hold:
//
//	what             one client, at most           all clients              at it
//	values           -                             data                     a write is refused, but
//	                                                                        none that frees
//	a begun line     freeLine; beyond that twice   lines, and two lines     each time that it grows
//	                 its buffer, up to -max-line   (anyLine, freeing)       it waits up to lineTime,
//	                                                                        then is skipped
//	its bursts       two of burstSize, maxChain    what came in the last    it counts as data
//	                 queries                       second or two
//	a chain that     the same, and lines of up to  what comes with lines    over queues, with all
//	waits            -max-line                     of over burstSize,       replies, a client that
//	                                               after Ack, or in a Keys  takes nothing is cut; any
//	                                               or Dump                  other waits
//	replies          maxBufferSize of maxMessage,  queues, a quarter more   of a client that takes
//	                 one being made, one written   for replies that have    nothing they are
//	                                               begun, and two of        dropped; after Ack, or
//	                                               chunkSize a client       in a Keys or Dump, it
//	                                                                        is cut; one of more than
//	                                                                        maxShared messages that
//	                                                                        has begun waits, unless
//	                                                                        writes need its values
//	lists that wait  16 bytes a value of maxChain  counted in queues when   as with replies, also
//	                 Gets, and the values that     they wait; the values    behind one that may not
//	                 others removed meanwhile      count as data            be dropped (shed)
//	keys to be       16 bytes a key, in parts of   half of queues           the next Keys or Dump
//	listed           maxList or half of that half                           waits
//	keys copied      all that a Keys lists         half of queues           the Keys keeps its
//	                                                                        snapshot
//	a snapshot       one: what others change       maxSnapshots             the next waits; one
//	                                                                        that takes nothing, or
//	                                                                        drips, is cut; what they
//	                                                                        keep counts as data
//	a Take that      1 KiB, and its key; behind    long keys: as begun      it does not wait;
//	waits            a half-close 3 KiB            lines, beside those      memoryPerClient counts
//	                                                                        the rest as data
//	goroutines       three, and Client             memoryPerClient each,    one more client is told
//	                                               for -max-clients; they   that the server is full
//	                                               count as data
//	sockets          sendBuffer, twice, and what   -                        not counted: the
//	                 the kernel takes in                                    kernel's
//
// Without -max-memory data and lines have no limit. Without -max-queues queues have their eighth of
// -max-memory, and without both no limit.
type budget struct {
	// Read-only once started, in bytes.
	limit     int64 // that the process may take (-max-memory); 0: any number
	reserve   int64 // of these, for the program, its stacks, garbage, and what is not counted
	maxQueues int64 // that all queues may take (-max-queues); 0: any number
	fewKeys   int   // in a list that needs no leave: the constant, but for tests

	queued atomic.Int64 // replies, lists and copied keys that wait
	lists  atomic.Int64 // of queued, keys to be listed
	chains atomic.Int64 // chains whose replies wait, with their lines: not bounded (isCrowded)
	inputs atomic.Int64 // lines that have begun to be long
	store  atomic.Int64 // store and clients, as workLoop last noted them
	other  atomic.Int64 // what was alive beside all these after the last collection

	refused atomic.Int64 // when a write was last refused, in seconds of Unix time; 0: never

	// One slot each for a line beyond the share of lines: for any, and for one that frees.
	anyLine, freeing semaphore
}

// How -max-memory is shared out: reserveMin bytes and one part in reserveShare are the reserve,
// and of the rest one part in queuesShare is for queues, one in linesShare for lines.
const (
	reserveMin   = 24 << 20
	reserveShare = 5
	queuesShare  = 8
	linesShare   = 8
)

// limitTo sets -max-memory and -max-queues, before the server starts.
func (b *budget) limitTo(memory, queues int64) {
	b.limit, b.maxQueues = memory, queues
	b.reserve = min(reserveMin+memory/reserveShare, memory/2)
}

// collected notes how many bytes were alive after a collection.
func (b *budget) collected(live int64) { b.other.Store(max(0, live-b.known())) }

// shared is how much is shared out.
func (b *budget) shared() int64 { return b.limit - b.reserve }

// forData is the limit for the data and for memory whose use is not known (other).
func (b *budget) forData() int64 {
	return b.shared() - b.shared()/queuesShare - b.shared()/linesShare
}

// forQueues is how many bytes all that is queued may take; 0: any number.
func (b *budget) forQueues() int64 {
	switch {
	case b.limit == 0:
		return b.maxQueues
	case b.maxQueues == 0:
		return b.shared() / queuesShare
	}
	return min(b.maxQueues, b.shared()/queuesShare)
}

// known is how many bytes are known to be in use.
func (b *budget) known() int64 {
	return b.store.Load() + b.queued.Load() + b.chains.Load() + b.inputs.Load()
}

// data is about how many bytes of forData are in use.
func (b *budget) data() int64 { return b.store.Load() + b.other.Load() }

// fits tells whether there is memory for a write that takes so many bytes more, if it may use so
// much of the reserve.
func (b *budget) fits(bytes, ofReserve int64) bool {
	return b.data()+bytes <= b.forData()+ofReserve
}

// isOver tells whether all queues together take more than they may.
func (b *budget) isOver() bool { return !b.hasRoomFor(0, 0) }

// isCrowded tells whether all queues, with the chains that wait, take more than queues may.
func (b *budget) isCrowded() bool { return !b.hasRoomFor(b.chains.Load(), 0) }

// mayBegin tells whether a reply of so many bytes may begin that must not wait in the middle: for
// these there is a quarter more.
func (b *budget) mayBegin(bytes int64) bool { return b.hasRoomFor(bytes, b.forQueues()/4) }

// isPinned tells whether a write was refused just now, or soon will be, while much is alive that is
// neither stored nor queued: values that replies hold, and that were deleted meanwhile.
func (b *budget) isPinned() bool {
	isFull := !b.fits(b.forData()/8, 0) || time.Now().Unix()-b.refused.Load() <= refusedTime
	return b.limit > 0 && isFull && b.other.Load() > b.shared()/queuesShare
}

// refusedTime is for how many seconds after a refused write a reply that holds memory is cut.
const refusedTime = 10

// hasRoomFor tells whether so many bytes may be queued, where the queues may take so many more.
func (b *budget) hasRoomFor(bytes, more int64) bool {
	most := b.forQueues()
	return most == 0 || b.queued.Load()+bytes < most+more
}

// The lists of all Keys and Dumps may take half of what is for queues, and one half of that, or
// maxList if it is less.
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

// acquireList counts so many bytes more for the list of a Keys or Dump, if there are so many.
func (b *budget) acquireList(bytes int64) bool {
	return addUpTo(&b.lists, bytes, b.forQueues()/listsShare)
}

// acquireLine counts so many bytes more for lines that have begun, if there are so many.
func (b *budget) acquireLine(bytes int64) bool {
	return addUpTo(&b.inputs, bytes, b.shared()/linesShare)
}

// addUpTo adds bytes to sum, unless that would then be more than most; 0: any number.
func addUpTo(sum *atomic.Int64, bytes, most int64) bool {
	if sum.Add(bytes) > most && most > 0 {
		sum.Add(-bytes)
		return false
	}
	return true
}

// semaphore lets so many at a time have something that is scarce.
type semaphore struct {
	slots   chan struct{} // holds a token for each that is taken
	waiting atomic.Int64  // goroutines that wait for a slot, or for the memory of a list
}

// slot is one goroutine's place in a semaphore, taken or not. That goroutine owns it.
type slot struct {
	of    *semaphore
	taken bool
}

// acquire waits for a slot. It returns false if stop is closed meanwhile; a nil stop never is.
func (s *slot) acquire(stop <-chan struct{}) bool {
	// Most often a slot is free, and then nobody counts as waiting.
	select {
	case s.of.slots <- struct{}{}:
		s.taken = true
		return true
	default:
	}

	// A listing that its client reads too slowly loses its slot only while others wait.
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

// yield lets others have a turn in the middle of work that takes long: unasked, the scheduler
// takes 10 ms to do so.
func (s *slot) yield() {
	if s.taken {
		s.release()
		runtime.Gosched()
		s.acquire(nil)
	}
}

// isAwaited tells whether the slot is taken and others wait for one.
func (s *slot) isAwaited() bool { return s.taken && s.of.waiting.Load() > 0 }

// pacer chooses how much garbage there may be before it is collected. Go lets the heap
// double; but nearly all of ours is data that a collection does not even read, so it
// costs little and may come sooner: the process takes a third less memory.
type pacer struct {
	server  *keyValueServer
	percent int // that was last set (GOGC)
}

// Bytes of garbage that there may be: garbageMin, one for garbageShare bytes of data, and as
// many as are in objects with pointers, for these are what a collection takes time for.
const garbageMin, garbageShare = 16 << 20, 16

// begin calls choose, now and after each collection: every collection runs the finalizer of an
// object to which nothing points.
func (p *pacer) begin() {
	p.choose()
	type unused struct{ p *pacer }
	runtime.SetFinalizer(&unused{p}, func(*unused) { p.begin() })
}

// choose sets the collector's percentage, and tells the server what is alive.
func (p *pacer) choose() {
	// Both are of the last collection, and cost nothing to read.
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/heap:bytes"}}
	metrics.Read(samples)
	live, linked := int64(samples[0].Value.Uint64()), int64(samples[1].Value.Uint64())
	p.server.budget.collected(live)

	// Go takes the least heap to be 4 MiB.
	garbage := garbageMin + live/garbageShare + min(linked, live)
	percent := int(garbage * 100 / max(live, garbageMin/6))

	// Setting it stops everybody for a moment.
	if percent < p.percent*9/10 || percent > p.percent*10/9 {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
}

// ---- the end of a batch

// commit makes what the batch did durable, then answers. After a failure nobody may
// learn what the chains did: every connection ends.
func (s *keyValueServer) commit() {
	// Reads are committed, too: they may have seen what is not yet durable.
	if len(s.batch) > 0 {
		s.commitStore()
	}

	// Nobody learns before this what the chains have done.
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

	// The pacer asks at any time what the store takes, and only workLoop can see that.
	s.noteMemory()
	s.freeMemory()
}

// commitStore commits what the batch did. Where that takes its time, it is measured. If it fails,
// nothing runs any more.
func (s *keyValueServer) commitStore() {
	if s.commitFailed {
		return
	}

	began := time.Now()
	err := s.db.Commit()

	// Without a batch it was but a check of the files, for which nobody has waited.
	if took := time.Since(began); len(s.batch) > 0 {
		s.gathering.next(took)
		if s.status != nil {
			s.commits.Observe(took.Seconds())
			s.batches.Observe(float64(len(s.batch)))
		}
	}

	// What the clients were to be told is not known to be on disk.
	if err != nil {
		s.commitFailed = true
		s.failed <- err
		for _, c := range s.clients {
			c.paced.Close() // without a word: it might not be taken
		}
	}
}

// leave takes note that one of c's goroutines has ended, and with the last of
// them that c has gone.
func (s *keyValueServer) leave(c *Client) {
	// One that was rejected is in no list.
	if c.id == 0 {
		s.rejecting--
		return
	}
	s.gathering.left(&c.share)
	if c.alive--; c.alive > 0 {
		return
	}

	// The last takes its place in the list.
	last := s.clients[len(s.clients)-1]
	s.clients[c.index], last.index = last, c.index
	s.clients[len(s.clients)-1] = nil
	s.clients = s.clients[:len(s.clients)-1]
	s.departed++

	// A Write that failed is the reason to log: reading ended because of it, or later.
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

// stopReading begins the end, once: no more requests are read. Writing ends when timeIsUp, and a
// client that goes on sending, or has much to read, gets drainTime to take our last words.
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
	s.closeTick = time.After(tickTime)
}

// hurry ends Writes when closeTime is over. It counts ticks, for where this whole process stands
// still for a while that is one tick.
func (s *keyValueServer) hurry() {
	if s.closeTicks++; s.closeTicks < int(closeTime/tickTime) {
		s.closeTick = time.After(tickTime)
		return
	}

	s.closeTick = nil
	close(s.timeIsUp)
	now := time.Now()
	for _, c := range s.clients {
		c.paced.SetWriteDeadline(now)
	}
}

// counter is a row of Stats and /metrics: a number, or the version, and what it is.
type counter struct {
	name  string // it ends in _total if the number only ever grows
	help  string // a sentence
	value any    // a number; of the version a string, which /metrics shows as a label
}

// line is c as Stats shows it.
func (c counter) line() string { return fmt.Sprint(c.name, " ", c.value) }

// write writes c in the text format of Prometheus.
func (c counter) write(w io.Writer) {
	name, labels, value := c.name, "", c.value
	if text, isText := value.(string); isText {
		name, labels, value = "info", fmt.Sprintf("{%s=%q}", c.name, text), 1
	}

	// What Prometheus calls a type.
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	fmt.Fprintf(w, "# HELP kvserver_%s %s\n# TYPE kvserver_%s %s\nkvserver_%s%s %v\n",
		name, c.help, name, kind, name, labels, value)
}

// stats returns what Stats and /metrics both show.
func (s *keyValueServer) stats() []counter {
	// The bytes below are to be those of now.
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
		{"queued_bytes", "Replies that wait to be read by all clients.", s.budget.queued.Load()},
		{"queued_limit_bytes", "How much they may be (-max-queues); 0: no limit.", s.budget.forQueues()},
		{"writes_refused_total", "Writes that were refused, for the disk or the memory is full.",
			s.noRoom.total + s.noMemory.total},
		{"waiting_takes", "Takes that wait for a value.", s.takes.n},
		{"expired_keys_total", "Keys that have gone because their time was over.", s.expired},
		{"clients_refused_total", "Connections over -max-clients, which were refused.", s.full.total},
		{"tls_handshakes_failed_total", "Connections that did not get as far as TLS.",
			s.badHandshakes.total},
	}...)

	// Not every store knows how much it holds.
	keys, values, bytes := s.db.Size()
	if keys < 0 {
		return rows
	}
	return append(rows, []counter{
		{"keys", "Keys in the store.", keys},
		{"values", "Values in the store.", values},
		{"expiring_keys", "Keys that go when their time is over.", s.db.Expiring()},
		{"data_bytes", "Keys and values together.", bytes},
		{"memory_bytes", "What the data and the clients take in memory, but for what is queued.",
			s.budget.data()},
		{"memory_limit_bytes", "At so much writes are refused; 0: no limit.", s.budget.forData()},
		{"process_bytes", "What the process takes from the system.", processBytes()},
	}...)
}

// processBytes is how many bytes of memory the system has given the process, but for its
// program.
func processBytes() uint64 {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() - samples[1].Value.Uint64()
}

// requestsRun returns how many requests were run or refused.
func (s *keyValueServer) requestsRun() (n int) {
	for _, some := range s.requests {
		n += some
	}
	return n
}

// ---- listening

// unixPrefix stands before the path in the address of a unix socket.
const unixPrefix = "unix:"

// listen listens on addr. A peer that has vanished is noticed within 35 s: keep-alive asks after
// 15 s of silence, then three times at intervals of 5 s. (If it has not confirmed what was written
// to it, the kernel tries that again instead, for minutes.) The host localhost means 127.0.0.1 and
// ::1, where both exist, whatever the system makes of that name: many clients try only one of them.
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

	// The kernel asks peers that are silent whether they are there.
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}

	// The first address tells which port is free, and the second is to have the same.
	isAnyPort := port == "0"
	for _, host := range hosts {
		var listener net.Listener
		listener, err = config.Listen(context.Background(), "tcp", net.JoinHostPort(host, port))
		switch {
		case err == nil:
			listeners = append(listeners, listener)
			_, port, _ = net.SplitHostPort(listener.Addr().String())

		// One of the two will do: the machine has no other, or there the port is not free.
		case isAny(err, noAddress...) || isAnyPort && len(listeners) > 0:

		default:
			closeAll(listeners)
			return nil, err
		}
	}

	// No address will do, and err is the last one's.
	if len(listeners) == 0 {
		return nil, err
	}
	return listeners, nil
}

// isAny tells whether err is one of targets.
func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

// errNoSocket is listenUnix's where there is a file of another kind.
var errNoSocket = errors.New("there is a file that is no socket")

// listenUnix listens on a unix socket at path, which its user and group may connect to, in the
// place of one whose server has died. Close removes it.
func listenUnix(path string) ([]net.Listener, error) {
	// What is no socket is somebody's file.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, errNoSocket
	}

	// A server that was killed leaves its socket, which nobody listens at.
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
	} else if isAny(err, refused...) {
		os.Remove(path)
	}

	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}

	// Its mode is all that says who may connect.
	err = os.Chmod(path, 0o660)
	made, statErr := os.Lstat(path)
	if err = cmp.Or(err, statErr); err != nil {
		listener.Close()
		return nil, err
	}

	// Go's own removes whatever has the name.
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	return []net.Listener{&unixListener{listener, path, made}}, nil
}

// unixListener removes its socket when it is closed, if that is still there: another server may have
// made one of the same name.
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

// What listening and connecting fail with, on Windows, too: somebody else listens there
// (WSAEADDRINUSE); the machine does not have the address (WSAEADDRNOTAVAIL), or none of its kind;
// nobody listens there (WSAECONNREFUSED).
var (
	inUse     = []error{syscall.EADDRINUSE, syscall.Errno(10048)}
	noAddress = []error{syscall.EADDRNOTAVAIL, syscall.Errno(10049), syscall.EAFNOSUPPORT,
		syscall.EPROTONOSUPPORT}
	refused = []error{syscall.ECONNREFUSED, syscall.Errno(10061)}
)

// ---- watching: HTTP

const (
	watchTime   = 2 * time.Second // for workLoop to answer who watches
	requestTime = 5 * time.Second // for an HTTP request to come
	// for its answer to be taken; net/http/pprof adds a profile's own time
	answerTime  = 10 * time.Second
	profileTime = 60 * time.Second // of a profile or a trace
)

// statsFor has workLoop give stats to an HTTP request, once all that was asked before is
// durable. If there is no answer in time it says so there, and returns nil.
func (s *keyValueServer) statsFor(w http.ResponseWriter, r *http.Request) []counter {
	// Before the data is open there is no workLoop to ask.
	why := s.stage()
	if why == "" && isClosed(s.serving) {
		if rows := s.askStats(r.Context()); rows != nil {
			return rows
		}
	}

	http.Error(w, cmp.Or(why, "the server does not answer"), http.StatusServiceUnavailable)
	return nil
}

// askStats asks workLoop for the counters; nil: there is no answer in time.
func (s *keyValueServer) askStats(ctx context.Context) []counter {
	ctx, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()

	// There is a slot for the answer, so workLoop need not know that it comes too late.
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

// stage is what the store waits for before it is open; "" once it is.
func (s *keyValueServer) stage() string {
	if s.status == nil {
		return ""
	}
	return s.status.Stage()
}

// metrics writes Stats, and what else there is to be watched, in the text format of
// Prometheus.
func (s *keyValueServer) metrics(w http.ResponseWriter, r *http.Request) {
	// Before the data is open there are no Stats.
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

	// In memory nothing takes its time.
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

// watched are the counters that are no part of Stats.
func (s *keyValueServer) watched() (rows []counter) {
	// A store in memory is taken over from nobody, and has no log.
	if s.status != nil {
		rows = append(rows,
			counter{"takeovers_total", "How often the data was taken over from a server that had died.",
				s.status.Takeovers()},
			counter{"compactions_total", "How often the log was compacted, since the start.",
				s.status.Compactions.Load()})

		// A lock on files of our own needs nobody to confirm it.
		if at := s.status.Confirmed(); !at.IsZero() {
			rows = append(rows, counter{"lock_age_seconds",
				"Since etcd last confirmed that the data is ours.", time.Since(at).Seconds()})
		}
	}

	// A log that cannot be written cannot say so itself.
	if s.logged != nil {
		rows = append(rows,
			counter{"log_lines_lost_total", "Lines of log that could not be written.",
				s.logged.lost.Load()},
			counter{"log_errors_total", "Errors in the log.", s.logged.errors.Load()},
			counter{"last_error_timestamp_seconds",
				"When the last error was logged, as a Unix time; 0: never.",
				s.logged.last.Load()})
	}

	// What Go says of itself.
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

// writeHistogram writes h as Prometheus wants it.
func writeHistogram(w io.Writer, name, help string, h *storage.Histogram) {
	fmt.Fprintf(w, "# HELP kvserver_%s %s\n# TYPE kvserver_%s histogram\n", name, help, name)

	atMost, all, sum := h.Read()
	for i, n := range atMost {
		fmt.Fprintf(w, "kvserver_%s_bucket{le=\"%g\"} %d\n", name, h.Bounds()[i], n)
	}
	fmt.Fprintf(w, "kvserver_%s_bucket{le=\"+Inf\"} %d\nkvserver_%s_sum %g\nkvserver_%s_count %d\n",
		name, all, name, sum, name, all)
}

// logCounts is what there was in the log so far, for who watches.
type logCounts struct {
	lost, errors atomic.Int64
	last         atomic.Int64 // when the last error was, as a Unix time; 0: there was none
}

// note counts an error, of whose line a is the level. It changes nothing.
func (n *logCounts) note(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.LevelKey && a.Value.Any() == slog.LevelError {
		n.errors.Add(1)
		n.last.Store(time.Now().Unix())
	}
	return a
}

// watchAt listens at addr for whoever watches s.
func (s *keyValueServer) watchAt(addr string) (io.Closer, error) {
	listeners, err := listen(addr)
	if err != nil {
		return nil, err
	}

	// It has no password: warn if others than localhost can reach it.
	at := listeners[0].Addr().(*net.TCPAddr)
	if !at.IP.IsLoopback() {
		s.log.Warn("anyone who can reach this address can watch the server", "addr", at.String())
	}
	s.log.Info("watching", "metrics", "http://"+at.String()+"/metrics")

	// Requests for another host name are refused (onlyFor).
	host, _, _ := net.SplitHostPort(addr)
	return s.watch(listeners, host), nil
}

// watch serves numbers, health and profiles over HTTP.
func (s *keyValueServer) watch(listeners []net.Listener, host string) *http.Server {
	server := &http.Server{
		Handler:      s.watchHandler(host),
		ReadTimeout:  requestTime,
		WriteTimeout: answerTime,
		ErrorLog:     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}

	// An idle connection would hold one of maxWatchers.
	server.SetKeepAlivesEnabled(false)
	for _, listener := range listeners {
		go server.Serve(&fewConns{Listener: listener, most: maxWatchers / len(listeners)})
	}
	return server
}

// fewConns is a listener with at most so many connections: one more takes the place of the
// oldest that has said nothing, or else of the oldest, so that nobody keeps others out.
type fewConns struct {
	net.Listener
	most   int
	guests []*guest // owned by Accept, which one goroutine calls; the oldest first
}

// guest is a connection of fewConns, as long as it has a place.
type guest struct {
	net.Conn
	spoke atomic.Bool // a byte has come
	left  atomic.Bool // it has no place any more
}

// Accept waits for a connection.
func (f *fewConns) Accept() (net.Conn, error) {
	conn, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}

	// Where there is no room, those that have gone make some.
	if len(f.guests) == f.most {
		f.guests = slices.DeleteFunc(f.guests, func(g *guest) bool { return g.left.Load() })
	}

	// If that was not enough, one that is there goes: the oldest that has said nothing, if any.
	if len(f.guests) == f.most {
		i := slices.IndexFunc(f.guests, func(g *guest) bool { return !g.spoke.Load() })
		f.guests[max(i, 0)].Close()
		f.guests = slices.Delete(f.guests, max(i, 0), max(i, 0)+1)
	}

	g := &guest{Conn: conn}
	f.guests = append(f.guests, g)
	return g, nil
}

// leave gives up the place. It returns whether there was one.
func (g *guest) leave() bool { return g.left.CompareAndSwap(false, true) }

// Read reads, and notes that something has come.
func (g *guest) Read(p []byte) (n int, err error) {
	if n, err = g.Conn.Read(p); n > 0 {
		g.spoke.Store(true)
	}
	return n, err
}

// Close closes the connection, unless it has gone on without its place.
func (g *guest) Close() error {
	if !g.leave() {
		return nil
	}
	return g.Conn.Close()
}

// watchHandler answers what watch serves. host is the name that requests may be
// for, beside addresses and localhost.
func (s *keyValueServer) watchHandler(host string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.metrics)

	// It goes through workLoop and the disk, so it fails where one of them hangs.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if s.statsFor(w, r) != nil {
			io.WriteString(w, "ok\n")
		}
	})

	// A server that loads its data, or stands by, is to be left alone: it is alive.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "alive\n")
	})

	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "/metrics\n/healthz\n/livez\n/debug/pprof/\n")
	})

	// They share a handler, for only one of them may run at a time.
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("GET /debug/pprof/", oneAtATime(profiles))

	return onlyFor(host, mux)
}

// onlyFor lets only requests through whose Host is an address, localhost or host: a
// web page elsewhere may give its own name our address, and then the browser lets
// it read what we answer (DNS rebinding).
func onlyFor(host string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The port may be missing, and an IPv6 address is in brackets.
		name, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			name = r.Host
		}
		name = strings.Trim(name, "[]")

		// A page from elsewhere comes with its own name, never with an address or localhost.
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

// oneAtATime refuses a request while another is under way, and one for more than
// profileTime. After each it rests as long as that took, but at most a second: some
// profiles stop the whole process.
func oneAtATime(next http.Handler) http.Handler {
	free := make(chan struct{}, 1)
	free <- struct{}{}

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// With a body FormValue would take in 32 MiB of a form, and put more into files.
		r.Body = http.NoBody
		seconds, _ := strconv.ParseFloat(r.FormValue("seconds"), 64)
		if seconds > profileTime.Seconds() {
			http.Error(w, fmt.Sprintf("seconds=%v is too long: at most %v", seconds,
				profileTime.Seconds()), http.StatusBadRequest)
			return
		}

		// A request that waited here would hold a connection that others can use.
		select {
		case <-free:
		default:
			http.Error(w, "another profile is being taken: try again when it is done",
				http.StatusServiceUnavailable)
			return
		}

		// The rest leaves clients as much time as the profile took from them.
		began := time.Now()
		defer func() {
			time.AfterFunc(min(time.Since(began), time.Second), func() { free <- struct{}{} })
		}()
		next.ServeHTTP(w, r)
	})
}
