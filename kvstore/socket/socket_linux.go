//go:build amd64 || arm64

package socket

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// tcpInq is TCP_INQ (linux/tcp.h, since Linux 4.18): with what is read comes a message that says how
// many bytes are left, and 1 where only the end of the connection is.
const tcpInq = 36

// eachTold is Each as long as conn tells whether there is more, and Read would wait for no deadline.
// It returns whether took wants more.
func eachTold(conn net.Conn, room func() []byte, took func(n int, err error) bool) (more bool) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return true
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}

	// An older kernel refuses it.
	control := raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpInq, 1)
	})
	if control != nil || err != nil {
		return true
	}

	// raw.Read calls this at once, and again after each false when something new has come. What
	// comes between two calls of raw.Read would not be new to the second: so there is one.
	more = true
	var r reading
	raw.Read(func(fd uintptr) (done bool) {
		for left := true; left && more; {
			var n int
			n, left, err = r.read(fd, room())

			switch err {
			case syscall.EAGAIN:
				return false
			case nil, io.EOF:
			default:
				err = &net.OpError{Op: "read", Net: "tcp", Source: conn.LocalAddr(),
					Addr: conn.RemoteAddr(), Err: os.NewSyscallError("read", err)}
			}
			more = took(n, err)
		}
		return !more
	})
	return more
}

// reading is the memory that recvmsg needs beside the buffer.
type reading struct {
	header  syscall.Msghdr
	vector  syscall.Iovec
	message [32]byte // room for one message with an int32
}

// read reads into b what has come, without waiting, and tells whether there is more.
func (r *reading) read(fd uintptr, b []byte) (n int, left bool, err error) {
	// recvmsg changes the header, so it is filled in each time.
	r.vector.Base = &b[0]
	r.vector.SetLen(len(b))
	r.header = syscall.Msghdr{Iov: &r.vector, Iovlen: 1, Control: &r.message[0]}
	r.header.SetControllen(len(r.message))

	// It does not wait, so the scheduler need not know of the call.
	got, _, errno := syscall.RawSyscall(syscall.SYS_RECVMSG, fd,
		uintptr(unsafe.Pointer(&r.header)), 0)
	switch {
	case errno != 0:
		return 0, true, errno
	case got == 0:
		return 0, true, io.EOF
	case int(r.header.Controllen) < syscall.CmsgLen(4): // it does not say
		return int(got), true, nil
	}

	// No other message was asked for.
	return int(got), binary.NativeEndian.Uint32(r.message[syscall.CmsgLen(0):]) > 0, nil
}
