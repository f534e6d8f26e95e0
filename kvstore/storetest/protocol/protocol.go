// Package protocol has the conversations that anybody may have with a server of lists: what is
// sent, and what must come back, to the last byte. It needs nothing of the server but a way to
// connect, or to start it on a store, or the command that starts it.
//
//	client.go         a client that knows what to expect
//	conversations.go  every request, every mistake and its hint, ends of lines, other protocols
//	model.go          the answer to any line
//	fuzz.go           any bytes, which the model answers as well
//	lines.go          lines in pieces, long lines and slow ones, and lines before a half-close
//	lists.go          keys that expire, Takes that wait, a Dump beside writers
//	readers.go        clients that do not read, and those that read steadily
//	stores.go         stores that are slow, full or plain, and what a server makes of them
//	commits.go        what waits for a Commit, and what shares one
//	memory.go         a server whose memory is full
//	readme.go         the sessions that the README shows
//	process.go        a server that is a process
//	killed.go         one that is killed again and again
//
// Time is that of a synctest bubble, except where the server is a process or has real sockets.
package protocol

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest/world"
)

// MaxLine is the longest line in bytes that a server takes here (-max-line): short enough to be
// tried, and longer than a client's first buffers.
const MaxLine = 20_000

const kilo = 1000 // bytes

// Times and numbers that the README promises.
const (
	lineTime  = 30 * time.Second // from a line's first byte to its end
	slowAfter = time.Second      // a client that reads nothing may be slow then
	seenSlow  = slowAfter * 6 / 5
	kept      = 500         // replies, for a slow client
	drainTime = time.Second // for a client to take its last replies

	// A server looks this often for lines that are late, and for clients that wait and have gone.
	lookTime = time.Second

	// Keys whose time is over are removed this often.
	expireTime = 50 * time.Millisecond
)

// Start starts an empty server on a network, in the bubble of a test. The test's end ends it. What
// waits for one client is to be 4 MiB at most, so that tests of slow readers are fast.
type Start func(t *testing.T) *Net

// inBubble runs test in fake time with a server of its own.
func (start Start) inBubble(t *testing.T, test func(t *testing.T, n *Net)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := start(t)
		test(t, n)
		n.HangUp()
	})
}

// Net is the network of one server, and its clients.
type Net struct {
	connect func(t testing.TB) world.HalfConn
	mu      sync.Mutex
	clients []*Client // all that have dialed; guarded by mu
}

// NewNet returns a network on which connect makes a connection to the server.
func NewNet(connect func(t testing.TB) world.HalfConn) *Net { return &Net{connect: connect} }

// Dial connects to the server.
func (n *Net) Dial(t testing.TB) *Client {
	c := NewClient(t, n.connect(t))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.clients = append(n.clients, c)
	return c
}

// DialAck connects in Ack mode.
func (n *Net) DialAck(t testing.TB) *Client {
	c := n.Dial(t)
	c.Ask("Ack", ":OK 0")
	return c
}

// DialMany connects so many clients, one after the other.
func (n *Net) DialMany(t testing.TB, count int, begin func(i int, c *Client)) []*Client {
	clients := make([]*Client, count)
	for i := range clients {
		clients[i] = n.Dial(t)
		begin(i, clients[i])
	}
	return clients
}

// HangUp ends the connections that are left. Their clients must have read all that they were sent.
func (n *Net) HangUp() {
	for _, c := range n.clients {
		if !c.gone {
			c.HangUp()
		}
	}
}

// run has the server run requests that are not answered.
func (n *Net) run(t testing.TB, requests string) {
	c := n.Dial(t)
	c.Send(requests)
	c.Ask("Ping", ":PONG")
	c.HangUp()
}
