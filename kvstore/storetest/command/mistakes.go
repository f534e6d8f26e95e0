package command

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// mistake is a command line that ends at once: what happened and what to do are said in two lines,
// which begin like this.
type mistake struct{ args, what, todo string }

// FlagMistakes ensures that each mistake and failure at the start is reported in two lines, what
// happened and what to do, with the right exit code. said returns what is said about a command line
// that is wrong, without a process; explain, what is said about a wrong value of a flag. Nothing is
// said about edges, and about a check of an empty directory.
func FlagMistakes(t *testing.T, program protocol.Program, said func(args []string) string,
	explain func(flag string) string) {

	t.Parallel()
	tables := map[int][]mistake{
		exitMisuse:  misuses,
		exitFailure: slices.Concat(failuresWithData(t, program().Path), failuresToConnect(t), failuresOfTLS(t)),
	}
	for _, args := range wrongValues {
		name, value, _ := strings.Cut(args, " ")
		tables[exitMisuse] = append(tables[exitMisuse], mistake{args,
			fmt.Sprintf("invalid value %q for flag %s", value, name), explain(name)})
	}

	log := regexp.MustCompile(`(?m)^time=.*\n`)
	for code, mistakes := range tables {
		for i := 0; i < len(mistakes); i = storetest.Next(i, 1) {
			m := mistakes[i]
			t.Run(m.args, func(t *testing.T) {
				t.Parallel() // because some of these starts wait for seconds
				args := strings.Split(m.args, " ")
				if code == exitMisuse && i%10 > 0 {
					errs := said(args)
					if !strings.HasPrefix(errs, "kvserver: "+m.what) || !strings.Contains(errs, "\n"+m.todo) {
						t.Errorf("%q:\n got %q\nwant %q\n     %q", m.args, errs, m.what, m.todo)
					}
					return
				}

				out, errs, ended := protocol.Outputs(program(args...))
				lines := strings.Split(log.ReplaceAllString(errs, ""), "\n")
				if ended != code || out != "" || len(lines) != 3 ||
					!strings.HasPrefix(lines[0], "kvserver: "+m.what) || !strings.HasPrefix(lines[1], m.todo) {
					t.Errorf("%q: exit code %d, want %d\n got %q\nwant %q\n     %q", m.args,
						ended, code, errs, m.what, m.todo)
				}
			})
		}
	}

	for _, args := range slices.Concat(edges, []string{"check " + t.TempDir()}) {
		is.Equal(t, "what is said about "+args, said(strings.Split(args, " ")), "")
	}

	for _, arg := range []string{"-h", "-help", "-version"} {
		out, errs, code := protocol.Outputs(program(arg))
		isOdd := arg == "-version" && (strings.ContainsAny(out, "()") || strings.Contains(out, "unknown"))
		if code != 0 || errs != "" || !strings.Contains(out, "kvserver") || isOdd {
			t.Errorf("%s: exit code %d, prints %q and %q", arg, code, out, errs)
		}
	}
}

