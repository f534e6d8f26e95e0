package protocol

import (
	"bufio"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
)

// Program returns the command that runs the server's program with these arguments.
type Program func(args ...string) *exec.Cmd

// Start starts the server, and returns its address, once it listens, and the rest of its log.
func (p Program) Start(t testing.TB, args ...string) (cmd *exec.Cmd, addr string, log *bufio.Reader) {
	t.Helper()
	cmd = p(args...)
	pipe, err := cmd.StderrPipe()
	is.OK(t, err)
	is.OK(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	log = bufio.NewReader(pipe)
	return cmd, ListeningAddr(t, log), log
}

// ListeningAddr reads a server's log up to the line that says where it listens.
func ListeningAddr(t testing.TB, log *bufio.Reader) (addr string) {
	t.Helper()
	for {
		line, err := log.ReadString('\n')
		if err != nil {
			t.Fatalf("the server ended: %q, %v", line, err)
		}
		if m := regexp.MustCompile(
			`"?msg"?[=:]"?listening"?[ ,]"?addr"?[=:]"?([0-9.:\[\]]+)`).FindStringSubmatch(
			line); m != nil {
			return m[1]
		}
	}
}

// SignalTo sends a signal that has no name on Windows.
func SignalTo(t *testing.T, cmd *exec.Cmd, name string) {
	if err := exec.Command("kill", "-"+name, strconv.Itoa(cmd.Process.Pid)).Run(); err != nil {
		t.Errorf("kill -%s: %v", name, err)
	}
}

// DialTCP connects to a real port or to a unix socket. Its deadline only ends a test that has
// failed already.
func DialTCP(t testing.TB, addr string) *Client {
	t.Helper()
	network := "tcp"
	if path, isUnix := strings.CutPrefix(addr, "unix:"); isUnix {
		network, addr = "unix", path
	}
	conn, err := net.Dial(network, addr)
	is.OK(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(5 * time.Minute))
	return NewClient(t, conn)
}
