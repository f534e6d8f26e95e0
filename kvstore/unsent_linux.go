package kvstore

import (
	"syscall"
	"unsafe"
)

// Unsent returns how many bytes that were written to a TCP connection its other side has not
// acknowledged (SIOCOUTQ, tcp(7)), where the system tells. It stands here because the server's
// own files are the same for all systems.
func Unsent(conn any) (bytes int, ok bool) {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return 0, false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, false
	}
	var n int32
	errno := syscall.Errno(0)
	err = raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ,
			uintptr(unsafe.Pointer(&n)))
	})
	return int(n), err == nil && errno == 0
}