// misuses are command lines that are wrong.
var misuses = []mistake{
	{"-foo", "flag provided but not defined: -foo", "kvserver help flags lists the flags."},
	{"-port 1", "flag provided but not defined: -port", "Did you mean -addr ? kvserver help flags"},
	{"-dta x", "flag provided but not defined: -dta", "Did you mean -data ?"},
	{"-addr 1 -addr 2", `invalid value "2" for flag -addr: it is given twice`,
		"-addr takes PORT"},
	{"-c -timeout 1s -timeout 2s", `invalid value "2s" for flag -timeout: it is given twice`,
		"-timeout takes TIME"},
	{"-data -fsync 1s", `invalid value "-fsync" for flag -data`, "-data takes DIR"},
	{"-version x", `unexpected argument "x"`, "Set flags, as in kvserver -addr 9999, or send"},
	{"-write-timeout 5", `invalid value "5" for flag -write-timeout`, "-write-timeout takes TIME until " +
		"a client that reads nothing is cut off; 0: never (5m)."},
	{"-max-line 5m", `invalid value "5m" for flag -max-line`, "-max-line takes SIZE of a request " +
		"line, from 64 bytes to 1GiB (1MiB)."},
	{"-c README.md", `"README.md" is a file, not a request`, "Send the lines in it: kvserver -c < README.md"},
	{"-c Get:a README.md", `"README.md" is a file, not a request`,
		"Send the lines in it: kvserver -c < README.md"},
	{"put a b", `unexpected argument "put"`,
		"Set flags, as in kvserver -addr 9999, or send a request: kvserver -c Get:a"},
	{"foo", `unexpected argument "foo"`, "Set flags, as in kvserver -addr 9999, or send a request"},
	{"chekc data", `unexpected argument "chekc"`,
		"Did you mean kvserver check ? kvserver help flags"},
	{"version", `unexpected argument "version"`, "Did you mean kvserver -version ?"},
	{"-c ", `"" is not one request`, "Each argument is one request, and flags go before"},
	{"-fsync 1s", "-fsync is for data on a disk", "Give a directory, as in -data data -fsync 1s."},
	{"-fsync always", "-fsync is for data on a disk", "Give a directory, as in -data data"},
	{"-tls-ca ca.pem", "-tls-ca is not for a server",
		"Leave it out. -tls-ca takes FILE with a CA to trust: -c and -ping use TLS."},
	{"-tls-cert c.pem -tls-key c.key -ping", "-tls-cert with -c or -ping needs -tls-ca",
		"Give the CA"},
	{"-c Get:a -addr 1", `"-addr" is not one request`, "Each argument is"},
	{"-c Put:a:b\nDelete:c", `"Put:a:b\nDelete:c" is not one request`, "Each argument is"},
	{"check", "check needs DIR, and no flags", "DIR is the server's"},
	{"check ", "check needs DIR, and no flags", "DIR is the server's"},
	{"backup a", "backup needs DIR NEW, and no flags", "DIR is the server's"},
	{"repair a", "repair needs DIR NEW, and no flags", "DIR is the server's"},
	{"-data data -fsync sometimes", `invalid value "sometimes" for flag -fsync`,
		"-fsync takes WHEN: always, never, or a time from 1ms to 1h (always)."},
	{"-max-memory 1KiB", `invalid value "1KiB" for flag -max-memory`,
		"-max-memory takes SIZE of the process, 64MB or more"},
	{"-timeout 1 -ping", "invalid value \"1\" for flag -timeout", "-timeout takes TIME, as 5s, that -c"},
	{"-data d check", `unexpected argument "check"`, "A command comes first: kvserver check DIR"},
	{"restore a b", `unexpected argument "restore"`, "A copy is a data directory: give it to -data"},
	{"-max-memory 1G", `invalid value "1G" for flag -max-memory`, "-max-memory takes SIZE of the process, " +
		"64MB or more; 0: no limit. A size is a number with a unit, as 64MB or 1GiB."},
	{"-write-timeout 10", `invalid value "10" for flag -write-timeout`, "-write-timeout takes TIME until a " +
		"client that reads nothing is cut off; 0: never (5m). A time is a number with a unit"},
	{"-addr 1 -stop", "-stop is not for a server", "Leave it out."},
	{"serve", `unexpected argument "serve"`, "Leave it out"},
	{"start -addr 1", `unexpected argument "start"`, "Leave it out"},
	{"-addr 1 run", `unexpected argument "run"`, "Leave it out"},
	{"stop", `unexpected argument "stop"`, "Press Ctrl-C"},
	{"ping", `unexpected argument "ping"`, "Did you mean kvserver -ping ?"},
	{"client", `unexpected argument "client"`, "Did you mean kvserver -c ?"},
	{"bakup a b", `unexpected argument "bakup"`, "Did you mean kvserver backup ?"},
	{"hlep", `unexpected argument "hlep"`, "Did you mean kvserver help ?"},
	{"help no such word", `no heading or table of the manual has "no such word"`,
		"kvserver help lists the headings."},
	{"help backup nosuch", `no heading or table of the manual has "backup nosuch"`,
		"kvserver help lists the headings."},
	{"Get:b", `unexpected argument "Get:b"`,
		"Set flags, as in kvserver -addr 9999, or send a request: kvserver -c Get:b"},
	{"-c get fruit", `unknown request "get fruit"; did you mean Get:fruit ?`,
		"Each argument is one request"},
	{"-c set a b", `unknown request "set a b"; did you mean Set:a:b ?`,
		"Each argument is one request"},
	{"-c Ping del a", `unknown request "del a"; did you mean Delete:a ?`,
		"Each argument is one request"},
	{"-c -ping Get:x", "-c and -ping do not go together", "Give one: -ping asks"},
	{"-ping Get:x", `unexpected argument "Get:x"`, "Set flags"},
	{"-ping localhost:9999", `unexpected argument "localhost:9999"`, "Set flags, as in kvserver -addr"},
	{"-c -ping", "-c and -ping do not go together", "Give one: -ping asks"},
	{"-c -data x Ping", "-data is not for -c", "Leave it out"},
	{"-ping -max-line 100", "-max-line is not for -ping", "Leave it out"},
	{"-ping -v", "-v is not for -ping", "Leave it out"},
	{"-c -tls-client-ca x Ping", "-tls-client-ca is not for -c", "Leave it out"},
	{"-ping -stop", "-stop is not for -ping", "Leave it out"},
	{"-ping -out x", "-out is not for -ping", "Leave it out"},
	{"-timeout 5s", "-timeout is not for a server", "Leave it out"},
	{"-Addr 1", "flag provided but not defined: -Addr", "Did you mean -addr ?"},
	{"-c -out  Dump", `invalid value "" for flag -out`, "-out takes FILE for what -c would print"},
	{"-output x -c", "flag provided but not defined: -output", "Did you mean -out ?"},
	{"--PORT=1", "flag provided but not defined: -PORT", "Did you mean -addr ?"},
	{"-addr", "flag needs an argument: -addr", "-addr takes PORT (0 to 65535)"},
	{"-v=maybe", `invalid boolean value "maybe" for -v`,
		"-v takes 1 or 0: also log every connection."},
	{"---data", "bad flag syntax: ---data", "kvserver help"},
	{"-fsync 0s -data x", `invalid value "0s" for flag -fsync`, "-fsync takes WHEN"},
	{"-data etcd://a:1/kv -fsync 1s", "-fsync is for data on a disk", "Give a directory"},
	{"-tls-cert c.pem", "-tls-cert and -tls-key go together", "Give the certificate and its key"},
	{"-tls-client-ca ca.pem", "-tls-cert and -tls-key go together",
		"Give the certificate and its key"},
	{"check -v", "check needs DIR, and no flags",
		"DIR is the server's data directory, NEW is a new one; kvserver help check says more."},
	{"backup -data copy", "backup needs DIR NEW, and no flags", "DIR is the server's"},
	{"check a b", "check needs DIR, and no flags", "DIR is the server's"},
}

