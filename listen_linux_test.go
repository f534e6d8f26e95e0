package main

import (
	"net"
	"syscall"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
)

// Ensure that the kernel ends a connection whose client has vanished within 35 s: when keep-alive
// has had no answer so many times.
func TestListenNoticesVanishedClients(t *testing.T) {
	listeners, err := listen("127.0.0.1:0")
	is.OK(t, err)
	defer closeAll(listeners)
	client, err := net.Dial("tcp", listeners[0].Addr().String())
	is.OK(t, err)
	defer client.Close()
	conn, err := listeners[0].Accept()
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
	after := option(tcp, syscall.TCP_KEEPIDLE) + option(tcp, syscall.TCP_KEEPCNT)*option(tcp, syscall.TCP_KEEPINTVL)
	is.Between(t, "time until it ends", time.Duration(after)*time.Second, 0, 35*time.Second)
}
