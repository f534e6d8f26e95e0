package command

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// TLS ensures that with a client CA only its clients get in, and that others are told why.
func TLS(t *testing.T, program protocol.Program) {
	t.Parallel()
	dir, other := Certificates(t, "server", "client", "expired"), Certificates(t, "client")

	flags := func(ca, from, name string) (args []string) {
		if ca != "" {
			args = []string{"-tls-ca", filepath.Join(ca, "ca.pem")}
		}
		if name != "" {
			args = append(args, "-tls-cert", filepath.Join(from, name+".pem"), "-tls-key",
				filepath.Join(from, name+".key"))
		}
		return args
	}

	_, addr, log := program.Start(t, append(flags("", dir, "server"), "-addr", "localhost:0",
		"-tls-client-ca", filepath.Join(dir, "ca.pem"))...)
	go io.Copy(io.Discard, log)

	for _, c := range []struct {
		args   []string
		prints string
	}{
		{flags(dir, dir, "client"), "k:v\n"},
		{flags(dir, "", ""), "It admits only certificates from its own CA that have not ended: look at"},
		{flags(dir, other, "client"), "It admits only certificates from its own CA"}, // and this is another's
		{flags(dir, dir, "expired"), "It admits only certificates from its own CA"},
		{flags(other, dir, "client"), "Somebody answers there."},
		{nil, "Perhaps it speaks TLS: give the CA"}, // plain text, which gets its answer at once
	} {
		program.Prints(t, "Delete:k\nPut:k:v\nGet:k\n", c.prints, c.prints == "k:v\n",
			append(c.args, "-addr", addr, "-timeout", "3s", "-c")...)
	}

	_, port, _ := net.SplitHostPort(addr)
	for _, everywhere := range []string{":", "0.0.0.0:"} { // as the server's own -addr may say
		args := append(flags(dir, dir, "client"), "-addr", everywhere+port, "-ping")
		program.Prints(t, "", ":PONG", true, args...)
	}
}

// Certificates makes a CA in a new directory, and a certificate with its key for each name.
func Certificates(t *testing.T, names ...string) (dir string) {
	dir = t.TempDir()
	write := func(name, kind string, der []byte) {
		os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
	}

	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range append([]string{"ca"}, names...) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		is.OK(t, err)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}

		if strings.HasPrefix(name, "expired") {
			c.NotAfter = time.Now().Add(-time.Minute)
		}
		if ca == nil {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
			ca, caKey = c, key
		}

		der, err := x509.CreateCertificate(crand.Reader, c, ca, key.Public(), caKey)
		is.OK(t, err)
		write(name+".pem", "CERTIFICATE", der)
		keyDER, _ := x509.MarshalECPrivateKey(key)
		write(name+".key", "EC PRIVATE KEY", keyDER)
	}
	return dir
}