// wrongValues are values that a flag does not take.
var wrongValues = []string{"-log xml", "-http x", "-max-line many", "-max-line 0",
	"-max-line 1", "-max-memory -5", "-max-queues 5PB", "-write-timeout 5", "-data ",
	"-data http://localhost:2379/kv", "-addr 1,x", "-http unix:/tmp/x", "-addr unix:", "-addr unix:@x",
	"-max-clients 0", "-max-clients 1e3",
	"-write-timeout -5s", "-http ", "-tls-ca ", "-http 1,2", "-addr a:b", "-addr ::1", "-addr 65536",
	"-addr localhost", "-max-line 63", "-max-line 1073741825", "-max-memory 63999999", "-fsync 999us",
	"-fsync 1h1ns"}

// edges are the least and the most that flags take, and requests that only the server refuses.
var edges = []string{"-max-line 64", "-max-line 1GiB", "-max-memory 0", "-max-memory 64MB", "-max-clients 1",
	"-max-queues 0", "-write-timeout 0s", "-addr 0", "-addr 65535", "-data d -fsync 1ms", "-data d -fsync 1h",
	"-data etcd://a:1/kv -fsync always", "-c Putt:a:b Gett:a", "-c kvstore", "-c foo Get:a"}

// failuresWithData are those of data directories. program is a file that is none.
func failuresWithData(t *testing.T, program string) []mistake {
	foreign, damaged, inUse, beside, full := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	lost := t.TempDir() // damaged, too: what starts on damaged beside it has that in use
	os.WriteFile(filepath.Join(foreign, "photo.jpg"), nil, 0o600)
	os.WriteFile(filepath.Join(damaged, "STORE"), []byte("what is this"), 0o600)
	os.WriteFile(filepath.Join(lost, "STORE"), []byte("what is this"), 0o600)
	os.WriteFile(filepath.Join(full, "STORE"), nil, 0o600)
	store := OpenStore(t, inUse)
	t.Cleanup(func() {
		store.Close()
		copies, _ := os.ReadDir(beside)
		is.Equal(t, "directories of copies that failed", len(copies), 0)
	})

	return []mistake{
		{"backup " + foreign + " " + filepath.Join(beside, "copy"), "not a data directory: ",
			"Nothing was changed. Take out what is not a store's, or give another directory: for new data"},
		{"-data /no/such/dir", "the data directory does not exist: /no/such/dir",
			"Give the server's data directory. For a new server create it: mkdir -m 700 /no/such/dir"},
		{"-data " + program, "not a data directory: " + program + " is a file",
			"Nothing was changed. Take out what is not a store's"},
		{"-data " + foreign, "not a data directory: " + filepath.Join(foreign, "photo.jpg"),
			"Nothing was changed. Take out what is not a store's"},
		{"-data " + damaged, filepath.Join(damaged, "STORE") + " is damaged",
			"Nothing was changed. Restore a backup, or save what can be saved: kvserver repair " +
				damaged},
		{"backup " + inUse + " " + inUse, "a store cannot be copied into itself: " + inUse,
			"Nothing was changed. Give another directory"},
		{"backup etcd://127.0.0.1:1/kv etcd://127.0.0.1:1/kv/copy", "a store cannot be copied into itself: ",
			"Nothing was changed. Give another directory"},
		{"repair " + lost + " " + full, "a copy needs a new or an empty directory",
			"Nothing was copied. Give another directory"},

		{"-data etcd://nowhere", "no address of data in etcd", "Give the members and a prefix"},
		{"repair " + inUse + " " + filepath.Join(beside, "new"),
			fmt.Sprintf("the data directory is in use: %s by process %d", inUse, os.Getpid()),
			"Nothing was changed. Stop that process first"},
		{"-data " + inUse,
			fmt.Sprintf("the data directory is in use: %s by process %d", inUse, os.Getpid()),
			"Nothing was changed. Stop that process first"},
		{"check /no/such/dir", "the data directory does not exist", "Give the server's data directory."},
		{"check " + foreign, "not a data directory: ", "Nothing was changed. Take out what"},
		{"backup " + inUse + " /no/such/dir", "stat /no/such: ", "Nothing was copied. First create the"},
	}
}

