// Package command has what the server's program does as a process: what it prints, listens to, is
// told by signals, and refuses. It needs nothing of the server but the command that starts it, and
// where clients are tried, the address of a server.
//
//	mistakes.go  mistakes on the command line, and commands that fail
//	readme.go    the README's programs and commands, and what the program prints of it
//	units.go     the README's files for systemd and Prometheus
//	log.go       a log that nobody reads, and what it says of failures
//	signals.go   how it stops, and that a full disk is no reason to
//	tls.go       certificates
//	client.go    kvserver -c
//	talk.go      what kvserver -c makes of a server, an input and an output, in fake time
//	listen.go    several addresses, and a unix socket
package command

import (
	"os/exec"
	"testing"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest/is"
)

// Exit codes of the program.
const (
	exitFailure = 1 // it could not do what it was asked to do
	exitMisuse  = 2 // the command line or the environment is wrong
)

// Serve serves an empty store, in this process, until the test ends.
type Serve func(t testing.TB) (addr string)

// OpenStore opens the store in the directory at path.
func OpenStore(t *testing.T, path string) *durable.Store {
	t.Helper()
	dir, err := storage.OpenDisk(path, nil)
	is.OK(t, err)
	store, err := durable.Open(t.Context(), dir, durable.Options{})
	is.OK(t, err)
	return store
}

// Tool returns the path of a program that a test needs, or "" with a line in the test's log where
// it is not installed.
func Tool(t *testing.T, name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		t.Logf("%v: nothing was tried with it", err)
	}
	return path
}
