package protocol

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// Client is a client that knows what to expect. What does not come as it should fails the test.
type Client struct {
	T    testing.TB
	Conn world.HalfConn
	R    *bufio.Reader // of Conn
	gone bool          // it has ended the connection
}

// NewClient returns a client with a connection that has been made.
func NewClient(t testing.TB, conn net.Conn) *Client {
	return &Client{T: t, Conn: conn.(world.HalfConn), R: bufio.NewReader(conn)}
}

// Close ends the connection, even if bytes are unread.
func (c *Client) Close() {
	c.gone = true
	c.Conn.Close()
}

// OverTLS goes on over TLS, with any server.
func (c *Client) OverTLS() *Client {
	c.Conn = tls.Client(c.Conn, &tls.Config{InsecureSkipVerify: true})
	c.R = bufio.NewReader(c.Conn)
	return c
}

// BreakOff resets the connection, as a broken network does.
func (c *Client) BreakOff() {
	c.gone = true
	c.Conn.(*world.Conn).BreakOff()
}

// Send sends text, all of it.
func (c *Client) Send(text string) {
	c.T.Helper()
	if _, err := io.WriteString(c.Conn, text); err != nil {
		c.T.Errorf("sending %.40q: %v", text, err)
	}
}

// Post sends text, and waits until nobody has anything to do about it any more.
func (c *Client) Post(text string) {
	c.T.Helper()
	c.Send(text)
	synctest.Wait()
}

// SendSome sends text as far as possible.
func (c *Client) SendSome(text string) { io.WriteString(c.Conn, text) }

// SendAll sends text as far as possible, and closes the sending side.
func (c *Client) SendAll(text string) {
	c.SendSome(text)
	c.Conn.CloseWrite()
}

// Ask sends a request, and wants these lines.
func (c *Client) Ask(request string, lines ...string) {
	c.T.Helper()
	c.Send(request + "\n")
	c.Want(lines...)
}

// Read returns the next line.
func (c *Client) Read() string {
	c.T.Helper()
	line, err := c.R.ReadString('\n')
	if err != nil {
		c.T.Fatalf("reading: %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// ReadList returns the lines before the next OK.
func (c *Client) ReadList() (lines []string) {
	for line := c.Read(); !strings.HasPrefix(line, ":OK"); line = c.Read() {
		lines = append(lines, line)
	}
	return lines
}

// WantRest wants exactly this, and then the end.
func (c *Client) WantRest(want string) {
	c.T.Helper()
	is.Equal(c.T, "all that came", c.ReadAll(), want)
}

// WantNothing wants no bytes to come, while the server waits for something else.
func (c *Client) WantNothing() {
	c.T.Helper()
	synctest.Wait()
	is.Equal(c.T, "bytes that came", c.R.Buffered()+c.Conn.(*world.Conn).Unread(), 0)
}

// ReadAll returns everything up to the end.
func (c *Client) ReadAll() string {
	c.T.Helper()
	all, err := io.ReadAll(c.R)
	if err != nil {
		c.T.Errorf("reading: %v", err)
	}
	return string(all)
}

// Want wants these to be the next lines.
func (c *Client) Want(lines ...string) {
	c.T.Helper()
	for _, want := range lines {
		if got := c.Read(); got != want {
			c.T.Fatalf("got %.300q, want %.300q", got, want)
		}
	}
}

// Stat returns one of the numbers in Stats.
func (c *Client) Stat(name string) int {
	c.T.Helper()
	c.Send("Stats\nPing:stats\n")

	value := -1
	for line := c.Read(); line != ":PONG stats"; line = c.Read() {
		if text, ok := strings.CutPrefix(line, ": "+name+" "); ok {
			value, _ = strconv.Atoi(text)
		}
	}

	if value < 0 {
		c.T.Errorf("Stats does not say %q", name)
	}
	return value
}

// WantStat wants Stats to show this number.
func (c *Client) WantStat(name string, want int) {
	c.T.Helper()
	is.Equal(c.T, name, c.Stat(name), want)
}

// Count returns how many lines with prefix come before a PONG.
func (c *Client) Count(prefix string) (n int) {
	c.T.Helper()
	for line := c.Read(); !strings.HasPrefix(line, ":PONG"); line = c.Read() {
		if !strings.HasPrefix(line, prefix) {
			c.T.Fatalf("got %.60q, want a line that starts with %q", line, prefix)
		}
		n++
	}
	return n
}

// WantClosed wants the end.
func (c *Client) WantClosed() {
	c.T.Helper()
	if b, err := c.R.ReadByte(); err == nil {
		c.T.Errorf("got %q, want the end", b)
	} else if err != io.EOF && !errors.Is(err, io.ErrClosedPipe) {
		c.T.Errorf("got %v, want the end", err)
	}
}

// HangUp ends our side, and wants the server to end its own.
func (c *Client) HangUp() {
	c.T.Helper()
	c.Conn.CloseWrite()
	c.WantClosed()
	c.Close()
}

// WantAllClosed wants the end of all connections.
func WantAllClosed(clients ...*Client) {
	for _, c := range clients {
		c.T.Helper()
		c.WantClosed()
	}
}
