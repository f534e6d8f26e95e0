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

// Pipe returns the two sides of a connection, which hold so many bytes of what the first
// and of what the second has written, and the other has not read.
func Pipe(first, second int) (a, b *Conn) {
	up, down := newStream(first), newStream(second)
	return newConn(down, up), newConn(up, down)
}

// SetWriteBuffer has c's other side hold so many bytes of what c has written.
func (c *Conn) SetWriteBuffer(bytes int) {
	c.out.change(func() bool {
		c.out.size = bytes
		return true
	})
}

// Unread returns how many bytes wait to be read from c.
func (c *Conn) Unread() (bytes int) {
	c.in.change(func() bool {
		bytes = len(c.in.buf)
		return false
	})
	return bytes
}

type addr struct{}

func (addr) Network() string { return "fake" }
func (addr) String() string  { return "fake" }

// StreamSize is what one direction of a fake connection holds, unless it is told
// otherwise: a little, so that a reader who stops is felt.
const StreamSize = 64 << 10

// stream is one direction of a fake connection.
type stream struct {
	mu   sync.Mutex
	buf  []byte
	size int // bytes that it holds
	// it was full, and takes nothing before a lump of it is free: so do receive windows
	shut    bool
	ended   bool          // the writer closed
	broken  bool          // the reader is gone
	reset   bool          // the writer broke it off: what was not read is lost
	changed chan struct{} // closed, and made anew, when any of this changes
}

func newStream(size int) *stream { return &stream{size: size, changed: make(chan struct{})} }

// lump is what must be free of a stream that was full: a sixteenth where it is large,
// as in Linux.
func (s *stream) lump() int { return max(s.size/16, min(s.size/2, 32<<10)) }

// change runs f on s, with nobody else there, and wakes who waits. It returns
// the channel that tells of the next change.
func (s *stream) change(f func() bool) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f() {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	return s.changed
}

// Conn is a net.Conn between goroutines. Unlike net.Pipe it has room for
// some bytes, its halves close one by one, and closing it with input that was not read, or that
// comes later, resets it, as kernels do (RFC 1122, 4.2.2.13).
type Conn struct {
	in, out          *stream
	reading, writing deadline
	closed           chan struct{}
	closeOnce        sync.Once
	BeforeDeadline   func()
	Gate             func()        // waits while the whole process stands still; nil: it never does
	Late             time.Duration // by which deadlines pass too late, as on a busy machine
}

func newConn(in, out *stream) *Conn {
	return &Conn{in: in, out: out, closed: make(chan struct{}),
		reading: deadline{ch: make(chan struct{})}, writing: deadline{ch: make(chan struct{})}}
}

func (c *Conn) Read(p []byte) (n int, err error) {
	for {
		// A process that stands still reads nothing, even where bytes are there.
		if c.Gate != nil {
			c.Gate()
		}

		// A deadline that has passed comes before bytes that are there, as with sockets.
		select {
		case <-c.closed:
			return 0, io.ErrClosedPipe
		case <-c.reading.passed():
			return 0, os.ErrDeadlineExceeded
		default:
		}

		changed := c.in.change(func() bool {
			if c.in.reset {
				// What was not read by now is lost with a reset.
				err = syscall.ECONNRESET
				return false
			}
			n = copy(p, c.in.buf)
			if c.in.buf = c.in.buf[n:]; len(c.in.buf) == 0 {
				c.in.buf = nil // a test measures memory
			}

			// The end comes only when all before it was read.
			if n == 0 && c.in.ended {
				err = io.EOF
			}
			return n > 0
		})

		// Nothing was there: wait until that may be otherwise.
		if n > 0 || err != nil {
			return n, err
		}
		select {
		case <-changed:
		case <-c.closed:
		case <-c.reading.passed():
		}
	}
}

func (c *Conn) Write(p []byte) (n int, err error) {
	for {
		// A process that stands still sends nothing.
		if c.Gate != nil {
			c.Gate()
		}

		select {
		case <-c.closed:
			return n, io.ErrClosedPipe
		case <-c.writing.passed():
			return n, os.ErrDeadlineExceeded
		default:
		}

		// A window that was full opens when a lump of it is free.
		isBroken := false
		changed := c.out.change(func() bool {
			if isBroken = c.out.broken; isBroken || c.out.ended {
				err = io.ErrClosedPipe
				return false
			}
			if c.out.shut && c.out.size-len(c.out.buf) < c.out.lump() {
				return false
			}

			// Some of the bytes may fit, and the rest waits, as in a kernel's buffer.
			m := min(len(p)-n, c.out.size-len(c.out.buf))
			c.out.buf = append(c.out.buf, p[n:n+m]...)
			c.out.shut = len(c.out.buf) == c.out.size
			n += m
			return m > 0
		})

		// Nobody has the other side's socket any more, so its kernel answers with a reset.
		if isBroken {
			c.in.change(func() bool {
				c.in.reset = true
				return true
			})
		}

		if n == len(p) || err != nil {
			return n, err
		}
		select {
		case <-changed:
		case <-c.closed:
		case <-c.writing.passed():
		}
	}
}

func (c *Conn) CloseWrite() error {
	c.out.change(func() bool {
		c.out.ended = true
		return true
	})
	return nil
}

func (c *Conn) Close() error {
	c.closeOnce.Do(func() {
		close(c.closed)

		// What was not read resets the connection.
		unread := false
		c.in.change(func() bool {
			unread = len(c.in.buf) > 0
			c.in.broken = true
			return true
		})
		c.out.change(func() bool {
			c.out.ended = true
			c.out.reset = c.out.reset || unread
			return true
		})

		// No timer stays behind for a connection that has gone.
		c.reading.set(time.Time{})
		c.writing.set(time.Time{})
	})
	return nil
}

// Closed is closed with c.
func (c *Conn) Closed() <-chan struct{} { return c.closed }

// BreakOff resets the connection, as a network does.
func (c *Conn) BreakOff() {
	// The reset comes first, or a reader could see a good end before it.
	c.out.change(func() bool {
		c.out.reset = true
		return true
	})
	c.Close()
}

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
	c.reading.set(c.late(t))
	return nil
}
func (c *Conn) SetWriteDeadline(t time.Time) error { c.writing.set(c.late(t)); return nil }

// late returns when a deadline passes. One that has passed is how a Read or Write is ended at once.
func (c *Conn) late(t time.Time) time.Time {
	if time.Until(t) <= 0 {
		return t
	}
	return t.Add(c.Late)
}

// deadline is a channel that is closed when a time has passed. Another time has another channel,
// unless the old one is open still.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer // that closes ch; nil: none does
	ch    chan struct{}
}

func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ch
}

// set sets the time; the zero time never passes.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}

	// A closed channel tells of the old time; those who wait for the new one need another.
	if isClosed(d.ch) {
		d.ch = make(chan struct{})
	}

	ch := d.ch
	switch wait := time.Until(t); {
	case t.IsZero():
	case wait <= 0:
		close(ch)

	// One that could not be stopped in time has nothing to close any more.
	default:
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.timer == timer {
				d.timer = nil
				close(ch)
			}
		})
		d.timer = timer
	}
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