// failuresToConnect are those of addresses where nobody can listen, or where nobody answers.
func failuresToConnect(t *testing.T) []mistake {
	port, dir := portTaken(t), t.TempDir()
	file, sock, long := filepath.Join(dir, "photo.jpg"), filepath.Join(dir, "sock"), dir+strings.Repeat("/x", 60)
	os.WriteFile(file, nil, 0o600)
	t.Cleanup(func() {
		_, err := os.Lstat(sock)
		is.Equal(t, "a server that does not start leaves no socket", os.IsNotExist(err), true)
	})

	return []mistake{
		{"-addr localhost:0 -http " + port,
			fmt.Sprintf("cannot listen on localhost:%s: ", port),
			"Stop what listens there, or choose another port or path. Port 0 takes a free one."},
		{"-addr 1 -ping", "cannot connect to localhost:1: connect",
			"Nobody listens there. A server that loads"},
		{"-addr 1 -c Get:a", "cannot connect to localhost:1: ", "Nobody listens there"},

		{"-addr unix:" + long,
			"cannot listen on unix:" + long +
				": bind: invalid argument", "Nothing was changed. Choose another path of at most 100 bytes"},
		{"-addr unix:" + file,
			"cannot listen on unix:" + file +
				": there is a file that is no socket",
			"Nothing was changed."},
		{"-addr unix:" + sock + ",unix:" + sock, "cannot listen on unix:" + sock + ": ",
			"Stop what listens there, or choose another port or path."},
		{"-addr unix:/no/such/sock", "cannot listen on unix:/no/such/sock: ",
			"Nothing was changed. Choose another path"},
		{"-addr unix:/no/such/sock -ping", "cannot connect to unix:/no/such/sock: ",
			"Nobody listens there"},

		{"-addr no.such.host.invalid:1 -ping", "cannot connect to no.such.host.invalid:1: lookup ",
			"Nobody listens there. A server that loads"},
		{"-addr " + port + " -timeout 500ms -ping",
			fmt.Sprintf("cannot connect to localhost:%s: no answer for 500ms", port),
			"Somebody listens there, and does not answer."},
		{"-addr 1 -c -out x Dump", "cannot connect to localhost:1: ", "Nobody listens there"},
		{"-addr " + port, fmt.Sprintf("cannot listen on localhost:%s: ", port),
			"Stop what listens there, or choose another port or path."},
		{"-addr 192.0.2.1:9999", "cannot listen on 192.0.2.1:9999: ",
			"This machine has no such name or address. Choose localhost,"},
		{"-addr no.such.host.invalid:9999", "cannot listen on no.such.host.invalid:9999: ",
			"This machine has no such name or address. Choose localhost,"},
	}
}

