package storage

import (
	"crypto/tls"
	"crypto/x509"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Ensure that the log says once at what time a certificate ends, warns of that every day of its
// last two weeks, and says every day that it has ended.
func TestTLSEndIsSaid(t *testing.T) {
	end := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	log := &strings.Builder{}
	k := &credentials{log: slog.New(slog.NewTextHandler(log, nil))}
	k.current.Store(&tls.Config{
		Certificates: []tls.Certificate{{Leaf: &x509.Certificate{NotAfter: end}}}})

	const day = 24 * time.Hour
	now := end.Add(-100 * day)
	for _, c := range []struct {
		until                 time.Duration // the end of the certificate
		valid, soon, hasEnded int           // lines in the log by then
	}{{90 * day, 1, 0, 0}, {14*day + 1, 1, 0, 0}, {14 * day, 1, 1, 0}, {13 * day, 1, 2, 0},
		{time.Hour, 1, 14, 0}, {0, 1, 14, 1}, {-day + time.Hour, 1, 14, 1}, {-2 * day, 1, 14, 3}} {
		for ; !now.After(end.Add(-c.until)); now = now.Add(time.Hour) {
			k.warn(now)
		}
		text := log.String()
		valid, soon := strings.Count(text, "is valid"), strings.Count(text, "ends soon")
		if hasEnded := strings.Count(text, "has ended"); valid != c.valid || soon != c.soon ||
			hasEnded != c.hasEnded {
			t.Errorf("%v before the end: %d, %d and %d lines, want %+v", c.until, valid, soon, hasEnded, c)
		}
	}
}

// Ensure that files which cannot be used are an error that names them.
func TestTLSFilesThatAreBad(t *testing.T) {
	none, empty := filepath.Join(t.TempDir(), "none"), filepath.Join(t.TempDir(), "empty")
	os.WriteFile(empty, nil, 0o600)
	_, caErr := TLSConfig("", "", none)
	_, emptyErr := TLSConfig("", "", empty)
	_, watchErr := WatchTLS(none, none, "", nil, nil)
	for _, c := range []struct {
		err  error
		want string
	}{
		{caErr, "cannot use the CA " + none}, {watchErr, "cannot use the certificate " + none},
		{emptyErr, "cannot use the CA " + empty + ": it holds no certificate"},
	} {
		if c.err == nil || !strings.HasPrefix(c.err.Error(), c.want) {
			t.Errorf("%v, want %s", c.err, c.want)
		}
	}
}

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
