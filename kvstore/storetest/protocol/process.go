package protocol

import (
	"bufio"
	"bytes"
	"cmp"
	"io"
	"net"
	"os"
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
			if !regexp.MustCompile(`"(nc [0-9a-z.:]+ \d+|kvserver help TLS)"`).MatchString(line) {
				t.Errorf("the log does not say what to try: %s", line)
			}
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

// Outputs runs a command to its end, and returns what it prints, unless that goes elsewhere, and
// its exit code.
func Outputs(cmd *exec.Cmd) (out, errs string, code int) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = cmp.Or(cmd.Stdout, io.Writer(&stdout)), &stderr
	cmd.Run()
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

// Prints runs the server as a process that reads input, and wants it to print this, and to succeed
// or fail as good says.
func (p Program) Prints(t *testing.T, input, want string, good bool, args ...string) {
	t.Helper()
	cmd := p(args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); !strings.Contains(string(out), want) || (err == nil) != good {
		t.Errorf("%q: %v, it prints %q, want %q", args, err, out, want)
	}
}

// Stop stops a server by a signal. It must end well, and the rest of its log must have these
// texts.
func Stop(t testing.TB, cmd *exec.Cmd, log io.Reader, sig os.Signal, texts ...string) {
	t.Helper()
	cmd.Process.Signal(sig)
	rest, _ := io.ReadAll(log)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %v, the log is %s", sig, err, rest)
	}
	is.In(t, "the log", string(rest), texts...)
}

// Await waits until isTrue returns true, where that takes real time: another process or the kernel
// does it.
func Await(t *testing.T, what string, isTrue func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !isTrue(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after a minute it still waits for %s", what)
		}
	}
}