// failuresOfTLS are those of certificates, and of servers that do not speak TLS.
func failuresOfTLS(t *testing.T) []mistake {
	port, certs := portTaken(t), Certificates(t, "server", "other")
	pem := func(name string) string { return filepath.Join(certs, name) }

	return []mistake{
		{"-addr 1 -tls-ca " + pem("ca.pem") + " -ping", "cannot connect to localhost:1: ",
			"Nobody listens there"},
		{"-addr " + port + " -tls-ca " + pem("ca.pem") + " -timeout 100ms -ping",
			fmt.Sprintf("cannot connect to localhost:%s: ", port),
			"Somebody listens there, and does not answer."},

		{"-tls-cert " + pem("server.pem") + " -tls-key " + pem("none"),
			"cannot use the certificate " + pem("server.pem") + " with the key " + pem("none") + ": open ",
			"Give files in PEM format, and a key without a password that belongs to its certificate"},
		{"-tls-cert " + pem("server.pem") + " -tls-key " + pem("other.key"),
			"cannot use the certificate " + pem("server.pem") + " with the key " + pem("other.key") +
				": tls: private key does not match", "Give files in PEM format"},
		{"-tls-cert " + pem("server.pem") + " -tls-key " + pem("server.key") + " -tls-client-ca " +
			pem("ca.key"), "cannot use the CA " + pem("ca.key") + ": it holds no certificate",
			"Give files in PEM format"},
		{"-tls-ca " + pem("none") + " -ping",
			"cannot connect to localhost:9999: cannot use the CA " + pem("none") + ": open ",
			"Give files in PEM format"},
	}
}

// UnknownVariables ensures that a variable with a typing error in its name is noticed, and that
// variables of other programs are not.
func UnknownVariables(t *testing.T, warn func(log *slog.Logger, environment []string)) {
	var log bytes.Buffer
	warn(slog.New(slog.NewTextHandler(&log, nil)), []string{
		"KVSERVER_ADR=:1", "KVSERVER_MAXMEMORY=5", "KVSERVER_DATA=x", "KVSERVER_FSYNC=always",
		"KVSERVER_V=1", "HOME=/", "KVSERVER_VERSION=1",
		"KVSERVER_SERVICE_HOST=10.0.0.1", "KVSERVER_PORT=tcp://10.0.0.1:9999",
		"KVSERVER_PORT_9999_TCP=x", "KVSERVER_SERVICE_PORT=9999", "KVSERVER_C=1", "KVSERVER_PORTS=1",
	})

	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 4 || !strings.Contains(lines[2], "name=KVSERVER_C todo=\"kvserver help flags") ||
		!strings.Contains(lines[3], "name=KVSERVER_PORTS ") ||
		!strings.Contains(lines[0], "name=KVSERVER_ADR todo=\"Did you mean KVSERVER_ADDR ? ") ||
		!strings.Contains(lines[1], "name=KVSERVER_MAXMEMORY todo=\"Did you mean KVSERVER_MAX_MEMORY ? ") {
		t.Errorf("the log says\n%s", &log)
	}
}

