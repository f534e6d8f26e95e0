package command

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// ListenOnSeveralAddresses ensures that -c and -ping use the first of several addresses where a
// server answers, and that a server listens on all of its addresses or does not start.
func ListenOnSeveralAddresses(t *testing.T, program protocol.Program, serve Serve) {
	t.Parallel()
	here, nowhere := serve(t), fmt.Sprintf("127.0.0.1:%d", freePort(t))
	for _, args := range [][]string{{"-ping"}, {"-c", "Put:k:v"}} {
		for _, addr := range []string{nowhere + "," + here, here + "," + nowhere} {
			program.Prints(t, "", "", true, append([]string{"-addr", addr}, args...)...)
		}
	}

	frozen, err := net.Listen("tcp", "127.0.0.1:0") // it accepts nobody, but the kernel does
	is.OK(t, err)
	defer frozen.Close()
	answer := "" // on a busy machine the second one may need more time
	for timeout := time.Second / 4; answer == "" && timeout < time.Minute; timeout *= 2 {
		out, _ := program("-addr", frozen.Addr().String()+","+here, "-timeout", timeout.String(),
			"-ping").Output()
		answer = string(out)
	}
	if answer != ":PONG\n" {
		t.Errorf("behind one that says nothing -ping prints %q", answer)
	}

	// One that is full is not passed over: the next one may have other data.
	_, full, fullLog := program.Start(t, "-addr", "127.0.0.1:0", "-max-clients", "1")
	go io.Copy(io.Discard, fullLog)
	protocol.DialTCP(t, full).Ask("Ping", ":PONG")
	program.Prints(t, "", "has no room for one more client", true, "-addr", full+","+here, "-ping")

	program.Prints(t, "", "cannot connect to "+nowhere+","+nowhere, false, "-addr", nowhere+","+nowhere,
		"-ping")
	program.Prints(t, "Put:k\n", "kvserver: "+here+": stopped at", false, "-addr", nowhere+","+here, "-c",
		"-stop")
	program.Prints(t, "", "None of them serves.", false, "-addr", nowhere+","+nowhere, "-ping")
	program.Prints(t, "", "cannot listen on "+here+": ", false, "-addr", nowhere+","+here) // one is taken

	cmd, addr, log := program.Start(t, "-addr", nowhere+",127.0.0.1:0")
	second := protocol.ListeningAddr(t, log)
	if addr != nowhere || second == nowhere {
		t.Errorf("the log says %s and %s, want %s and another", addr, second, nowhere)
	}
	a, b := protocol.DialTCP(t, addr), protocol.DialTCP(t, second)
	a.Ask("Put:k:v\nPing", ":PONG")
	b.Ask("Get:k", "k:v")
	a.HangUp()
	b.HangUp()
	protocol.Stop(t, cmd, log, syscall.SIGTERM)
}

// ListenOnAUnixSocket ensures that a server on a unix socket can be reached there, only by its user
// and group, and without TLS; that it replaces the socket of a server that was killed, but not of
// one that runs; and that it removes the socket at its end.
func ListenOnAUnixSocket(t *testing.T, program protocol.Program) {
	t.Parallel()
	dir := Certificates(t, "server")
	path := filepath.Join(t.TempDir(), "sock")
	at := "unix:" + path
	args := []string{"-addr", "127.0.0.1:0," + at, "-tls-cert", filepath.Join(dir, "server.pem"),
		"-tls-key", filepath.Join(dir, "server.key")}
	start := func() (*exec.Cmd, *bufio.Reader) {
		t.Helper()
		cmd, _, log := program.Start(t, args...)
		if line, _ := log.ReadString('\n'); !strings.Contains(line, "addr="+at) ||
			!strings.Contains(line, `try="nc -U `+path+`"`) {
			t.Errorf("the log says %s", line)
		}
		return cmd, log
	}

	cmd, log := start()
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("the socket's mode: %v, %v", info.Mode(), err)
	}
	program.Prints(t, "", ":PONG\n", true, "-addr", at, "-ping")
	program.Prints(t, "", "k:v\n", true, "-addr", "unix:"+path+"2,"+at, "-c", "Put:k:v", "Get:k")
	a := protocol.DialTCP(t, at)
	a.SendAll("Get:k\n")
	a.WantRest("k:v\n")
	protocol.DialTCP(t, at).Ask("\x16\x03\x01\nPut:k:w", ":ERROR line 1: this port speaks no TLS")

	program.Prints(t, "", "Stop what listens there", false, "-addr", at)
	program.Prints(t, "", "k:v\n", true, "-addr", at, "-c", "Get:k")

	// A stop leaves the socket of another server alone.
	os.Remove(path)
	second, _ := start()
	protocol.Stop(t, cmd, log, syscall.SIGTERM)
	program.Prints(t, "", "", true, "-addr", at, "-c", "Get:k")

	second.Process.Kill()
	second.Wait()
	_, err := os.Lstat(path)
	is.OK(t, err)

	cmd, log = start()
	program.Prints(t, "", ":PONG\n", true, "-addr", at, "-ping")
	protocol.Stop(t, cmd, log, syscall.SIGTERM)
	_, err = os.Lstat(path)
	is.Equal(t, "the socket of a server that has stopped has gone", errors.Is(err, fs.ErrNotExist), true)
}

// ListenForWatchers ensures that a server says where its data is, and that -http shows the numbers
// of the data and of the log.
func ListenForWatchers(t *testing.T, program protocol.Program) {
	t.Parallel()
	for _, data := range [][]string{nil, {"-data", t.TempDir()}} {
		at := fmt.Sprintf("127.0.0.1:%d", freePort(t))
		cmd := program(append(data, "-addr", "127.0.0.1:0", "-http", at)...)
		pipe, _ := cmd.StderrPipe()
		is.OK(t, cmd.Start())
		defer cmd.Process.Kill()

		var start bytes.Buffer
		log, says := bufio.NewReader(io.TeeReader(pipe, &start)), "data is kept"
		if data == nil {
			says = "data is in memory only and lost on exit"
		}
		protocol.ListeningAddr(t, log)
		is.In(t, "the log", start.String(), "watching", says)

		answer, err := http.Get("http://" + at + "/metrics")
		is.OK(t, err)
		page, _ := io.ReadAll(answer.Body)
		answer.Body.Close()

		is.In(t, "the page", string(page), "kvserver_active 1\n", "kvserver_log_lines_lost_total 0\n")
		is.Equal(t, "the page tells of a disk", strings.Contains(string(page), "kvserver_fsync_seconds"),
			data != nil)
		protocol.Stop(t, cmd, log, os.Interrupt)
	}
}

// freePort returns a port that was free a moment ago.
func freePort(t *testing.T) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	is.OK(t, err)
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}
