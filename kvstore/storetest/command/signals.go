package command

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// SignalsWhileLoading ensures that a signal ends the process while the data is loaded, even if the
// disk does not answer.
func SignalsWhileLoading(t *testing.T, program protocol.Program) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "STORE") // that nobody writes
	if err := exec.Command("mkfifo", file).Run(); err != nil {
		t.Logf("without mkfifo there is no load that lasts: %v", err)
		return
	}

	stuck := program("-addr", "127.0.0.1:0", "-tls-cert", file, "-tls-key", file)
	pipe, _ := stuck.StderrPipe()
	is.OK(t, stuck.Start())
	defer stuck.Process.Kill()
	log := bufio.NewReader(pipe)
	log.ReadString('\n')
	protocol.Stop(t, stuck, log, os.Interrupt, "because the disk does not answer")

	cmd := program("-addr", "127.0.0.1:0", "-data", dir)
	cmd.Env = append(cmd.Env, "KVSERVER_ADR=1")
	pipe, _ = cmd.StderrPipe()
	is.OK(t, cmd.Start())
	defer cmd.Process.Kill()
	log = bufio.NewReader(pipe)
	line, err := log.ReadString('\n')
	is.OK(t, err)
	is.In(t, "the first line", line, "unknown variable in the environment")

	protocol.Stop(t, cmd, log, os.Interrupt, "msg=starting", `msg="opening the data" at=`+dir,
		"stopped while opening the data")
}

// SignalsStopCleanly ensures that each signal stops the server cleanly after clients' last replies
// were delivered, and that the log says so; but that SIGHUP ends nothing where the log does not go
// to a terminal.
func SignalsStopCleanly(t *testing.T, program protocol.Program) {
	t.Parallel()
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			cmd, addr, log := program.Start(t, "-addr", "127.0.0.1:0")
			a, idle := protocol.DialTCP(t, addr), protocol.DialTCP(t, addr)

			cmd.Process.Signal(syscall.SIGHUP)
			cmd.Process.Signal(syscall.SIGHUP)
			a.Ask("Put:k:v\nGet:k", "k:v")
			idle.Ask("Ping", ":PONG")

			protocol.Stop(t, cmd, log, sig, "msg=stopping clients=2",
				"msg=stopped clients_served=2 requests=3 replies_dropped=0")
			protocol.WantAllClosed(a, idle)
		})
	}
}

// SignalsTwice ensures that a signal ends at once a server whose stop takes a while, whether
// another signal is the cause of the stop or the disk.
func SignalsTwice(t *testing.T, program protocol.Program) {
	t.Parallel()
	for what, stop := range map[string]func(cmd *exec.Cmd, dir string){
		"a signal":       func(cmd *exec.Cmd, _ string) { cmd.Process.Signal(syscall.SIGTERM) },
		"a failing disk": func(_ *exec.Cmd, dir string) { os.Rename(dir, dir+".old") },
	} {
		end := "" // on a busy machine the stop may be over before the signal comes
		for try := 0; try < 5 && end != "signal: terminated"; try++ {
			end = endOfStop(t, program, stop)
		}
		is.Equal(t, "the end of a server that stops after "+what, end, "signal: terminated")
	}
}

// endOfStop returns how a server ends that is sent a signal after stop has made it begin to stop.
func endOfStop(t *testing.T, program protocol.Program, stop func(cmd *exec.Cmd, dir string)) string {
	dir := filepath.Join(t.TempDir(), "data")
	os.Mkdir(dir, 0o700)
	cmd, addr, log := program.Start(t, "-addr", "127.0.0.1:0", "-data", dir)
	mute := protocol.DialTCP(t, addr)
	mute.Send(strings.Repeat("Put:k:"+strings.Repeat("v", 1<<19)+"\n", 30) + "Get:k\n")
	mute.Read() // and nothing more, so the stop waits for it

	stop(cmd, dir)
	for line := ""; !strings.Contains(line, "msg=stopping"); {
		var err error
		line, err = log.ReadString('\n')
		is.OK(t, err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	mute.Close()
	return cmd.ProcessState.String()
}

// SignalsOnATerminal ensures that SIGHUP, by which a terminal says that it was closed, stops a
// server whose log goes there, but not one that is to stay (nohup).
func SignalsOnATerminal(t *testing.T, program protocol.Program) {
	t.Parallel()

	// Where the tests themselves ignore SIGHUP, as under nohup, the server would, too.
	notice := make(chan os.Signal, 1)
	signal.Notify(notice, syscall.SIGHUP)
	defer signal.Stop(notice)

	// A device is a terminal for the server if it has characters, and is not the null device.
	for _, log := range []struct{ device, ignore string }{{"/dev/zero", ""}, {"/dev/zero", "trap '' HUP; "},
		{os.DevNull, ""}} {
		terminal, err := os.OpenFile(log.device, os.O_WRONLY, 0)
		if err != nil {
			t.Logf("nothing was tried: %v", err)
			return
		}
		defer terminal.Close()

		at := "unix:" + filepath.Join(t.TempDir(), "sock")
		cmd := program("-addr", at)
		cmd.Args = append([]string{"sh", "-c", log.ignore + `exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
		cmd.Path, err = exec.LookPath("sh")
		is.OK(t, err)
		cmd.Stderr = terminal
		is.OK(t, cmd.Start())
		defer cmd.Process.Kill()
		protocol.Await(t, "the server", func() bool { return program("-addr", at, "-ping").Run() == nil })

		a := protocol.DialTCP(t, at)
		a.Ask("Ping", ":PONG")
		cmd.Process.Signal(syscall.SIGHUP)
		if log.device == os.DevNull || log.ignore != "" {
			for range 1000 { // time in which the server would stop
				a.Ask("Ping", ":PONG")
			}
			cmd.Process.Signal(syscall.SIGTERM)
		}
		if a.WantClosed(); t.Failed() {
			return // or Wait might never end
		}
		is.OK(t, cmd.Wait())
	}
}

// FullDiskRefusesWrites ensures that a full disk does not end the server: writes are refused, and
// everything else works.
func FullDiskRefusesWrites(t *testing.T, program protocol.Program) {
	t.Parallel()
	dir := t.TempDir()

	// A file that may not grow stands for a full disk.
	cmd := program("-addr", "127.0.0.1:0", "-data", dir)
	cmd.Args = append([]string{"sh", "-c", `ulimit -f 4096; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	var err error
	if cmd.Path, err = exec.LookPath("sh"); err != nil {
		t.Logf("without a shell there is no limit of a file's size: %v", err)
		return
	}

	pipe, _ := cmd.StderrPipe()
	is.OK(t, cmd.Start())
	defer cmd.Process.Kill()
	log := bufio.NewReader(pipe)
	a := protocol.DialTCP(t, protocol.ListeningAddr(t, log))
	a.Ask("Ack", ":OK 0")

	put := "Put:k:" + strings.Repeat("v", 1<<19)
	stored, answer := 0, ":OK 1"
	for ; answer == ":OK 1" && stored < 20; stored++ {
		a.Send(put + "\n")
		answer = a.Read()
	}

	if !regexp.MustCompile(
		`:ERROR line \d+: the disk is full, nothing was changed: write .*seg-1.log: `).MatchString(
		answer) {
		t.Errorf("on a full disk a Put is answered %q", answer)
	}

	a.Ask("Put:small:v", ":OK 1") // there is room for that
	a.Ask("Delete:k", fmt.Sprint(":OK ", stored-1))
	a.Ask("Get:small", "small:v", ":OK 1")
	a.HangUp()
	protocol.Stop(t, cmd, log, os.Interrupt, "writes are refused: the disk is full")
}