// FlagSizes ensures that parse reads sizes as people write them.
func FlagSizes(t *testing.T, parse func(text string) (int64, error)) {
	for text, want := range map[string]int64{
		"0": 0, "77": 77, "1kB": 1000, "1KiB": 1024, "64MB": 64_000_000, "64mb": 64_000_000,
		"1GiB": 1 << 30, "2 GB": 2_000_000_000, "3TiB": 3 << 40, "9223372036854775807": math.MaxInt64,
		"": -1, "MB": -1, "1.5GB": -1, "-2": -1, "1 B": -1, "9999999999GB": -1, "1GiBB": -1,
		"0x10": -1,
	} {
		n, err := parse(text)
		if err != nil {
			n = -1
		}
		is.Equal(t, text, n, want)
	}
}

// portTaken returns a port where somebody listens until the test ends, and answers nothing.
func portTaken(t *testing.T) string {
	taken, err := net.Listen("tcp", "localhost:0")
	is.OK(t, err)
	t.Cleanup(func() { taken.Close() })
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	return port
}

// RepairBesideASilentEtcd ensures that a command says soon why nothing happens if etcd does not
// answer.
func RepairBesideASilentEtcd(t *testing.T, program protocol.Program) {
	t.Parallel()
	for _, args := range [][]string{{"check", "etcd://127.0.0.1:1/kv"},
		{"backup", "etcd://127.0.0.1:1/kv", t.TempDir()}, {"backup", t.TempDir(), "etcd://127.0.0.1:1/kv"}} {
		cmd := program(args...)
		pipe, _ := cmd.StderrPipe()
		is.OK(t, cmd.Start())

		line, _ := bufio.NewReader(pipe).ReadString('\n')
		is.In(t, "the first line", line, "etcd does not answer yet")
		is.In(t, "the first line", line, "refused")
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// ManualOnAFullDisk ensures that a command fails if its output could not be written.
func ManualOnAFullDisk(t *testing.T, program protocol.Program) {
	t.Parallel()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Logf("without /dev/full there is no full disk: %v", err)
		return
	}
	defer full.Close()

	dir := t.TempDir()
	OpenStore(t, dir).Close()
	damaged := t.TempDir() // what a check fails with counts more
	os.WriteFile(filepath.Join(damaged, "STORE"), []byte("what is this"), 0o600)

	for _, args := range []string{"-h", "-version", "help", "help flags", "check " + dir, "check " + damaged} {
		cmd := program(strings.Fields(args)...)
		cmd.Stdout = full
		_, errs, code := protocol.Outputs(cmd)
		want := "kvserver: cannot write the output: "
		if strings.HasSuffix(args, damaged) {
			want = "kvserver: " + damaged + " is damaged: "
		}
		if code != exitFailure || strings.Count(errs, "\n") != 2 || !strings.HasPrefix(errs, want) {
			t.Errorf("%s: exit code %d, it says %q, want %q", args, code, errs, want)
		}
	}
}

// RepairSaysWhatIsLost ensures that a repair fails if and only if something is lost, and that a
// backup copies nothing then.
func RepairSaysWhatIsLost(t *testing.T, program protocol.Program) {
	t.Parallel()
	path := t.TempDir()
	dir := filepath.Join(path, "data")
	os.Mkdir(dir, 0o700)
	store := OpenStore(t, dir)
	for range 3 {
		store.Put("k", "v")
		is.OK(t, store.Commit())
	}
	store.Close()
	program.Prints(t, "", "", true, "repair", dir, filepath.Join(path, "whole"))

	name := filepath.Join(dir, "seg-1.log")
	b, _ := os.ReadFile(name)
	b[100] ^= 1 // a bit in the first frame
	os.WriteFile(name, b, 0o600)

	_, errs, code := protocol.Outputs(program("repair", dir, filepath.Join(path, "saved")))
	is.In(t, "what a repair of a damaged store says", errs, "is lost")
	is.Equal(t, "its exit code", code, exitFailure)
	program.Prints(t, "", "kvserver: "+name+" is damaged", false, "backup", dir, filepath.Join(path, "copy"))
}
