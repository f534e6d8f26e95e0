package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"kvserver/kvstore"
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

	crowd = 1000 // clients whose going makes it worth while to give memory back

	defaultMaxLine = 1 << 20 // bytes of a line without its end, unless set

	defaultMaxClients   = 10_000 // with 17 KB for each that is quiet, 170 MB
	defaultWriteTimeout = 5 * time.Minute
	spareFiles          = 32 // of the process's limit, for everything but clients: the log, a compaction, those who watch
	maxTurnedAway       = 8  // of these, connections over maxClients that get time to hear so

	// What the store takes beside the bytes of keys and values: map, string
	// headers and spare room, measured with a million keys of one value.
	memoryPerKey, memoryPerValue = 64, 32

	closeTime = time.Second // for a client to take its last replies once Close was called

	// How long acceptClient waits after Accept failed: doubled each time.
	minAcceptWait = 5 * time.Millisecond
	maxAcceptWait = time.Second
)

// errClosed is returned by Start after Close.
var errClosed = errors.New("the server is closed")

// errStarted is returned by Start when the server was started before.
var errStarted = errors.New("the server was started before")

// keyValueServer serves a store over TCP. Make one with New.
//
// acceptClient feeds connections; every client's readFromClient feeds queries;
// workLoop receives from both and owns everything that they change.
type keyValueServer struct {
	// Read-only once started.
	listener     net.Listener
	maxLine      int // bytes of a request line, its end not counted
	maxMessage   int // the constant, but for tests
	maxClients   int
	maxMemory    int64         // bytes as memoryUsed counts them; 0: no limit
	writeTimeout time.Duration // for a client to accept what is written; 0: for ever
	version      string
	log          *slog.Logger
	started      time.Time

	// Channels.
	queries     chan *Query   // readers, departing goroutines and API calls to workLoop; never closed; room for some, so that a sender seldom waits for workLoop to be scheduled
	connections chan net.Conn // acceptClient, which closes it when it ends, to workLoop
	countActive chan int      // workLoop to CountActive and CountDropped: their turn admits one asker, so its one slot is free and workLoop never waits
	closeSignal chan struct{} // closed by Close: acceptClient ends, workLoop winds up
	ended       chan struct{} // closed by workLoop when every other goroutine has ended
	failed      chan error    // workLoop to whoever asks Failed; one slot for the one failure
	turn        chan struct{} // holds one token; the API call that took it owns what is below

	// Owned by the API call that has its turn.
	running bool // acceptClient and workLoop were started
	closed  bool // Close was called

	// Owned by workLoop.
	clients  []*Client
	db       kvstore.KVStore
	batch    []*Query  // chains that have run and wait for Commit
	turned   int       // connections that are being turned away
	fullSaid time.Time // when the log was last told that clients are turned away
	broken   bool      // Commit failed: nothing runs any more
	closing  bool      // closeSignal was seen
	welcomed int       // clients so far
	left     int       // of these, gone
	most     int       // clients at once, since there was none
	dropped  int       // replies that slow readers lost
	requests [queryTypes]int
}

// New returns a server of db, which is its own from Start to Close. It logs
// nothing unless it is given a logger.
func New(db kvstore.KVStore) *keyValueServer {
	s := &keyValueServer{
		db:           db,
		maxLine:      defaultMaxLine,
		maxMessage:   maxMessage,
		maxClients:   defaultMaxClients,
		writeTimeout: defaultWriteTimeout,
		version:      "unknown",
		log:          slog.New(slog.DiscardHandler),
		queries:      make(chan *Query, maxBatch),
		connections:  make(chan net.Conn),
		countActive:  make(chan int, 1),
		closeSignal:  make(chan struct{}),
		ended:        make(chan struct{}),
		failed:       make(chan error, 1),
		turn:         make(chan struct{}, 1),
	}
	s.turn <- struct{}{}
	return s
}

// Start listens on port of localhost and serves until Close. It does not block.
// It returns an error when it cannot listen, the second time, and after Close.
func (s *keyValueServer) Start(port int) error {
	listener, err := listen(net.JoinHostPort("localhost", strconv.Itoa(port)))
	if err != nil {
		return err
	}
	if err := s.serve(listener); err != nil {
		listener.Close()
		return err
	}
	return nil
}

