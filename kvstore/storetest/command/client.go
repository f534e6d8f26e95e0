package command

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// ClientLeavesTheLine ensures that a -c that gives up or is killed while its Take waits takes no
// value.
func ClientLeavesTheLine(t *testing.T, program protocol.Program, serve Serve) {
	t.Parallel()
	addr := serve(t)
	watch := protocol.DialTCP(t, addr)
	command := func(timeout time.Duration) *exec.Cmd {
		return program("-addr", addr, "-timeout", timeout.String(), "-c", "Take:k:3600")
	}

	// On a busy machine it may give up before its Take has arrived: then it gets more time.
	for timeout := 100 * time.Millisecond; watch.Stat("take_requests_total") == 0; timeout *= 2 {
		command(timeout).Run()
	}

	takes, cmd := watch.Stat("take_requests_total"), command(time.Hour)
	is.OK(t, cmd.Start())
	protocol.Await(t, "its Take", func() bool { return watch.Stat("take_requests_total") > takes })
	cmd.Process.Kill()
	cmd.Wait()

	protocol.Await(t, "the ends of both", func() bool { return watch.Stat("clients") == 1 })
	watch.Ask("Put:k:v\nCount:k\nPing", ":OK 1", ":PONG")
	watch.HangUp()
}

// ClientOutput ensures that -out writes the answers into a file, byte for byte, leaves it as it is
// if no server answers, and reports a file that it cannot write; that -c fails if the server
// refuses a request; and that only a user who types requests is told where -c is connected.
func ClientOutput(t *testing.T, program protocol.Program, serve Serve) {
	t.Parallel()
	addr := serve(t)
	a := protocol.DialTCP(t, addr)
	a.Ask("Put:k:\xff\xfe\r\r\nPing", ":PONG")
	a.HangUp()

	file := filepath.Join(t.TempDir(), "Dump")
	for range 2 { // the second time beside a file with the request's name
		cmd := program("-addr", addr, "-c", "-out", file, "Dump")
		cmd.Dir = filepath.Dir(file)
		out, err := cmd.CombinedOutput()
		is.OK(t, err)
		is.Equal(t, "what it prints", string(out), "")
	}
	program.Prints(t, "", "cannot connect", false, "-addr", "1", "-c", "-out", file, "Dump") // it stays
	text, _ := os.ReadFile(file)
	is.Equal(t, "what the file has", string(text), "Put:k:\xff\xfe\r\r\n")

	out, errs, code := protocol.Outputs(program("-addr", addr, "-c", "Put:k", "Ping"))
	is.Equal(t, "what it says", out+errs, ":PONG\n"+
		"line 1: Put needs a key and a value, as in Put:key:value; got \"Put:k\"\n")
	is.Equal(t, "its exit code", code, exitFailure)

	// This device seems to be a terminal.
	if terminal, err := os.Open("/dev/zero"); err == nil {
		defer terminal.Close()
		cmd := program("-addr", addr, "-c", "Set:k:v", "Get:k")
		cmd.Stdin = terminal
		out, errs, _ := protocol.Outputs(cmd)
		is.Equal(t, "what it says of arguments", out+errs, "k:v\n")

		cmd = program("-addr", addr, "-c")
		cmd.Stdin = terminal
		pipe, _ := cmd.StderrPipe()
		is.OK(t, cmd.Start())
		line, _ := bufio.NewReader(pipe).ReadString('\n')
		is.Equal(t, "what it says to a user", line, "connected to "+addr+"; Help lists the requests, Ctrl-D ends\n")
		cmd.Process.Kill()
		cmd.Wait()
	}

	for name, want := range map[string]string{t.TempDir(): "cannot write the answers: open ",
		"/dev/full": "cannot write the answers: write "} {
		if name == "/dev/full" && runtime.GOOS != "linux" {
			continue
		}
		program.Prints(t, "", want, false, "-addr", addr, "-c", "-out", name, "Dump")
	}
}

// ClientIsInterrupted ensures that a -c that is interrupted says how far it has come.
func ClientIsInterrupted(t *testing.T, program protocol.Program, serve Serve) {
	t.Parallel()
	cmd := program("-addr", serve(t), "-c")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	var errs bytes.Buffer
	cmd.Stderr = &errs
	is.OK(t, cmd.Start())

	io.WriteString(in, "Put:k:v\n\nPing:there\n")
	if line, err := bufio.NewReader(out).ReadString('\n'); line != ":PONG there\n" {
		t.Errorf("it answers %q, %v", line, err)
	}

	cmd.Process.Signal(os.Interrupt)
	cmd.Wait()
	want := "interrupted; answered through line 3 of the input\n"
	if cmd.ProcessState.ExitCode() != exitFailure || !strings.Contains(errs.String(), want) {
		t.Errorf("exit code %d, it says %q, want %q", cmd.ProcessState.ExitCode(), &errs, want)
	}
}

// ClientBehindAQuit ensures that requests after a Quit are reported as not run, even if there is a
// second Quit.
func ClientBehindAQuit(t *testing.T, program protocol.Program, serve Serve) {
	t.Parallel()
	addr := serve(t)
	for _, input := range []string{"Quit\nPut:a:b\n", "Quit\nPut:a:b\nQuit\n"} {
		program.Prints(t, input, "Nothing after a Quit is run.", false, "-addr", addr, "-c")
	}
}

// Screen is a buffer that several goroutines may write to, as to a terminal.
type Screen struct {
	mu sync.Mutex
	bytes.Buffer
}

func (s *Screen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Buffer.Write(b)
}

// Take returns the text on the screen, and clears it.
func (s *Screen) Take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.Reset()
	return s.String()
}
