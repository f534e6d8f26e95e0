package storage_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest/command"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/world"
)

// Ensure that certificates are read again when the content of their files changes, even if size and
// time stay the same, or when the server is told to; that a bad file, or one that is no regular
// file any more, changes nothing; and that the end of a certificate is logged in time, once a day.
func TestTLSCertificatesAreReadAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, others := command.Certificates(t, "server"), command.Certificates(t, "server")
		cert, key := filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key")
		ca := filepath.Join(dir, "ca.pem")
		var log command.Screen
		again := make(chan os.Signal)
		served, err := storage.WatchTLS(cert, key, ca, slog.New(slog.NewTextHandler(&log, nil)), again)
		is.OK(t, err)

		shown := func() string {
			now, _ := served.GetConfigForClient(nil)
			return string(now.Certificates[0].Leaf.Raw)
		}

		at := time.Now()
		put := func(name string, data []byte) {
			file := filepath.Join(dir, name)
			if old, err := os.ReadFile(file); err == nil && len(old) > len(data) {
				data = append(data, bytes.Repeat([]byte("\n"), len(old)-len(data))...)
			}
			os.WriteFile(file, data, 0o600)
			os.Chtimes(file, at, at)
		}

		for _, name := range []string{"server.pem", "server.key"} {
			data, _ := os.ReadFile(filepath.Join(dir, name))
			put(name, append(data, "\n\n\n\n"...)) // certificates differ in size by a few bytes
		}

		read := func(name string) []byte {
			data, _ := os.ReadFile(filepath.Join(others, name))
			return data
		}

		wantLog := func(d time.Duration, times map[string]int) {
			t.Helper()
			world.Pass(d)
			told := log.Take()
			for text, want := range times {
				is.Equal(t, fmt.Sprintf("%q in the log %s", text, told), strings.Count(told, text), want)
			}
		}

		const look = storage.LookAgain + time.Second
		bad := map[string]int{"cannot read the certificates again": 1}

		// The CA is a pipe for a while.
		oldCA, _ := os.ReadFile(ca)
		if err := exec.Command("mkfifo", ca+".pipe").Run(); err == nil {
			is.OK(t, os.Rename(ca+".pipe", ca))
		}

		// A new pair comes file by file.
		wantLog(0, map[string]int{"ends soon": 1})
		world.Pass(look)
		first := shown()
		put("server.pem", read("server.pem")) // its key is not there yet
		wantLog(2*look, bad)
		is.Equal(t, "beside a pair that does not fit it shows the old one", shown() == first, true)

		put("server.key", read("server.key"))
		wantLog(look, map[string]int{"ends soon": 1}) // of the new one
		second := shown()
		is.Equal(t, "it shows a new pair", second != first, true)
		now, _ := served.GetConfigForClient(nil)
		is.Equal(t, "what it wants of clients beside a new pair", now.ClientAuth, tls.RequireAndVerifyClientCert)

		// The CA is a file again, and the server's key is one that does not fit.
		os.Remove(ca)
		put("ca.pem", oldCA)
		old, _ := os.ReadFile(filepath.Join(dir, "ca.key"))
		put("server.key", old)
		for range 2 {
			again <- syscall.SIGHUP
			wantLog(0, bad)
		}
		is.Equal(t, "told to read a bad key it shows the old pair", shown() == second, true)

		// A warning comes with a file that is new, and when the server is told to read again.
		put("server.key", read("server.key"))
		world.Pass(look)
		log.Take()
		put("ca.pem", read("ca.pem"))
		wantLog(look, map[string]int{"ends soon": 1}) // because a file was read that is new
		wantLog(look, map[string]int{"ends soon": 0})
		again <- syscall.SIGHUP
		wantLog(0, map[string]int{"ends soon": 1})

		// A key that is now a pipe without a writer is not read, and the CA is.
		os.Remove(key)
		if err := exec.Command("mkfifo", key).Run(); err == nil {
			put("server.pem", read("server.pem")[1:])
			put("ca.pem", oldCA)
			wantLog(look, map[string]int{"cannot read": 0, "ends soon": 1})
			is.Equal(t, "beside a pipe it shows the old pair", shown() == second, true)
		} else {
			t.Logf("without mkfifo there is no pipe to try: %v", err)
		}

		// The certificate in use is valid for an hour, whatever happens to its file.
		os.Remove(cert)
		world.Pass(look)
		log.Take()
		wantLog(time.Hour+time.Minute, map[string]int{"has ended": 1, "within ten seconds": 1})
		wantLog(storage.WarnAgain, map[string]int{"has ended": 1, "ends soon": 0})
		close(again)
	})
}

// Ensure that a certificate that could not be read again, because its key is gone or is a directory
// by now, is not said to be read.
func TestTLSCertificateThatIsGone(t *testing.T) {
	dir := command.Certificates(t, "server") // of today, which is years ahead in the bubble
	cert, key := filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key")
	synctest.Test(t, func(t *testing.T) {
		var log command.Screen
		again := make(chan os.Signal)
		_, err := storage.WatchTLS(cert, key, "", slog.New(slog.NewTextHandler(&log, nil)), again)
		is.OK(t, err)

		os.Remove(key)
		for _, isDirectory := range []bool{false, true} {
			if isDirectory {
				os.Mkdir(key, 0o700)
			}
			log.Take()
			again <- syscall.SIGHUP
			synctest.Wait()
			told := log.Take()
			if !strings.Contains(told, "cannot read") || strings.Contains(told, "is read") {
				t.Errorf("the key is a directory: %v; the log says %s", isDirectory, told)
			}
		}
		close(again)
	})
}
