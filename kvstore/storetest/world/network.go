package world

import (
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Listener is a network of one server: what it listens on.
type Listener struct {
	Failures int // that Accept returns first

	conns  chan net.Conn
	closed chan struct{}
}

// NewListener returns one that nobody has closed.
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

// Closed is closed with l.
func (l *Listener) Closed() <-chan struct{} { return l.closed }

func (l *Listener) Accept() (net.Conn, error) {
	if l.Failures > 0 {
		// A server that has no descriptor left must try again, and not end.
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

// StreamSize is what one direction of a fake connection holds, unless it is told
// otherwise: a little, so that a reader who stops is felt.
const StreamSize = 64 << 10

// stream is one direction of a fake connection. One mutex guards both.
type stream struct {
	changed          *sync.Cond // by anybody; its lock is the connection's
	buf              []byte
	size             int // bytes that it holds
	sum              int // bytes that were written
	reading, writing deadline

	// It was full, and takes nothing before a lump of it is free: so do receive windows.
	shut   bool
	ended  bool // the writer closed
	broken bool // the reader is gone
	reset  bool // the writer broke it off: what was not read is lost
}

// lump is what must be free of a stream that was full: a sixteenth where it is large,
// as in Linux.
func (s *stream) lump() int { return max(s.size/16, min(s.size/2, 32<<10)) }

// change runs f, with nobody else at the connection, and wakes who waits for s.
func (s *stream) change(f func()) {
	s.changed.L.Lock()
	defer s.changed.L.Unlock()
	f()
	s.changed.Broadcast()
}

// deadline is a time that passes.
type deadline struct {
	at    time.Time // zero: never
	timer *time.Timer
}

func (d *deadline) isOver() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// set sets the time, at which the stream's waiters look again.
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

// Conn is a net.Conn between goroutines. Unlike net.Pipe it has room for
// some bytes, its halves close one by one, and closing it with input that was not read, or that
// comes later, resets it, as kernels do (RFC 1122, 4.2.2.13).
type Conn struct {
	in, out        *stream
	BeforeDeadline func()
	Gate           func()        // waits while the whole process stands still; nil: it never does
	Late           time.Duration // by which deadlines pass too late, as on a busy machine
}

// Pipe returns the two sides of a connection, which hold so many bytes of what the first
// and of what the second has written, and the other has not read.
func Pipe(first, second int) (a, b *Conn) {
	var mu sync.Mutex
	up := &stream{changed: sync.NewCond(&mu), size: first}
	down := &stream{changed: sync.NewCond(&mu), size: second}
	return &Conn{in: down, out: up}, &Conn{in: up, out: down}
}

// gate waits while the process stands still. The caller has the lock.
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
		// A process that stands still reads nothing, even where bytes are there.
		c.gate()

		switch {
		case s.broken:
			return 0, io.ErrClosedPipe

		// A deadline that has passed comes before bytes that are there, as with sockets.
		case s.reading.isOver():
			return 0, os.ErrDeadlineExceeded

		// What was not read by now is lost with a reset.
		case s.reset:
			return 0, syscall.ECONNRESET

		case len(s.buf) > 0:
			n = copy(p, s.buf)
			if s.buf = s.buf[n:]; len(s.buf) == 0 {
				s.buf = nil // a test measures memory
			}
			s.changed.Broadcast()
			return n, nil

		// The end comes only when all before it was read.
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

		// Nobody has the other side's socket any more, so its kernel answers with a reset.
		case s.broken:
			c.in.reset = true
			c.in.changed.Broadcast()
			return n, io.ErrClosedPipe

		// Some of the bytes may fit, and the rest waits, as in a kernel's buffer.
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

func (c *Conn) CloseWrite() error {
	c.out.change(func() { c.out.ended = true })
	return nil
}

func (c *Conn) Close() error {
	// What was not read resets the connection.
	isFirst, unread := false, false
	c.in.change(func() {
		isFirst, unread = !c.in.broken, len(c.in.buf) > 0
		c.in.broken = true
	})
	if isFirst {
		c.out.change(func() { c.out.ended, c.out.reset = true, c.out.reset || unread })
	}

	// No timer stays behind for a connection that has gone.
	c.in.set(&c.in.reading, time.Time{})
	c.out.set(&c.out.writing, time.Time{})
	return nil
}

// isClosed tells whether c was closed.
func (c *Conn) isClosed() (closed bool) {
	c.in.change(func() { closed = c.in.broken })
	return closed
}

// BreakOff resets the connection, as a network does.
func (c *Conn) BreakOff() {
	// The reset comes first, or a reader could see a good end before it.
	c.out.change(func() { c.out.reset = true })
	c.Close()
}

// SetWriteBuffer has c's other side hold so many bytes of what c has written.
func (c *Conn) SetWriteBuffer(bytes int) { c.out.change(func() { c.out.size = bytes }) }

// Unread returns how many bytes wait to be read from c.
func (c *Conn) Unread() (bytes int) {
	c.in.change(func() { bytes = len(c.in.buf) })
	return bytes
}

// sent returns how many bytes were written to c.
func (c *Conn) sent() (bytes int) {
	c.out.change(func() { bytes = c.out.sum })
	return bytes
}

// taken returns how many bytes were read from c.
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

// late returns when a deadline passes. One that has passed is how a Read or Write is ended at once.
func (c *Conn) late(t time.Time) time.Time {
	if time.Until(t) <= 0 {
		return t
	}
	return t.Add(c.Late)
}

// wire carries bytes one way, as networks do: cut and merged anew, late, and perhaps
// not to the end. One goroutine for each direction of a connection.
type wire struct {
	random *rand.Rand
	late   time.Duration // at most, of a piece
	stall  time.Duration // of the whole wire, once; 0: none
	cut    int           // bytes after which the connection is reset; 0: none
	piece  int           // bytes at most
}

// carry carries what comes from one connection to another.
func (w wire) carry(from, to *Conn) {
	buf := make([]byte, w.piece)
	for sum := 0; ; {
		// Lines are cut anywhere, and several of them come at once.
		n, err := from.Read(buf[:1+w.random.IntN(len(buf))])

		// Late bytes hold up all that follow, as TCP keeps their order.
		if w.late > 0 {
			Wait(Between(w.random, 0, w.late))
		}

		if w.stall > 0 && Chance(w.random, 20) {
			Wait(w.stall)
			w.stall = 0
		}

		// What was read goes on, and the end of it, too.
		if _, writeErr := to.Write(buf[:n]); writeErr != nil {
			from.BreakOff()
			return
		}

		// A network that breaks off a connection does so for both sides.
		if sum += n; w.cut > 0 && sum >= w.cut {
			from.BreakOff()
			to.BreakOff()
			return
		}

		// An end goes on as an end, and a reset as a reset: the server must tell them apart.
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
