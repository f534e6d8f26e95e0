package socket

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// pair returns the two ends of a TCP connection.
func pair(t *testing.T) (near, far *net.TCPConn) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()

	other, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); other.Close() })
	return conn.(*net.TCPConn), other.(*net.TCPConn)
}

// readAll reads to the end in pieces of so many bytes.
func readAll(conn net.Conn, size int) (all []byte, err error) {
	room := make([]byte, size)
	Each(conn, func() []byte { return room }, func(n int, failed error) bool {
		all, err = append(all, room[:n]...), failed
		return err == nil
	})
	return all, err
}

// Ensure that all bytes come, and then the end: also where both had come before the first read, and
// no news of the end follows.
func TestEachReadsToTheEnd(t *testing.T) {
	text := bytes.Repeat([]byte("0123456789"), 1000)
	for _, size := range []int{7, 100, len(text), 2 * len(text)} {
		for range 50 {
			near, far := pair(t)
			far.Write(text)
			far.CloseWrite()
			near.SetReadDeadline(time.Now().Add(time.Minute))
			if all, err := readAll(near, size); err != io.EOF || !bytes.Equal(all, text) {
				t.Fatalf("in pieces of %d: %d bytes of %d, then %v", size, len(all), len(text), err)
			}
			near.Close()
			far.Close()
		}
	}
}

// Ensure that what comes while nobody reads is not missed: each request is sent when the reply to
// the last has come, or before.
func TestEachWaitsForRequests(t *testing.T) {
	near, far := pair(t)
	near.SetReadDeadline(time.Now().Add(time.Minute))
	const requests = 20_000
	go func() {
		reply := make([]byte, 1)
		for i := range requests {
			far.Write([]byte("?"))
			if i%10 < 7 {
				io.ReadFull(far, reply)
			}
		}
		far.CloseWrite()
	}()

	room, came := make([]byte, 10), 0
	var end error
	Each(near, func() []byte { return room }, func(n int, err error) bool {
		near.Write(room[:n])
		came, end = came+n, err
		return err == nil
	})
	if came != requests || end != io.EOF {
		t.Errorf("%d requests of %d, then %v", came, requests, end)
	}
}

// Ensure that errors are Read's, that a deadline is not the end, and that a pipe is read, too.
func TestEachFails(t *testing.T) {
	near, far := pair(t)
	near.SetReadDeadline(time.Now().Add(-time.Second))
	calls := 0
	Each(near, func() []byte { return make([]byte, 10) }, func(n int, err error) bool {
		switch calls++; {
		case calls == 1 && errors.Is(err, os.ErrDeadlineExceeded):
			near.SetReadDeadline(time.Time{})
			far.Write([]byte("hello"))
		case calls == 2 && n == 5 && err == nil:
			far.SetLinger(0)
			far.Close()
		case calls == 3 && errors.Is(err, syscall.ECONNRESET):
			return false
		default:
			t.Errorf("call %d: %d bytes, %v", calls, n, err)
			return false
		}
		return true
	})

	near.Close()
	if _, err := readAll(near, 10); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed connection: %v", err)
	}

	pipe, other := net.Pipe()
	go func() { other.Write([]byte("hello")); other.Close() }()
	if all, err := readAll(pipe, 2); string(all) != "hello" || err != io.EOF {
		t.Errorf("a pipe: %q, %v", all, err)
	}
}

// Ensure that Close and a deadline end a wait.
func TestEachStopsWaiting(t *testing.T) {
	for name, stop := range map[string]func(*net.TCPConn) error{
		"Close":           (*net.TCPConn).Close,
		"SetReadDeadline": func(c *net.TCPConn) error { return c.SetReadDeadline(time.Now()) },
	} {
		near, far := pair(t)
		far.Write([]byte("x"))
		var end error
		Each(near, func() []byte { return make([]byte, 10) }, func(n int, err error) bool {
			if n > 0 {
				go stop(near) // the next read waits by then, or does so soon
			}
			end = err
			return err == nil
		})
		if !errors.Is(end, net.ErrClosed) && !errors.Is(end, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", name, end)
		}
	}
}
