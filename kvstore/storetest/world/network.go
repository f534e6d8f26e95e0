package world

import (
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// Listener is the network of one server: the server listens on it.
type Listener struct {
	Failures int // so many calls of Accept fail first

	conns  chan net.Conn
	closed chan struct{}
}

// NewListener returns an open Listener.
func NewListener() *Listener {
	return &Listener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Connect hands a connection to the server. It returns false if the server has closed l.
func (l *Listener) Connect(conn net.Conn) bool {
	select {
	case l.conns <- conn:
		return true
	case <-l.closed:
		return false
	}
}

// Closed returns a channel that is closed when l is closed.
func (l *Listener) Closed() <-chan struct{} { return l.closed }

func (l *Listener) Accept() (net.Conn, error) {
	if l.Failures > 0 {
		// A server without a free descriptor must try again, and must not end.
		l.Failures--
		return nil, syscall.EMFILE
	}

	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *Listener) Close() error {
	close(l.closed)
	return nil
}

func (l *Listener) Addr() net.Addr { return addr{} }

// HalfConn is a connection whose sending side can be closed alone.
type HalfConn interface {
	net.Conn
	CloseWrite() error
}

// StreamSize is the usual capacity in bytes of one direction of a connection: small, so that a
// server soon notices a client that stops reading.
const StreamSize = 64 << 10

// stream is one direction of a connection. Both directions share one mutex.
type stream struct {
	changed          *sync.Cond // its lock is the connection's mutex
	buf              []byte
	size             int // its capacity in bytes
	sum              int // number of bytes that were written to it
	reading, writing deadline

	// It was full, and takes no byte until a lump of it is free, as a TCP receive window does.
	shut   bool
	ended  bool // the writer has closed it
	broken bool // the reader has gone
	reset  bool // the writer has broken it off: unread bytes are lost
}

// lump returns how much of a full stream must be free before it takes bytes again: a sixteenth of a
// large one, as in Linux.
func (s *stream) lump() int { return max(s.size/16, min(s.size/2, 32<<10)) }

// change runs f with the connection locked, and wakes everybody who waits for s.
func (s *stream) change(f func()) {
	s.changed.L.Lock()
	defer s.changed.L.Unlock()
	f()
	s.changed.Broadcast()
}

// deadline is the deadline of a Read or a Write.
type deadline struct {
	at    time.Time // zero: never
	timer *time.Timer
}

func (d *deadline) isOver() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// set sets d to a time; when it comes, calls that wait for the stream look again.
func (s *stream) set(d *deadline, at time.Time) {
	s.change(func() {
		if d.timer != nil {
			d.timer.Stop()
		}
		if d.at = at; !at.IsZero() && !d.isOver() {
			d.timer = time.AfterFunc(time.Until(at), func() { s.change(func() {}) })
		}
	})
}

// Conn is a net.Conn between goroutines. Unlike a net.Pipe it buffers bytes, its two directions
// close separately, and closing it resets it if input is unread or comes later, as kernels do (RFC
// 1122, 4.2.2.13).
type Conn struct {
	in, out        *stream
	BeforeDeadline func()
	Gate           func()        // waits while the whole process stands still; nil: it never does
	Late           time.Duration // deadlines pass this much too late, as on a busy machine
}

// Pipe returns the two sides of a connection. First and second are how many unread bytes it holds
// in each direction: those that the first side has written, and those that the second has.
func Pipe(first, second int) (a, b *Conn) {
	var mu sync.Mutex
	up := &stream{changed: sync.NewCond(&mu), size: first}
	down := &stream{changed: sync.NewCond(&mu), size: second}
	return &Conn{in: down, out: up}, &Conn{in: up, out: down}
}

// gate waits while the process stands still. The caller has locked the mutex.
func (c *Conn) gate() {
	if c.Gate != nil {
		c.in.changed.L.Unlock()
		c.Gate()
		c.in.changed.L.Lock()
	}
}

func (c *Conn) Read(p []byte) (n int, err error) {
	s := c.in
	s.changed.L.Lock()
	defer s.changed.L.Unlock()

	for {
		// A process that stands still reads nothing, even if bytes are there.
		c.gate()

		switch {
		case s.broken:
			return 0, io.ErrClosedPipe

		// A deadline that has passed counts before bytes that are there, as with sockets.
		case s.reading.isOver():
			return 0, os.ErrDeadlineExceeded

		// Bytes that were not read before a reset are lost.
		case s.reset:
			return 0, syscall.ECONNRESET

		case len(s.buf) > 0:
			n = copy(p, s.buf)
			if s.buf = s.buf[n:]; len(s.buf) == 0 {
				s.buf = nil // lets the memory go: a test measures it
			}
			s.changed.Broadcast()
			return n, nil

		// The end comes only after all bytes before it.
		case s.ended:
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

func (c *Conn) Write(p []byte) (n int, err error) {
	s := c.out
	s.changed.L.Lock()
	defer s.changed.L.Unlock()

	for {
		// A process that stands still sends nothing.
		c.gate()

		switch {
		case s.ended:
			return n, io.ErrClosedPipe
		case s.writing.isOver():
			return n, os.ErrDeadlineExceeded

		// The other side's socket is closed, so its kernel answers with a reset.
		case s.broken:
			c.in.reset = true
			c.in.changed.Broadcast()
			return n, io.ErrClosedPipe

		// Some of the bytes may fit; the rest waits, as with a kernel's buffer.
		case !s.shut || s.size-len(s.buf) >= s.lump():
			m := min(len(p)-n, s.size-len(s.buf))
			s.buf = append(s.buf, p[n:n+m]...)
			s.sum += m
			s.shut = len(s.buf) == s.size
			n += m
			s.changed.Broadcast()
		}

		if n == len(p) {
			return n, nil
		}
		s.changed.Wait()
	}
}

// WriteString is Write without a copy of text: many clients send the same long one.
func (c *Conn) WriteString(text string) (n int, err error) {
	return c.Write(unsafe.Slice(unsafe.StringData(text), len(text)))
}

func (c *Conn) CloseWrite() error {
	c.out.change(func() { c.out.ended = true })
	return nil
}

func (c *Conn) Close() error {
	// Unread input resets the connection.
	isFirst, unread := false, false
	c.in.change(func() {
		isFirst, unread = !c.in.broken, len(c.in.buf) > 0
		c.in.broken = true
	})
	if isFirst {
		c.out.change(func() { c.out.ended, c.out.reset = true, c.out.reset || unread })
	}

	// No timer is left behind for a connection that is closed.
	c.in.set(&c.in.reading, time.Time{})
	c.out.set(&c.out.writing, time.Time{})
	return nil
}

// isClosed reports whether c was closed.
func (c *Conn) isClosed() (closed bool) {
	c.in.change(func() { closed = c.in.broken })
	return closed
}

// BreakOff resets the connection, as a broken network does.
func (c *Conn) BreakOff() {
	// The reset comes first; otherwise a reader could see a regular end before it.
	c.out.change(func() { c.out.reset = true })
	c.Close()
}

// SetWriteBuffer sets how many unread bytes the other side of c holds.
func (c *Conn) SetWriteBuffer(bytes int) { c.out.change(func() { c.out.size = bytes }) }

// Unread returns how many bytes can be read from c.
func (c *Conn) Unread() (bytes int) {
	c.in.change(func() { bytes = len(c.in.buf) })
	return bytes
}

// sent returns how many bytes were written to c so far.
func (c *Conn) sent() (bytes int) {
	c.out.change(func() { bytes = c.out.sum })
	return bytes
}

// taken returns how many bytes were read from c so far.
func (c *Conn) taken() (bytes int) {
	c.in.change(func() { bytes = c.in.sum - len(c.in.buf) })
	return bytes
}

type addr struct{}

func (addr) Network() string { return "fake" }
func (addr) String() string  { return "fake" }

func (c *Conn) LocalAddr() net.Addr  { return addr{} }
func (c *Conn) RemoteAddr() net.Addr { return addr{} }
func (c *Conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}
func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.BeforeDeadline != nil && time.Until(t) > 0 {
		c.BeforeDeadline()
	}
	c.in.set(&c.in.reading, c.late(t))
	return nil
}
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.set(&c.out.writing, c.late(t))
	return nil
}

// late returns when a deadline passes. A deadline in the past is not late: it ends a call at once.
func (c *Conn) late(t time.Time) time.Time {
	if time.Until(t) <= 0 {
		return t
	}
	return t.Add(c.Late)
}

// wire carries bytes in one direction as networks do: cut and merged in other places, late, and
// perhaps not to the end. Each direction of a connection has its own, and its own goroutine.
type wire struct {
	random *rand.Rand
	late   time.Duration // most that a piece is late
	stall  time.Duration // a pause of the whole wire, once; 0: none
	cut    int           // the connection is reset after so many bytes; 0: never
	piece  int           // most bytes at a time
}

// carry carries bytes from one connection to another until either ends.
func (w wire) carry(from, to *Conn) {
	buf := make([]byte, w.piece)
	for sum := 0; ; {
		// Lines are cut anywhere, and several of them may come at once.
		n, err := from.Read(buf[:1+w.random.IntN(len(buf))])

		// Late bytes delay all that follow, because TCP keeps their order.
		if w.late > 0 {
			wait(Between(w.random, 0, w.late))
		}

		if w.stall > 0 && Chance(w.random, 20) {
			wait(w.stall)
			w.stall = 0
		}

		// The bytes that were read go on before the end does.
		if _, writeErr := to.Write(buf[:n]); writeErr != nil {
			from.BreakOff()
			return
		}

		// A network that breaks a connection off does so for both sides.
		if sum += n; w.cut > 0 && sum >= w.cut {
			from.BreakOff()
			to.BreakOff()
			return
		}

		// An end goes on as an end, and a reset as a reset: the server must distinguish them.
		if err == io.EOF {
			to.CloseWrite()
			return
		}
		if err != nil {
			to.BreakOff()
			return
		}
	}
}
