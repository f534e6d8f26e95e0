package storage

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"
)

// TLSConfig returns the configuration of TLS for a server or a client. Its arguments are files in
// PEM format: a certificate, its key, and the CA that must have signed the other side's
// certificate. If a name is "", there is no such file; a client without a CA trusts those of the
// system.
func TLSConfig(cert, key, ca string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, pemError("the certificate "+cert+" with the key "+key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}

	// A server does not use RootCAs; a client does not use the other two.
	if ca != "" {
		pool := x509.NewCertPool()
		text, err := os.ReadFile(ca)
		if err == nil && !pool.AppendCertsFromPEM(text) {
			err = errors.New("it holds no certificate")
		}
		if err != nil {
			return nil, pemError("the CA "+ca, err)
		}
		config.RootCAs, config.ClientCAs = pool, pool
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return config, nil
}

// Times of certificates.
const (
	LookAgain = 10 * time.Second    // between two reads of the files
	WarnAgain = 24 * time.Hour      // between two warnings, except before the last
	warnAhead = 14 * 24 * time.Hour // before the certificate ends
)

// credentials are what a server shows to its clients, and wants to see of them. After WatchTLS they
// belong to rereadFiles.
type credentials struct {
	cert, key, ca string // files
	log           *slog.Logger
	current       atomic.Pointer[tls.Config] // for new connections; rereadFiles stores, handshakes load
	next          time.Time                  // when to log again at what time the certificate ends
}

// WatchTLS returns the configuration of a server. Its files are those of TLSConfig; ca may be "".
// It starts rereadFiles, which reads these files again; new ones are for new connections only. It
// logs at what time the certificate ends.
func WatchTLS(cert, key, ca string, log *slog.Logger, again <-chan os.Signal) (*tls.Config, error) {
	first, err := TLSConfig(cert, key, ca)
	if err != nil {
		return nil, err
	}

	k := &credentials{cert: cert, key: key, ca: ca, log: log}
	k.current.Store(first)
	k.warn(time.Now())
	go k.rereadFiles(again)

	// Each handshake uses the files that were read last.
	now := func(*tls.ClientHelloInfo) (*tls.Config, error) { return k.current.Load(), nil }
	return &tls.Config{GetConfigForClient: now}, nil
}

// warn logs at what time a new certificate ends, and again every WarnAgain once that is near.
func (k *credentials) warn(now time.Time) {
	if now.Before(k.next) {
		return
	}

	const mend = "; put a new one into its file, which is read within ten seconds"
	end := k.current.Load().Certificates[0].Leaf.NotAfter
	log, left := k.log.With("file", k.cert, "until", end), end.Sub(now)
	pause := min(WarnAgain, left)
	switch {
	case left <= 0:
		log.Error("the certificate has ended: clients refuse it" + mend)
		pause = WarnAgain
	case left <= warnAhead:
		log.Warn("the certificate ends soon" + mend)
	default:
		log.Info("the certificate in use is valid")
		pause = left - warnAhead
	}
	k.next = now.Round(0).Add(pause) // Round(0): compare wall time, which somebody may set
}

// rereadFiles reads the files every LookAgain, and when again receives a signal. It runs as one
// goroutine until again is closed (by a test) or the process ends.
func (k *credentials) rereadFiles(again <-chan os.Signal) {
	tick := time.Tick(LookAgain)
	told := "" // the error of the last read
	for isOpen := true; isOpen; {
		select {
		case <-tick:
		case _, isOpen = <-again: // somebody waits for a line in the log
			told, k.next = "", time.Time{}
		}

		// A bad file may be half of a good one that is being written.
		old := k.current.Load()
		config, err := readAgain(old, k.cert, k.key, k.ca)
		switch {
		case err != nil && err.Error() != told:
			k.log.Warn("cannot read the certificates again, so the old ones stay in use", "error", err)
		case err == nil && config != old:
			k.current.Store(config)
			k.next = time.Time{}
		}
		told = fmt.Sprint(err)
		k.warn(time.Now())
	}
}

// readAgain reads the files of a server's config again. It returns config itself if what is in them
// is the same: a new file may have the old one's size and time.
func readAgain(config *tls.Config, cert, key, ca string) (*tls.Config, error) {
	// A pipe can be read once: to read it again might take for ever. So what came from it stays.
	if isPipe(cert) || isPipe(key) {
		cert = ""
	}
	if isPipe(ca) {
		ca = ""
	}

	now, err := TLSConfig(cert, key, ca)
	if err != nil {
		return nil, err
	}
	if cert == "" {
		now.Certificates = config.Certificates
	}
	if ca == "" {
		now.ClientCAs, now.ClientAuth = config.ClientCAs, config.ClientAuth
	}

	if now.ClientCAs.Equal(config.ClientCAs) && slices.EqualFunc(now.Certificates[0].Certificate,
		config.Certificates[0].Certificate, bytes.Equal) {
		return config, nil
	}
	return now, nil
}

// isPipe reports whether there is something at path that is no file or directory.
func isPipe(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular() && !info.IsDir()
}

// pemError returns err, of using files in PEM format, with advice.
func pemError(files string, err error) error {
	advice := "Give files in PEM format, and a key without a password that belongs to its certificate; " +
		"kvserver help TLS shows how to make them."
	if errors.Is(err, fs.ErrPermission) {
		advice = "Let the user who runs kvserver read it; kvserver help systemd shows how."
	}
	return &advised{fmt.Errorf("cannot use %s: %w", files, err), advice}
}
