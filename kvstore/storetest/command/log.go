package command

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// LogMayEnd ensures that the server goes on when the reader of its log pauses or has gone, and that
// it still stops when told to.
func LogMayEnd(t *testing.T, program protocol.Program) {
	t.Parallel()
	for gone, clients := range map[bool]int{true: 9, false: 700} { // a pipe holds the lines of fewer
		r, w, err := os.Pipe()
		is.OK(t, err)

		cmd := program() // without a word
		cmd.Env = append(cmd.Env, "KVSERVER_ADDR=127.0.0.1:0", "KVSERVER_V=1")
		cmd.Stderr = w
		is.OK(t, cmd.Start())
		w.Close()
		defer cmd.Process.Kill()

		addr := protocol.ListeningAddr(t, bufio.NewReaderSize(r, 16)) // reads hardly more than this line
		if gone {
			r.Close()
		}

		for range clients {
			protocol.DialTCP(t, addr).HangUp()
		}

		a := protocol.DialTCP(t, addr)
		a.Ask("Put:k:v\nGet:k", "k:v")
		a.HangUp()

		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("log gone: %v; the server ended with %v", gone, err)
		}
	}
}

// LogTellsOfAFailingDisk ensures that a failing disk is reported as an error in the log's format
// before the server stops.
func LogTellsOfAFailingDisk(t *testing.T, program protocol.Program) {
	t.Parallel()
	for format, want := range map[string]string{
		"text": `level=ERROR msg="the data cannot be kept any more, so the server ends" ` +
			`error="the data directory is not where it was: .*" todo=`,
		"json": `"level":"ERROR","msg":"the data cannot be kept any more, so the server ends",` +
			`"error":"the data directory is not where it was: .*","todo":`,
	} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "data")
			os.Mkdir(dir, 0o700)
			cmd, _, log := program.Start(t, "-addr", "127.0.0.1:0", "-data", dir, "-log", format)
			os.Rename(dir, dir+".old") // the lock notices it without any request
			rest, _ := io.ReadAll(log)
			cmd.Wait()

			failed, stopping := regexp.MustCompile(want).FindIndex(rest), bytes.Index(rest,
				[]byte("stopping"))
			if cmd.ProcessState.ExitCode() != exitFailure || failed == nil || failed[0] > stopping ||
				bytes.Count(rest, []byte("ERROR")) != 1 {
				t.Errorf("%s: exit code %d, the log is\n%s", format, cmd.ProcessState.ExitCode(), rest)
			}
		})
	}
}

// LogTellsOfAFailedStart ensures that a failed start is reported in the log's format, whether the
// format is set by flag or environment.
func LogTellsOfAFailedStart(t *testing.T, program protocol.Program) {
	t.Parallel()
	for args, want := range map[string]int{
		"-log json -data /no/such/dir":        exitFailure,
		"-log json -addr 192.0.2.1:9999":      exitFailure,
		"-log json -tls-cert x -tls-key y":    exitFailure,
		"-log json -max-clients 0":            exitMisuse,
		"-log json -foo":                      exitMisuse,
		"-log json serve":                     exitMisuse,
		"KVSERVER_LOG=json -data /no/such/di": exitFailure,
		"KVSERVER_LOG=json -foo":              exitMisuse,
		"KVSERVER_LOG=json -addr":             exitMisuse,
	} {
		words := strings.Fields(args)
		cmd := program(words...)
		if strings.HasPrefix(words[0], "KVSERVER_") {
			cmd = program(words[1:]...)
			cmd.Env = append(cmd.Env, words[0])
		}

		out, errs, code := protocol.Outputs(cmd)
		var last struct{ Level, Error, Todo string }
		for line := range strings.Lines(errs) {
			if err := json.Unmarshal([]byte(line), &last); err != nil {
				t.Errorf("%s: it logs %q: %v", args, line, err)
			}
		}

		if code != want || out != "" || last.Level != "ERROR" || last.Error == "" || last.Todo == "" {
			t.Errorf("%s: exit code %d, it logs %s", args, code, errs)
		}
	}
}
