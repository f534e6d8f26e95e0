package storage

import (
	"io/fs"
	"strings"
	"testing"
)

// Ensure that a user who may not read a key is not told to look for another.
func TestTLSKeyThatMayNotBeRead(t *testing.T) {
	for err, want := range map[error]string{
		&fs.PathError{Op: "open", Path: "key", Err: fs.ErrPermission}: "Let the user who runs kvserver read it",
		&fs.PathError{Op: "open", Path: "key", Err: fs.ErrNotExist}:   "Give files in PEM format",
	} {
		if advice := Advice(pemError("a key", err)); !strings.HasPrefix(advice, want) {
			t.Errorf("%v: the advice is %q, want %q", err, advice, want)
		}
	}
}
