package storage

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// TLSConfig returns the configuration of TLS for a server or a client. Its arguments are files in PEM
// format: a certificate, its key, and the CA that must have signed the other side's certificate. If a
// name is "", there is no such file; a client without a CA trusts those of the system.
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

// ReadTLSAgain reads the files of a server's config again. It returns config itself if what is in them
// is the same: a new file may have the old one's size and time.
func ReadTLSAgain(config *tls.Config, cert, key, ca string) (*tls.Config, error) {
	// A pipe was read once, and again might take for ever: what came from it stays.
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

// isPipe reports whether there is something at path that is no regular file.
func isPipe(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular()
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
