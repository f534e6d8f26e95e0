package protocol

import (
	"net"
	"syscall"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
)

// VanishedClientsAreNoticed ensures that the kernel ends a connection of listener's whose client
// has vanished within 35 s: when keep-alive has had no answer so many times.
func VanishedClientsAreNoticed(t *testing.T, listener net.Listener) {
	client, err := net.Dial("tcp", listener.Addr().String())
	is.OK(t, err)
	defer client.Close()
	conn, err := listener.Accept()
	is.OK(t, err)
	defer conn.Close()

	raw, err := conn.(*net.TCPConn).SyscallConn()
	is.OK(t, err)
	option := func(level, name int) (value int) {
		raw.Control(func(fd uintptr) { value, err = syscall.GetsockoptInt(int(fd), level, name) })
		is.OK(t, err)
		return value
	}

	const tcp = syscall.IPPROTO_TCP
	is.Equal(t, "keep-alive", option(syscall.SOL_SOCKET, syscall.SO_KEEPALIVE), 1)
	seconds := option(tcp, syscall.TCP_KEEPIDLE) +
		option(tcp, syscall.TCP_KEEPCNT)*option(tcp, syscall.TCP_KEEPINTVL)
	is.Between(t, "time until it ends", time.Duration(seconds)*time.Second, 0, 35*time.Second)
}