// serve is Start with a listener, which becomes the server's.
func (s *keyValueServer) serve(listener net.Listener) error {
	<-s.turn
	defer func() { s.turn <- struct{}{} }()
	switch {
	case s.closed:
		return errClosed
	case s.running:
		return errStarted
	}
	s.running, s.listener, s.started = true, listener, time.Now()
	go s.acceptClient()
	go s.workLoop()
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
	<-s.turn
	defer func() { s.turn <- struct{}{} }()
	if !s.running {
		return 0
	}
	select {
	case s.queries <- &Query{queryType: what}:
	case <-s.ended:
		return 0
	}
	select {
	case n := <-s.countActive:
		return n
	case <-s.ended: // the query came too late, or the answer just in time
	}
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

// Close ends the server: requests that were read are run, and their replies
// flushed to clients that take them within closeTime. It returns when all the
// server's goroutines have ended; the store is the caller's again.
func (s *keyValueServer) Close() {
	<-s.turn
	if !s.closed {
		s.closed = true
		close(s.closeSignal)
		if s.running {
			s.listener.Close()
		}
	}
	running := s.running
	s.turn <- struct{}{}
	if running {
		<-s.ended
	}
}

func (s *keyValueServer) isClosing() bool {
	select {
	case <-s.closeSignal:
		return true
	default:
		return false
	}
}

// acceptClient hands every connection over to workLoop. It runs until Close
// closes the listener. Any other error, such as running out of file
// descriptors, may pass: it waits a little longer each time and tries again.
func (s *keyValueServer) acceptClient() {
	defer close(s.connections)
	wait := time.Duration(0)
	for {
		conn, err := s.listener.Accept()
		if err == nil {
			if wait > 0 {
				s.log.Info("accepting connections again")
				wait = 0
			}
			s.connections <- conn
			continue
		}
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

// workLoop owns the store and the clients: whatever is done to them is done
// here, in the one order that everybody sees. It never waits for a client: its
// sends all have a free slot. It runs until Close, then until the last client
// has left.
func (s *keyValueServer) workLoop() {
	defer close(s.ended)
	connections, closeSignal := s.connections, s.closeSignal
	for connections != nil || len(s.clients) > 0 || s.turned > 0 {
		select {
		case conn, open := <-connections:
			if !open {
				connections = nil
				s.hangUp()
			} else {
				s.welcome(conn)
			}
		case q := <-s.queries:
			s.work(q)
		case <-closeSignal:
			closeSignal = nil
			s.hangUp()
		}
	}
	s.log.Info("stopped", "clients_served", s.left, "requests", s.total(), "replies_dropped", s.dropped)
}

// welcome makes a client of conn.
func (s *keyValueServer) welcome(conn net.Conn) {
	if s.closing || s.broken {
		conn.Close()
		return
	}
	if len(s.clients) >= s.maxClients {
		s.turnAway(conn)
		return
	}
	if tcp, ok := underTLS(conn).(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	s.welcomed++
	c := newClient(s.welcomed, conn, s)
	c.index = len(s.clients)
	s.clients = append(s.clients, c)
	s.log.Debug("client came", "client", c.id, "addr", c.addr())
	go c.readFromClient()
}

// turnAway tells conn that there are enough clients. writeToClient does that,
// alone: such a client is in nobody's list. When many come at once some are
// closed without the time to take the message in.
func (s *keyValueServer) turnAway(conn net.Conn) {
	if now := time.Now(); now.Sub(s.fullSaid) >= time.Minute {
		s.fullSaid = now
		s.log.Warn("turning clients away", "limit", s.maxClients)
	}
	why := Query{queryType: malformed, value: fmt.Sprintf("server is full (%d clients)", s.maxClients)}
	full := why.appendEnd(nil, false, 0)
	if s.turned == maxTurnedAway {
		if underTLS(conn) == conn {
			conn.Write(full) // into an empty send buffer, so without waiting
		}
		underTLS(conn).Close()
		return
	}
	s.turned++
	conn.SetDeadline(time.Now().Add(closeTime)) // so that Close need not know of it
	c := newClient(0, conn, s)
	c.drain = true
	c.buffer = make(chan []byte, 1)
	c.buffer <- full
	close(c.buffer)
	go c.writeToClient()
}

// underTLS is the connection that conn encrypts, or conn.
func underTLS(conn net.Conn) net.Conn {
	if outer, ok := conn.(interface{ NetConn() net.Conn }); ok {
		return outer.NetConn()
	}
	return conn
}

// work runs q and what else is waiting, commits it all at once, then answers.
func (s *keyValueServer) work(q *Query) {
	for yields := 0; q != nil; q = s.waiting() {
		switch q.queryType {
		case countActive:
			s.countActive <- len(s.clients)
		case countDropped:
			s.countActive <- s.left
		case depart:
			s.leave(q.client)
		default:
			s.run(q)
		}
		for ; yields < maxYields && len(s.queries) == 0; yields++ {
			runtime.Gosched()
		}
	}
	s.commit()
}

// waiting returns the next query in the queue, or nil if there is none or the
// batch is full.
func (s *keyValueServer) waiting() *Query {
	if len(s.batch) == maxBatch {
		return nil
	}
	select {
	case q := <-s.queries:
		return q
	default:
		return nil
	}
}

// run runs chain, which waits in batch for its Commit.
func (s *keyValueServer) run(chain *Query) {
	s.batch = append(s.batch, chain)
	c := chain.client
	if c.buffer == nil && !chain.bare {
		c.buffer = make(chan []byte, maxBufferSize)
		c.alive++
		go c.writeToClient()
	}
	s.dropped += c.droppedTotal - c.reported
	c.reported = c.droppedTotal
	if s.broken {
		return
	}
	for q := chain; q != nil; q = q.next {
		if s.maxMemory > 0 && (q.queryType == put || q.queryType == update) && s.memoryUsed()+q.memory() > s.maxMemory {
			q.refuse(fmt.Sprintf("the server's memory is full (%d bytes): Delete something first", s.maxMemory))
		}
		if !chain.bare {
			s.requests[q.queryType]++
		}
		if q.queryType == stats {
			q.values = s.stats()
			q.n = len(q.values)
		} else {
			q.run(s.db)
		}
	}
}

// memoryUsed is about how many bytes the store takes: 0 if it cannot say.
func (s *keyValueServer) memoryUsed() int64 {
	db, ok := s.db.(kvstore.Sizer)
	if !ok {
		return 0
	}
	keys, values, bytes := db.Size()
	return bytes + int64(keys)*memoryPerKey + int64(values)*memoryPerValue
}

// commit makes what batch did durable, then answers. After a failure nobody may
// learn what the chains did: every connection ends.
func (s *keyValueServer) commit() {
	if len(s.batch) > 0 && !s.broken {
		if err := s.db.Commit(); err != nil {
			s.broken = true
			s.failed <- err
			for _, c := range s.clients {
				underTLS(c.connection).Close() // without a word: it might not be taken
			}
		}
	}
	for i, chain := range s.batch {
		switch c := chain.client; {
		case s.broken:
			c.done <- nil
		case chain.bare:
			c.done <- chain
		default:
			c.answer(chain)
		}
		s.batch[i] = nil
	}
	s.batch = s.batch[:0]
}

// leave takes note that one of c's goroutines has ended, and with the last of
// them that c has gone.
func (s *keyValueServer) leave(c *Client) {
	if c.id == 0 {
		s.turned--
		return
	}
	if c.alive--; c.alive > 0 {
		return
	}
	last := s.clients[len(s.clients)-1]
	s.clients[c.index], last.index = last, c.index
	s.clients[len(s.clients)-1] = nil
	s.clients = s.clients[:len(s.clients)-1]
	s.left++
	s.most = max(s.most, len(s.clients)+1)
	if len(s.clients) == 0 && s.most >= crowd {
		s.most = 0
		go debug.FreeOSMemory() // the collector alone would take minutes to give back what a crowd took
	}
	s.dropped += c.droppedTotal - c.reported
	level, reason := slog.LevelDebug, c.reason
	if c.broken != nil { // then that is why reading ended
		reason = c.broken.Error()
	}
	if c.droppedTotal > 0 {
		level, reason = slog.LevelWarn, fmt.Sprintf("slow reader, %d replies dropped; then %s", c.droppedTotal, reason)
	}
	s.log.Log(context.Background(), level, "client left", "client", c.id, "addr", c.addr(), "reason", reason)
}

// hangUp begins the end, once: no client is read from any more, and none is
// waited for longer than closeTime.
func (s *keyValueServer) hangUp() {
	if s.closing {
		return
	}
	s.closing = true
	s.log.Info("stopping", "clients", len(s.clients))
	now := time.Now()
	for _, c := range s.clients {
		c.connection.SetReadDeadline(now)
		c.connection.SetWriteDeadline(now.Add(closeTime))
	}
}

// stats returns the lines that answer Stats. A name that ends in _total only
// ever grows.
func (s *keyValueServer) stats() []string {
	lines := []string{
		"version " + s.version,
		fmt.Sprint("uptime_seconds ", int(time.Since(s.started).Seconds())),
		fmt.Sprint("clients ", len(s.clients)),
		fmt.Sprint("clients_left_total ", s.left),
	}
	for t := put; t <= quit; t++ {
		lines = append(lines, fmt.Sprint(strings.ToLower(verbs[t].name), "_requests_total ", s.requests[t]))
	}
	lines = append(lines,
		fmt.Sprint("refused_requests_total ", s.requests[malformed]+s.requests[webRequest]),
		fmt.Sprint("replies_dropped_total ", s.dropped))
	if db, ok := s.db.(kvstore.Sizer); ok {
		keys, values, bytes := db.Size()
		lines = append(lines,
			fmt.Sprint("keys ", keys),
			fmt.Sprint("values ", values),
			fmt.Sprint("data_bytes ", bytes),
			fmt.Sprint("memory_bytes ", s.memoryUsed()))
	}
	return lines
}

// total returns how many requests were run or refused.
func (s *keyValueServer) total() (n int) {
	for t := malformed; t <= quit; t++ {
		n += s.requests[t]
	}
	return n
}

// statsNow returns the lines of Stats for somebody without a connection, or nil
// when the server does not run.
func (s *keyValueServer) statsNow() []string {
	asker := &Client{done: make(chan *Query, 1)}
	select {
	case s.queries <- &Query{queryType: stats, client: asker, bare: true}:
	case <-s.ended:
		return nil
	}
	select {
	case q := <-asker.done:
		if q == nil {
			return nil
		}
		return q.values
	case <-s.ended:
		return nil
	}
}

// metrics writes Stats and some of the Go runtime's numbers in the text format
// of Prometheus.
func (s *keyValueServer) metrics(w http.ResponseWriter, _ *http.Request) {
	lines := s.statsNow()
	if lines == nil {
		http.Error(w, "the server does not answer any more", http.StatusServiceUnavailable)
		return
	}
	samples := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(samples)
	for i, name := range []string{"go_goroutines", "go_heap_bytes", "go_memory_bytes", "go_gc_cycles_total"} {
		lines = append(lines, fmt.Sprint(name, " ", samples[i].Value.Uint64()))
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	for _, line := range lines {
		name, value, _ := strings.Cut(line, " ")
		kind := "gauge"
		switch {
		case name == "version":
			name, value = "info{version="+strconv.Quote(value)+"}", "1"
		case strings.HasSuffix(name, "_total"):
			kind = "counter"
		}
		bare, _, _ := strings.Cut(name, "{")
		fmt.Fprintf(w, "# TYPE kvserver_%s %s\nkvserver_%s %s\n", bare, kind, name, value)
	}
}

// watch serves numbers, health and profiles over HTTP.
func (s *keyValueServer) watch(listener net.Listener) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.metrics)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if s.statsNow() == nil {
			http.Error(w, "the server does not answer any more", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "/metrics\n/healthz\n/debug/pprof/\n") })
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	go server.Serve(listener)
	return server
}

// listen listens on addr. Peers that vanish are noticed within 35 s: keep-alive
// asks after 15 s of silence, then three times at intervals of 5 s.
func listen(addr string) (net.Listener, error) {
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}
	return config.Listen(context.Background(), "tcp", addr)
}
