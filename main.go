// Kvserver is a key-value server on TCP: one request a line, netcat for a
// client.
//
// The map of the code:
//
//	main.go    flags and the environment; the log; listening; start and stop; certificates; the
//	           commands check, repair and backup; the client (kvserver -c, -ping)
//	server.go  keyValueServer: its accept goroutines and workLoop, which owns everything;
//	           TLS handshakes; Stats, metrics and health over HTTP
//	client.go  Client: one connection, its reading and its writing goroutine; input, which
//	           makes lines of bytes; outbox, which makes messages of replies
//	query.go   Query: parse a line, run it, format the reply
//	kvstore/   the store behind the KVStore interface: in memory, with a log on disk or in etcd
//
// The words, each for one thing:
//
//	request   a line that a client sends; a Query is one on its way through the server
//	reply     what a request is answered with: no line, or some
//	burst     the lines that one Read has brought
//	chain     the queries of a burst, or of a part of it, that travel together
//	batch     the chains that workLoop runs before one Commit
//	message   bytes of replies, as they wait in a client's buffer to be written
//	outbox    where a client's replies become messages
//	holder    the one goroutine that has a client's chain, and so its outbox
//	slow      of a client whose connection has taken no byte for a second, or two if it has read
//	turn      the time for which workLoop runs requests before it commits and answers
//	share     what a client has had of workLoop's time: who has had much waits for a turn
//	snapshot  the store as it was at one moment: a Keys, a Dump or a compaction reads one, and
//	          the latter writes it to a file of that name
//	frame     records of one Commit in the log, with a checksum; some frames say only how it goes on
//	segment   a file of the log; a compaction puts one snapshot file in the place of old ones
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storage/etcd"
)

// commands are what can stand in the place of flags.
var commands = []string{"check", "repair", "backup"}

// Exit codes.
const (
	exitFailure = 1 // it could not do what it was asked to
	exitMisuse  = 2 // it was not asked properly
)

const (
	stopTime    = 5 * time.Second // for a stop, before the process ends regardless
	connectTime = 5 * time.Second // for -c to connect, and for -ping to be answered
)

// The help text is this, a line for each flag, and moreUsage.
const usage = `Usage: kvserver [flags]                             serve
       kvserver [-addr ADDR,...] -c [REQUEST ...]   send them, or standard input
       kvserver [-addr ADDR,...] -ping              exit code 0 if one answers
       kvserver check DIR | repair DIR NEW | backup DIR NEW   look, save, copy
`

const moreUsage = `Most flags can be in the environment, too: KVSERVER_ADDR=:9999 is -addr :9999.
Sizes are bytes, or as in 64MB and 1GiB.

Try it:   kvserver &   then   nc localhost 9999   and type   Put:fruit:apple
`

// config is what the command line asks for.
type config struct {
	addr    string
	data    string // directory; "": memory only
	fsync   string
	http    string // address of metrics; "": none
	log     string // text or json
	maxLine size
	verbose bool

	maxClients   int
	maxMemory    size
	maxQueues    size
	writeTimeout time.Duration

	cert, key string // files in PEM; "": no TLS
	clientCA  string // whose certificates a client must show
	ca        string // whose certificate -c wants to see; "": no TLS

	client   bool          // send requests instead of serving
	stop     bool          // at the first error
	timeout  time.Duration // for -c and -ping to connect, and for each silence; 0: any silence
	ping     bool
	version  bool // print it, and do nothing else
	requests []string
}

func main() {
	if len(os.Args) > 1 && slices.Contains(commands, os.Args[1]) {
		os.Exit(runCommand(os.Args[1], os.Args[2:]))
	}
	c, err := parseFlags(os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp): // which includes -version: it is printed
		return
	case err != nil:
		printError(os.Stderr, err)
		os.Exit(exitMisuse)
	}
	if c.client || c.ping {
		if err := beClient(c, os.Stderr); err != nil {
			printError(os.Stderr, err)
			os.Exit(exitFailure)
		}
		return
	}
	signal.Ignore(syscall.SIGPIPE) // whoever reads the log may go, and the data stays
	log := newLog(os.Stderr, c.log == "json", c.verbose)
	err = beServer(c, log)
	if err != nil && !errors.Is(err, errLogged) {
		printError(log.queue, err)
	}
	log.flush()
	if err != nil {
		os.Exit(exitFailure)
	}
}

// errLogged is beServer's error when the log tells of it already.
var errLogged = errors.New("see the log")

// problem is an error with what to do about it.
type problem struct{ what, todo string }

func (p problem) Error() string { return p.what }

// printError prints err in two lines: what is wrong and what to do.
func printError(w io.Writer, err error) {
	fmt.Fprintf(w, "kvserver: %v\n", err)
	if p := (problem{}); errors.As(err, &p) {
		fmt.Fprintln(w, p.todo)
	}
}

const seeHelp = "kvserver -h lists the flags."

// parseFlags reads the environment and the command line. It prints what -h and -version
// ask for and then returns flag.ErrHelp.
func parseFlags(args []string, out io.Writer) (c config, err error) {
	options := c.options()
	help := helpText(options) // with the defaults, as they are still there
	flags := flagSet(options)
	if err := readEnvironment(flags, options); err != nil {
		return c, err
	}
	ca := c.ca // it may be there for a -ping beside the server
	err = flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(out, help)
		return c, err
	case err != nil:
		return c, flagProblem(options, err)
	case c.version:
		fmt.Fprintln(out, "kvserver", version(), runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
		return c, flag.ErrHelp
	case !c.client && !c.ping && c.ca == ca:
		c.ca = ""
	}
	c.requests = flags.Args()
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, o := range options {
		if err := o.check(); err != nil {
			return c, err
		}
	}
	if err := cmp.Or(c.checkRequests(), c.checkTogether(given)); err != nil {
		return c, err
	}
	if c.http != "" {
		if c.http, err = fullAddr("http", c.http); err != nil {
			return c, err
		}
	}
	addrs := strings.Split(c.addr, ",")
	for i, addr := range addrs {
		if addrs[i], err = fullAddr("addr", addr); err != nil {
			return c, err
		}
		if c.http == addrs[i] && !strings.HasSuffix(c.http, ":0") {
			return c, problem{"-addr and -http are both " + c.http, "Give each a port of its own."}
		}
	}
	c.addr = strings.Join(addrs, ",")
	return c, nil
}

// option is one flag. The help text and the README's table are made of these, so that a flag
// that is added here is everywhere.
type option struct {
	name  string
	value any    // where its value goes, with the default there: a pointer to a field of config
	unit  string // what its value is called; "": it has none
	help  string // a line
	more  string // what the README says behind that
	now   bool   // it says what to do now, so it is not in the environment

	// For a value that is refused: what is right, and an example for what is no value.
	fits    func() bool
	give    string
	example string // "": the default
}

// options returns the flags that set c, and sets their defaults.
func (c *config) options() []option {
	*c = config{addr: "localhost:9999", fsync: "always", log: "text",
		maxClients: defaultMaxClients, maxLine: defaultMaxLine, maxQueues: defaultMaxQueues,
		writeTimeout: defaultWriteTimeout}
	return append(c.serverOptions(), c.clientOptions()...)
}

// serverOptions returns the flags of a server; those of TLS are a client's, too.
func (c *config) serverOptions() []option {
	return []option{
		{name: "addr", value: &c.addr, unit: "ADDR,...",
			help: "port, :port (all), host:port, unix:PATH",
			more: "`:9999` is every address of the machine, port 0 a free one, which is logged. A " +
				"server serves all that are given: `localhost:9999,unix:/run/kvserver/sock`; `-c` " +
				"and `-ping` try them in turn. TLS is not for unix sockets: their mode, 0660, says " +
				"who may connect"},
		{name: "data", value: &c.data, unit: "DIR",
			help: "keep the data there, or in etcd://HOST:PORT,.../PREFIX",
			more: "Without it the data is lost when the server stops",
			fits: func() bool { return !strings.Contains(c.data, "://") || etcd.IsAddress(c.data) },
			give: "a directory, or an etcd cluster as in " +
				"etcd://host1:2379,host2:2379,host3:2379/kv"},
		{name: "fsync", value: &c.fsync, unit: "WHEN",
			help: "with -data: always, a time such as 1s, or never",
			more: "See \"Keeping the data\"",
			fits: func() bool { _, ok := parseFsync(c.fsync); return ok },
			give: "always, never, or a time from 1ms to 1h, as in -fsync 1s"},
		{name: "http", value: &c.http, unit: "ADDR",
			help: "serve /metrics, /healthz, /livez, /debug/pprof/",
			more: "It answers requests for an IP address, localhost or the host given here"},
		{name: "max-clients", value: &c.maxClients, unit: "N", help: "connections at a time",
			more: "One more is told so. Lowered where `ulimit -n` is too small; the log says to " +
				"what",
			fits: func() bool { return c.maxClients >= 1 },
			give: "at least 1, as in -max-clients 10000", example: "10000"},
		{name: "max-line", value: &c.maxLine, unit: "SIZE",
			help:    "longest request line, its end not counted",
			fits:    func() bool { return c.maxLine >= minMaxLine && c.maxLine <= 1<<30 },
			give:    fmt.Sprintf("%d bytes to 1GiB, as in -max-line 1MiB", minMaxLine),
			example: "1MiB"},
		{name: "max-memory", value: &c.maxMemory, unit: "SIZE",
			help: "what the process may take; 0: no limit",
			more: "At least 64MB, three eighths of which are for data; of 1GB it is more than " +
				"half. Writes that need more are refused; Delete and Remove never are. Give a " +
				"container a quarter more",
			fits: func() bool { return c.maxMemory == 0 || c.maxMemory >= minMaxMemory },
			give: fmt.Sprintf("%d bytes or more, as in -max-memory 500MB, or 0 for no limit",
				minMaxMemory),
			example: "500MB"},
		{name: "max-queues", value: &c.maxQueues, unit: "SIZE", example: "1GiB",
			help: "memory of all replies that wait; 0: no limit",
			more: "An eighth of what -max-memory shares out, if that is less. Over it clients " +
				"that take nothing lose replies, or after Ack their connection; each may have " +
				"32 KiB beside it"},
		{name: "write-timeout", value: &c.writeTimeout, unit: "TIME",
			help: "cut who takes no byte for so long; 0: never",
			fits: func() bool { return c.writeTimeout >= 0 },
			give: "a time such as 5m, or 0 for no limit", example: "5m"},
		{name: "tls-cert", value: &c.cert, unit: "FILE",
			help: "certificate: speak TLS; with -c and -ping: show it"},
		{name: "tls-key", value: &c.key, unit: "FILE", help: "its key"},
		{name: "tls-client-ca", value: &c.clientCA, unit: "FILE",
			help: "let in only who has a certificate of this CA"},
		{name: "tls-ca", value: &c.ca, unit: "FILE",
			help: "with -c and -ping: speak TLS, and trust this CA"},
		{name: "log", value: &c.log, unit: "FORMAT", help: "text or json",
			fits: func() bool { return c.log == "text" || c.log == "json" }, give: "text or json"},
		{name: "v", value: &c.verbose, help: "log every connection as well"},
	}
}

// clientOptions returns the other flags.
func (c *config) clientOptions() []option {
	return []option{
		{name: "c", value: &c.client, now: true, help: "be a client: send requests",
			more: "Data goes to standard output, errors to standard error"},
		{name: "stop", value: &c.stop, now: true, help: "with -c: end at the first error",
			more: "Each request is sent when the one before is answered"},
		{name: "timeout", value: &c.timeout, unit: "TIME",
			help: "with -c, -ping: give up after so long without an answer",
			more: "0: after 5s for connecting and for the first answer, and never after that",
			fits: func() bool { return c.timeout >= 0 },
			give: "a time such as 5s; 0 is 5s for the first answer, and no limit then", example: "5s"},
		{name: "ping", value: &c.ping, now: true, help: "be a health check"},
		{name: "version", value: &c.version, now: true, help: "print the version"},
	}
}

// line is the flag's line in the help text.
func (o option) line() string {
	line := fmt.Sprintf("  %-21s%s", "-"+o.name+" "+o.unit, o.help)
	if d := o.initial(); o.unit != "" && d != "" && d != "0" {
		line += " (" + d + ")"
	}
	return line + "\n"
}

// row is the flag's row in the README.
func (o option) row() string {
	variable, initial, text := o.variable(), o.initial(), o.help
	if variable != "" {
		variable = "`" + variable + "`"
	}
	if o.unit == "" || initial == "" {
		initial = ""
	} else {
		initial = "`" + initial + "`"
	}
	if o.more != "" {
		text += ". " + o.more
	}
	return fmt.Sprintf("| `-%s` | %s | %s | %s |\n", o.name, variable, initial, text)
}

// initial is the default as one would write it.
func (o option) initial() string {
	switch v := o.value.(type) {
	case *string:
		return *v
	case *time.Duration:
		return cmp.Or(strings.TrimSuffix(v.String(), "0s"), "0")
	case *size:
		return v.String()
	case *int:
		return strconv.Itoa(*v)
	}
	return ""
}

// variable is the flag's name in the environment; "": it has none. (KVSERVER_VERSION is
// often there, and not meant for us.)
func (o option) variable() string {
	if o.now {
		return ""
	}
	return "KVSERVER_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// show gives an example of the flag. (After a value that is none the default is not there.)
func (o option) show() string {
	if o.unit == "" {
		return ""
	}
	return "Give it as in -" + o.name + "=" + cmp.Or(o.example, o.initial()) + ". "
}

// check tells what is wrong with the value.
func (o option) check() error {
	if o.fits == nil || o.fits() {
		return nil
	}
	what := fmt.Sprintf("-%s %v is out of range", o.name, reflect.ValueOf(o.value).Elem())
	if text, isText := o.value.(*string); isText {
		what = fmt.Sprintf("-%s %q is none of its values", o.name, *text)
	}
	return problem{what, "Give " + o.give + "."}
}

// flagSet returns what parses options.
func flagSet(options []option) *flag.FlagSet {
	flags := flag.NewFlagSet("kvserver", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	for _, o := range options {
		switch v := o.value.(type) {
		case *string:
			flags.StringVar(v, o.name, *v, "")
		case *bool:
			flags.BoolVar(v, o.name, *v, "")
		case *int:
			flags.IntVar(v, o.name, *v, "")
		case *time.Duration:
			flags.DurationVar(v, o.name, *v, "")
		case *size:
			flags.Var(v, o.name, "")
		}
	}
	return flags
}

// helpText is what -h prints.
func helpText(options []option) string {
	text := usage
	for _, o := range options {
		text += o.line()
	}
	return text + moreUsage
}

// readEnvironment sets flags from the environment.
func readEnvironment(flags *flag.FlagSet, options []option) error {
	for _, o := range options {
		name := o.variable()
		if value := os.Getenv(name); name != "" && value != "" && flags.Set(o.name, value) != nil {
			what := fmt.Sprintf("%s=%q in the environment is no value for -%s", name, value, o.name)
			return problem{what, o.show() + seeHelp}
		}
	}
	return nil
}

// flagProblem says what to do about an error of flags.Parse.
func flagProblem(options []option, err error) error {
	name, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: ")
	if unknown {
		return problem{"unknown flag " + name,
			similarFlag(options, strings.TrimLeft(name, "-")) + seeHelp}
	}
	todo := seeHelp
	for _, o := range options {
		if strings.Contains(err.Error(), " -"+o.name+": ") {
			todo = o.show() + seeHelp
		}
	}
	return problem{err.Error(), todo}
}

// checkRequests tells what is wrong with what stands behind the flags.
func (c *config) checkRequests() error {
	for _, request := range c.requests {
		near := slices.IndexFunc(commands, func(name string) bool { return oneSlip(request, name) })
		switch {
		case !c.client && near >= 0:
			return problem{fmt.Sprintf("unexpected argument %q", request),
				"Did you mean kvserver " + commands[near] + " DIR ? " + seeHelp}
		case !c.client && (request == "help" || request == "version"):
			return problem{fmt.Sprintf("unexpected argument %q", request),
				"Did you mean kvserver -" + request + " ?"}
		case !c.client && slices.Contains(commands, request):
			return problem{request + " goes first, and takes no flags",
				"Give the directory behind it, as in kvserver " + request + " data."}
		case !c.client:
			return problem{fmt.Sprintf("unexpected argument %q: everything is set by flags",
				request),
				"To send a request: kvserver -c " + request + "   " + seeHelp}
		case trimCR(request) == "":
			return problem{fmt.Sprintf("%q is no request", request),
				"Give one, as in kvserver -c Get:fruit, or none to send what comes on standard input."}
		case strings.HasPrefix(request, "-"):
			return problem{fmt.Sprintf("%q is no request", request),
				"Flags go before the requests, as in kvserver -addr 9999 -c Get:fruit."}
		case strings.Contains(request, "\n"):
			return problem{fmt.Sprintf("%q is more than one request", request),
				"Give each as an argument of its own; no key and no value holds a newline."}
		}
	}
	return nil
}

// checkTogether tells which flags do not go together. given are those that were given,
// here or in the environment.
func (c *config) checkTogether(given map[string]bool) error {
	asks := c.client || c.ping
	switch {
	case etcd.IsAddress(c.data) && c.fsync != "always":
		return problem{"-fsync " + c.fsync + " is for data on a disk, not in etcd",
			"Leave it out: what is answered is in etcd."}
	case given["data"] && c.data == "":
		return problem{"-data is empty",
			"Give a directory, or leave -data out to keep the data in memory only."}
	case given["fsync"] && c.data == "" && !asks:
		return problem{"-fsync is for data on disk, and there is none",
			"Give a directory, as in -data data -fsync " + c.fsync + "."}
	case (c.cert == "") != (c.key == ""), c.clientCA != "" && c.cert == "":
		return problem{"-tls-cert and -tls-key go together, and -tls-client-ca with both",
			"Give the certificate and its key, as in -tls-cert server.pem -tls-key server.key."}
	case asks && c.cert != "" && c.ca == "":
		return problem{"-tls-cert with -c or -ping needs -tls-ca",
			"Say whose certificate the server has, as in -tls-ca ca.pem."}
	case !c.client && c.stop:
		return problem{"-stop is for -c", "Give both: kvserver -c -stop < FILE"}
	case !asks && c.ca != "":
		return problem{"-tls-ca is for -c and -ping",
			"To let in only who has a certificate: -tls-client-ca " + c.ca}
	}
	return nil
}

// minMaxMemory is the least -max-memory: with less there is no room for data beside what the
// program and its work take.
const minMaxMemory = 64_000_000

// minMaxLine is the least -max-line: with less hardly a request fits.
const minMaxLine = 64

// size is a number of bytes as a flag takes it: 1048576, 64MB (a million each) or 1GiB.
type size int64

// String is flag.Value's.
func (s *size) String() string {
	switch n := int64(*s); {
	case n > 0 && n%(1<<30) == 0:
		return fmt.Sprint(n>>30, "GiB")
	case n > 0 && n%(1<<20) == 0:
		return fmt.Sprint(n>>20, "MiB")
	default:
		return strconv.FormatInt(n, 10)
	}
}

// Set is flag.Value's.
func (s *size) Set(text string) error {
	number, unit := text, int64(1)
	for i, prefix := range []string{"k", "M", "G", "T"} {
		for _, u := range []struct {
			suffix string
			base   int64
		}{{prefix + "iB", 1024}, {prefix + "B", 1000}} {
			if n := len(text) - len(u.suffix); n > 0 && equalFold(text[n:], u.suffix) {
				number = strings.TrimSpace(text[:n])
				for range i + 1 {
					unit *= u.base
				}
			}
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return errors.New("no size")
	}
	*s = size(n * unit)
	return nil
}

// warnOfVariables logs which variables look like ours and are none, and what they may have
// been meant to be. Those that Kubernetes sets for a service of our name are not meant.
func warnOfVariables(log *slog.Logger, environment []string) {
	options := new(config).options()
	known := map[string]bool{"KVSERVER_VERSION": true, "KVSERVER_PORT": true,
		"KVSERVER_ETCD_USER": true}
	for _, o := range options {
		known[o.variable()] = true
	}
	for _, line := range environment {
		name, _, _ := strings.Cut(line, "=")
		text, ours := strings.CutPrefix(name, "KVSERVER_")
		if !ours || known[name] || strings.HasPrefix(text, "SERVICE_") ||
			strings.HasPrefix(text, "PORT_") || strings.HasPrefix(text, "TEST_") {
			continue
		}
		todo := seeHelp
		for _, o := range options {
			if v := o.variable(); oneSlip(name, v) && len(o.name) > 2 {
				todo = "Did you mean " + v + " ?"
			}
		}
		log.Warn("a variable in the environment is none of ours, so it does nothing", "name", name,
			"todo", todo)
	}
}

// similarFlag suggests the flag that an unknown one may have been meant to be.
func similarFlag(options []option, name string) (suggestion string) {
	other := map[string]string{"port": "addr", "p": "addr", "host": "addr", "listen": "addr",
		"bind": "addr", "d": "data", "dir": "data", "datadir": "data", "verbose": "v",
		"client": "c", "metrics": "http"}[name]
	for _, o := range options {
		if o.name == other || oneSlip(name, o.name) && len(o.name) > 2 {
			suggestion = "Did you mean -" + o.name + " ? "
		}
	}
	return suggestion
}

// parseFsync reads the value of -fsync.
func parseFsync(s string) (when time.Duration, ok bool) {
	switch s {
	case "always":
		return durable.FsyncAlways, true
	case "never":
		return durable.FsyncNever, true
	}
	when, err := time.ParseDuration(s)
	return when, err == nil && when >= time.Millisecond && when <= time.Hour
}

// unixPrefix stands before the path in the address of a unix socket.
const unixPrefix = "unix:"

// fullAddr completes the address that a flag gives: a port alone is one of
// localhost.
func fullAddr(name, addr string) (string, error) {
	path, isUnix := strings.CutPrefix(addr, unixPrefix)
	if isUnix && name == "addr" && path != "" && path[0] != '@' { // @ is for one without a file
		return addr, nil
	}
	full := addr
	if !strings.Contains(addr, ":") {
		full = "localhost:" + addr
	}
	_, port, err := net.SplitHostPort(full)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	switch what := fmt.Sprintf("-%s %q is no address", name, addr); {
	case isUnix && name == "addr":
		return "", problem{what, "Give a path, as in -addr unix:/run/kvserver/sock."}
	case err != nil:
		return "", problem{what,
			"Give a port, :port or host:port, as in -" + name + " 9999; ports go up to 65535."}
	}
	return full, nil
}

// version is the module version that the binary was built as, with the commit, its time,
// and whether files were changed since.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := strings.Trim(info.Main.Version, "()")
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]):
			v += "-" + s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.time":
			v += " of " + s.Value
		case s.Key == "vcs.modified" && s.Value == "true" && !strings.Contains(v, "dirty"):
			v += ", changed since"
		}
	}
	return v
}

// beServer opens, listens, serves and stops. Once it serves, its errors are in the log
// and it returns errLogged.
func beServer(c config, log *queuedLog) error {
	ctx, restore := signal.NotifyContext(context.Background(), stopSignals()...)
	defer restore()
	again := make(chan os.Signal, 1)
	if !slices.Contains(stopSignals(), os.Signal(syscall.SIGHUP)) {
		signal.Notify(again, syscall.SIGHUP)
	}
	warnOfVariables(log.Logger, os.Environ())
	log.Info("starting", "version", version(), "go", runtime.Version(), "pid", os.Getpid())
	s := New(nil)
	s.log, s.logged, s.version = log.Logger, &log.queue.counts, version()
	if c.data != "" {
		s.status = new(storage.Status)
	}
	if c.http != "" { // first, so that one can watch how the data is opened
		web, err := s.watchAt(c.http)
		if err != nil {
			return err
		}
		defer web.Close()
	}
	data, err := openOrStop(ctx, c, s, log)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil
	case err != nil:
		return storeProblem(c, err)
	}
	all, err := listenFor(c, s, again)
	if err != nil {
		if data != nil {
			data.Close()
		}
		return err
	}
	applyLimits(s, c)
	if err := s.serve(slices.Concat(all...)...); err != nil {
		return err
	}
	tellStart(c, s, all)
	(&pacer{server: s}).begin()
	var failure error
	select {
	case <-ctx.Done():
		restore() // a second signal ends the process at once
	case <-data.Lost():
		failure = data.WhyLost()
	case failure = <-s.Failed():
	}
	if failure != nil {
		logFailure(log.Logger, c, failure)
	}
	return stopServer(c, log, s, data, failure)
}

// openOrStop opens the store that c asks for, unless ctx is done before. While it is opened
// nobody has been told anything, so nothing can be lost.
func openOrStop(ctx context.Context, c config, s *keyValueServer,
	log *queuedLog) (*durable.Store, error) {
	loading := context.AfterFunc(ctx, func() {
		log.Info("stopped while opening the data")
		time.AfterFunc(stopTime/5, func() { // the disk does not answer
			log.flush()
			os.Exit(0)
		})
	})
	defer loading()
	return openStore(ctx, c, s)
}

// stopServer ends s and its data, after a failure or none.
func stopServer(c config, log *queuedLog, s *keyValueServer, data *durable.Store,
	failure error) error {
	late := giveUp(log, data)
	s.Close()
	if data != nil {
		if err := data.Close(); err != nil && failure == nil {
			failure = err
			logFailure(log.Logger, c, failure)
		}
	}
	late.Stop()
	if failure != nil {
		return errLogged
	}
	return nil
}

// giveUp ends the process if it does not end within stopTime, or is writing all data anew.
func giveUp(log *queuedLog, data *durable.Store) *time.Timer {
	return time.AfterFunc(stopTime, func() {
		for data.IsHealing() {
			log.Warn("the end waits until all data is written anew; a second signal ends it at once")
			for data.IsHealing() {
				time.Sleep(stopTime / 50)
			}
			time.Sleep(stopTime) // for the rest
		}
		log.Error("stopping takes too long, giving up; what was not answered may not be kept",
			"limit", stopTime, "fsync", data.Syncing())
		log.flush()
		os.Exit(exitFailure)
	})
}

// pacer chooses how much garbage there may be before it is collected. Go lets the heap
// double; but nearly all of ours is data that a collection does not even read, so it
// costs little and may come sooner: the process takes a third less memory.
type pacer struct {
	server  *keyValueServer
	percent int // that was last set (GOGC)
}

// Bytes of garbage that there may be: garbageMin, one for garbageShare bytes of data, and as
// many as are in objects with pointers, for these are what a collection takes time for.
const garbageMin, garbageShare = 16 << 20, 16

// begin has the pacer do its work after each collection, from now on.
func (p *pacer) begin() {
	p.choose()
	p.wait()
}

// wait waits for the next collection: nothing points to an object, so its finalizer is
// run then.
func (p *pacer) wait() {
	type unused struct{ p *pacer }
	runtime.SetFinalizer(&unused{p}, func(*unused) { p.begin() })
}

// choose sets the collector's percentage, and tells the server what is alive.
func (p *pacer) choose() {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/heap:bytes"}}
	metrics.Read(samples)
	live, linked := int64(samples[0].Value.Uint64()), int64(samples[1].Value.Uint64())
	p.server.budget.collected(live)
	garbage := garbageMin + live/garbageShare + min(linked, live)
	percent := int(garbage * 100 / max(live, garbageMin/6)) // Go takes the least heap to be 4 MiB
	// Setting it stops everybody for a moment.
	if percent < p.percent*9/10 || percent > p.percent*10/9 {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
}

// logFailure logs that the store failed, and what to do about it.
func logFailure(log *slog.Logger, c config, err error) {
	var p problem
	errors.As(storeProblem(c, err), &p)
	log.Error("the data cannot be kept any more, so the server ends", "error", p.what,
		"todo", p.todo)
}

// applyLimits gives s the limits that c asks for, as far as the process may go.
func applyLimits(s *keyValueServer, c config) {
	s.maxLine, s.writeTimeout = int(c.maxLine), c.writeTimeout
	s.budget.limitTo(int64(c.maxMemory), int64(c.maxQueues))
	if c.maxMemory > 0 {
		debug.SetMemoryLimit(int64(c.maxMemory))
	}
	files := storage.OpenFiles() - spareFiles
	if c.http != "" {
		files -= maxWatchers
	}
	if s.tls != nil {
		s.handshakes = max(1, min(maxHandshakes, files/4))
		files -= s.handshakes
	}
	if s.maxClients = min(c.maxClients, files); s.maxClients < c.maxClients {
		s.maxClients = max(1, s.maxClients)
		s.log.Warn("fewer clients than asked for: the process may not open more files; raise the "+
			"limit with ulimit -n", "max_clients", s.maxClients, "asked", c.maxClients,
			"files", storage.OpenFiles())
	}
}

// tellStart logs what an operator should know of a server that begins to serve. all are its
// listeners, those of each address together.
func tellStart(c config, s *keyValueServer, all [][]net.Listener) {
	switch {
	case c.data == "":
		s.log.Info("data is in memory only and lost on exit")
	case etcd.IsAddress(c.data):
		s.log.Info("data is kept in etcd", "at", c.data)
	default:
		s.log.Info("data is kept on disk", "dir", c.data, "fsync", c.fsync)
	}
	for _, listeners := range all {
		addr := listeners[0].Addr()
		tcp, isTCP := addr.(*net.TCPAddr)
		if isTCP && !tcp.IP.IsLoopback() && c.clientCA == "" {
			s.log.Warn("anyone who can reach this address can read and change the data", "addr",
				addr.String())
		}
		if isTCP {
			s.log.Info("listening", "addr", addr.String(),
				"try", tryCommand(tcp, c.cert != "", c.clientCA != ""))
		} else {
			s.log.Info("listening", "addr", unixPrefix+addr.String(), "try", "nc -U "+addr.String())
		}
	}
}

// ---- the log

const (
	logLines  = 1000                   // of the log that may wait to be written
	flushTime = 200 * time.Millisecond // for them to be written at the end
)

// queuedLog is a log that nobody has to wait for. Whoever reads it may pause for
// ever: what then finds no room in the queue is counted, and dropped.
type queuedLog struct {
	*slog.Logger
	queue *logQueue
}

// logQueue is an io.Writer in front of another that may take long, or fail. Each
// Write is a line.
type logQueue struct {
	lines  chan logLine // Write and flush to writeLog; never closed
	lost   atomic.Int64 // lines since the last one that said so
	counts logCounts
}

// logCounts is what there was in the log so far, for who watches.
type logCounts struct {
	lost, errors atomic.Int64
	last         atomic.Int64 // when the last error was, as a Unix time; 0: there was none
}

// errorCounter is a slog.Handler that counts errors.
type errorCounter struct {
	slog.Handler
	counts *logCounts
}

func (e errorCounter) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelError {
		e.counts.errors.Add(1)
		e.counts.last.Store(r.Time.Unix())
	}
	return e.Handler.Handle(ctx, r)
}

// logLine is a line of log, or, if written is not nil, flush's question: it is closed
// when all lines before it have been written.
type logLine struct {
	text    []byte
	written chan struct{}
}

// newLog returns a log that writes to w.
func newLog(w io.Writer, json, verbose bool) *queuedLog {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if verbose {
		options.Level = slog.LevelDebug
	}
	handler := func(w io.Writer) slog.Handler {
		if json {
			return slog.NewJSONHandler(w, options)
		}
		return slog.NewTextHandler(w, options)
	}
	q := &logQueue{lines: make(chan logLine, logLines)}
	go q.writeLog(w, slog.New(handler(w)))
	return &queuedLog{slog.New(errorCounter{handler(q), &q.counts}), q}
}

// Write queues a line, or counts it as lost. It never waits.
func (q *logQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- logLine{text: bytes.Clone(line)}:
	default:
		q.lost.Add(1)
		q.counts.lost.Add(1)
	}
	return len(line), nil
}

// writeLog writes the lines to w, and says through log, which writes to w too, when
// some were lost. One goroutine for a log, until the process ends: it may wait for
// w for ever.
func (q *logQueue) writeLog(w io.Writer, log *slog.Logger) {
	for line := range q.lines {
		if line.written != nil {
			close(line.written)
			continue
		}
		if _, err := w.Write(line.text); err != nil {
			q.lost.Add(1)
			q.counts.lost.Add(1)
		} else if n := q.lost.Swap(0); n > 0 {
			log.Warn("lines of log were lost, for they could not be written in time", "lines", n)
		}
	}
}

// flush gives the lines that wait a little time to be written, at the end.
func (l *queuedLog) flush() {
	late := time.After(flushTime)
	written := make(chan struct{})
	select {
	case l.queue.lines <- logLine{written: written}:
	case <-late:
		return
	}
	select {
	case <-written:
	case <-late:
	}
}

// ---- listening

// listenFor listens where c says, for clients of s: it returns the listeners of each address.
// again is the signal to read the certificates anew.
func listenFor(c config, s *keyValueServer, again <-chan os.Signal) (all [][]net.Listener,
	err error) {
	if c.cert != "" {
		if s.tls, err = serverTLS(c, s.log, again); err != nil {
			return nil, err
		}
	}
	for _, addr := range strings.Split(c.addr, ",") {
		listeners, err := listen(addr)
		if err != nil {
			closeAll(slices.Concat(all...))
			return nil, listenProblem("addr", addr, err)
		}
		all = append(all, listeners)
	}
	return all, nil
}

// watchAt listens at addr for whoever watches s.
func (s *keyValueServer) watchAt(addr string) (io.Closer, error) {
	listeners, err := listen(addr)
	if err != nil {
		return nil, listenProblem("http", addr, err)
	}
	at := listeners[0].Addr().(*net.TCPAddr)
	if !at.IP.IsLoopback() {
		s.log.Warn("anyone who can reach this address can watch the server", "addr", at.String())
	}
	s.log.Info("watching", "metrics", "http://"+at.String()+"/metrics")
	host, _, _ := net.SplitHostPort(addr)
	return s.watch(listeners, host), nil
}

// fewConns is a listener with at most so many connections: one more takes the place of the
// oldest that has said nothing, or else of the oldest, so that nobody keeps others out.
type fewConns struct {
	net.Listener
	most   int
	guests []*guest // owned by Accept, which one goroutine calls; the oldest first
}

// guest is a connection of fewConns, as long as it has a place.
type guest struct {
	net.Conn
	spoke atomic.Bool // a byte has come
	left  atomic.Bool // it has no place any more
}

// Accept waits for a connection.
func (f *fewConns) Accept() (net.Conn, error) {
	conn, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}

	// Make room.
	if len(f.guests) == f.most {
		f.guests = slices.DeleteFunc(f.guests, func(g *guest) bool { return g.left.Load() })
	}
	if len(f.guests) == f.most {
		i := slices.IndexFunc(f.guests, func(g *guest) bool { return !g.spoke.Load() })
		f.guests[max(i, 0)].Close()
		f.guests = slices.Delete(f.guests, max(i, 0), max(i, 0)+1)
	}

	g := &guest{Conn: conn}
	f.guests = append(f.guests, g)
	return g, nil
}

// leave gives up the place. It returns whether there was one.
func (g *guest) leave() bool { return g.left.CompareAndSwap(false, true) }

// Read reads, and notes that something has come.
func (g *guest) Read(p []byte) (n int, err error) {
	if n, err = g.Conn.Read(p); n > 0 {
		g.spoke.Store(true)
	}
	return n, err
}

// Close closes the connection, unless it has gone on without its place.
func (g *guest) Close() error {
	if !g.leave() {
		return nil
	}
	return g.Conn.Close()
}

// listen listens on addr. Peers that vanish are noticed within 35 s: keep-alive
// asks after 15 s of silence, then three times at intervals of 5 s. The host localhost
// means 127.0.0.1 and ::1, where both exist, whatever the system makes of that name: many
// clients try only one of the two.
func listen(addr string) (listeners []net.Listener, err error) {
	if path, isUnix := strings.CutPrefix(addr, unixPrefix); isUnix {
		listener, err := listenUnix(path)
		if err != nil {
			return nil, err
		}
		return []net.Listener{listener}, nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}

	isAnyPort := port == "0"
	var missing error
	for _, host := range hosts {
		addr := net.JoinHostPort(host, port)
		listener, err := config.Listen(context.Background(), "tcp", addr)
		switch {
		case err == nil:
			listeners = append(listeners, listener)
			_, port, _ = net.SplitHostPort(listener.Addr().String()) // the same for the next
		case isMissing(err):
			missing = err
		case isAnyPort && len(listeners) > 0: // the port that is free on the first is not here
		default:
			closeAll(listeners)
			return nil, err
		}
	}
	if len(listeners) == 0 {
		return nil, missing
	}
	return listeners, nil
}

// socketMode lets the user and the group of a unix socket connect.
const socketMode = 0o660

// errNoSocket is listenUnix's where there is a file of another kind.
var errNoSocket = errors.New("there is a file that is no socket")

// listenUnix listens on a unix socket at path, in the place of one whose server has died.
// Close removes it.
func listenUnix(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, errNoSocket
		}
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		} else if isRefused(err) { // nobody listens there any more
			os.Remove(path)
		}
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, socketMode); err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// closeAll closes listeners.
func closeAll(listeners []net.Listener) {
	for _, listener := range listeners {
		listener.Close()
	}
}

// isMissing tells whether the machine does not have the address, or none of its kind.
func isMissing(err error) bool {
	return isNoAddress(err) || errors.Is(err, syscall.EAFNOSUPPORT) ||
		errors.Is(err, syscall.EPROTONOSUPPORT)
}

// isInUse tells whether somebody else listens there, and isNoAddress whether the machine does
// not have the address: Windows calls these WSAEADDRINUSE and WSAEADDRNOTAVAIL.
func isInUse(err error) bool {
	return errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.Errno(10048))
}

func isNoAddress(err error) bool {
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.Errno(10049))
}

// isRefused tells whether nobody listens there: Windows calls it WSAECONNREFUSED.
func isRefused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.Errno(10061))
}

// ---- the store

// openStore gives s the store that c asks for. It returns it where it is to be closed: nil
// where nothing is kept.
func openStore(ctx context.Context, c config, s *keyValueServer) (*durable.Store, error) {
	if c.data == "" {
		s.db = kvstore.NewMemory()
		return nil, nil
	}
	dir, err := openDirectory(ctx, c.data, etcd.Options{Addr: c.addr, Log: s.log, Status: s.status})
	if err != nil {
		return nil, err
	}
	fsync, _ := parseFsync(c.fsync) // which has been looked at
	d, err := durable.Open(ctx, dir, durable.Options{Fsync: fsync, Log: s.log, Status: s.status})
	if err != nil {
		dir.Close()
		return nil, err
	}
	s.db = d
	return d, nil
}

// openDirectory opens a directory of the file system, or one in an etcd cluster.
func openDirectory(ctx context.Context, path string, opts etcd.Options) (storage.Directory, error) {
	if etcd.IsAddress(path) {
		return etcd.Open(ctx, path, opts)
	}
	return storage.OpenDisk(path, opts.Log)
}

// storeProblem says what to do about a store's error.
func storeProblem(c config, err error) error {
	dir := c.data
	var damage *storage.DamageError
	todo := "Mend the cause, then start again: everything that was answered is on disk."
	switch c.fsync {
	case "always":
	case "": // a command, which has answered nothing
		todo = "Mend the cause, then try again."
	default:
		todo = "Mend the cause, then start again. With -fsync " + c.fsync +
			" the last that was answered may not be on disk: look what is there."
	}
	switch {
	case errors.Is(err, etcd.ErrTakenOver):
		todo = "Nothing is lost. Start again, to stand by. This server was too slow to show that " +
			"it lives: was it paused, or cut off?"
	case errors.Is(err, etcd.ErrUnreachable):
		todo = "Everything that was answered is in etcd. Look whether the cluster runs, has a " +
			"leader, and is at these addresses (with TLS: etcds://): etcdctl endpoint status " +
			"--cluster"
	case errors.Is(err, etcd.ErrRefused):
		todo = "Look at the address in -data (etcds:// for TLS, with " +
			"?ca=FILE&cert=FILE&key=FILE) and at KVSERVER_ETCD_USER=name:password."
	case etcd.IsAddress(dir) && errors.Is(err, syscall.ENOSPC):
		todo = "etcd is full: compact and defragment it, raise its --quota-backend-bytes, and " +
			"then: etcdctl alarm disarm"
	case errors.Is(err, etcd.ErrAddress):
		todo = "Give the members and a prefix, as in -data " +
			"etcd://host1:2379,host2:2379,host3:2379/kv"
	case errors.Is(err, storage.ErrMoved):
		todo = "Put the directory back, or look who took it, before you start again. What was " +
			"answered is in the directory that was moved."
	case errors.Is(err, durable.ErrOlder):
		todo = "Nothing was changed. Start that kvserver, and bring its data here with kvserver " +
			"-c Dump."
	case errors.Is(err, storage.ErrMissing):
		todo = "Create it: mkdir -m 700 " + dir
	case errors.Is(err, storage.ErrNotOurs):
		todo = "Nothing was changed. Give an empty directory, or one that kvserver made."
	case errors.Is(err, storage.ErrLocked):
		todo = "Nothing was changed. Stop that process first, or give another directory."
	case errors.Is(err, durable.ErrNothingRead):
		todo = "Restore a backup. Where there is none the data is lost: start with an empty directory."
	case errors.Is(err, durable.ErrUnfinished):
		todo = "Nothing was changed. If it was a copy, make it again, into an empty directory; " +
			"remove what is there only if you want to start empty."
	case errors.Is(err, durable.ErrNewer):
		todo = "Nothing was changed. Start the newer kvserver."
	case errors.Is(err, fs.ErrPermission):
		todo = "Start as the user who owns it, or give that user the right to read and write it."
	case errors.As(err, &damage):
		todo = "Nothing was changed. Restore a backup, or save what can be saved: kvserver " +
			"repair " + dir + " NEW"
	}
	return problem{err.Error(), todo}
}

// runCommand runs the check, repair or backup command and returns the exit code.
func runCommand(command string, args []string) int {
	needs, want := "one data directory", 1
	switch command {
	case "backup":
		needs, want = "a data directory and a new one for the copy", 2
	case "repair":
		needs, want = "a data directory, which it only reads, and a new one for what it saves", 2
	}
	if len(args) != want || slices.ContainsFunc(args,
		func(arg string) bool { return strings.HasPrefix(arg, "-") }) {
		example := map[string]string{"check": "data", "repair": "data new",
			"backup": "data copy"}[command]
		printError(os.Stderr, problem{command + " needs " + needs,
			"Give the one that the server has, as in kvserver " + command + " " + example + "."})
		return exitMisuse
	}
	dir := args[0]
	report, err := lookAt(command, dir, args[len(args)-1])
	for _, line := range report.Lines {
		fmt.Println(line)
	}
	switch {
	case errors.Is(err, storage.ErrMissing):
		printError(os.Stderr, problem{err.Error(),
			"Give the directory that the server has as -data."})
	case command != "check" && errors.Is(err, storage.ErrNotOurs):
		printError(os.Stderr, problem{err.Error(),
			"Nothing was copied. Give a store, and a new or an empty directory that is not " +
				"inside it."})
	case command != "check" && err != nil && !errors.As(err, new(*storage.DamageError)) &&
		!errors.Is(err, durable.ErrNothingRead):
		printError(os.Stderr, problem{err.Error(),
			"Nothing was copied. Mend the cause, then try again."})
	case err != nil:
		printError(os.Stderr, storeProblem(config{data: dir}, err))
	case report.Damaged && command == "check":
		printError(os.Stderr, problem{dir + " is damaged",
			"Restore a backup, or save what can be saved: kvserver repair " + dir + " NEW"})
	case report.Lost:
		printError(os.Stderr, problem{"some of what was in " + dir + " is lost",
			"What was saved opens. Look at what is back: what is lost may have been a Delete."})
	default:
		return 0
	}
	return exitFailure
}

// lookAt runs the command on the store at path; to is where a copy goes.
func lookAt(command, path, to string) (report durable.Report, err error) {
	dir, err := openDirectory(context.Background(), path, etcd.Options{})
	if err != nil {
		return report, err
	}
	defer dir.Close()
	switch command {
	case "check":
		return durable.Check(dir)
	}
	out, undo, err := makeTarget(path, to)
	if err != nil {
		return report, err
	}
	if command == "repair" {
		report, err = durable.Repair(dir, out)
	} else {
		report, err = backUp(dir, out)
	}
	out.Close()
	if err != nil {
		undo()
	}
	return report, err
}

// makeTarget makes the directory for a copy of the store at path. undo removes what it made.
func makeTarget(path, to string) (out storage.Directory, undo func(), err error) {
	switch {
	case !etcd.IsAddress(to) && etcd.IsAddress(path):
		return storage.MakeDisk(to, "")
	case !etcd.IsAddress(to):
		return storage.MakeDisk(to, path)
	case etcd.Overlap(path, to):
		return nil, nil, fmt.Errorf("%w: %s is inside the store that is to be copied, or around it",
			storage.ErrNotOurs, to)
	}
	out, err = etcd.Open(context.Background(), to, etcd.Options{})
	return out, func() {}, err
}

// backUp copies a store, and on a terminal says how far it is.
func backUp(dir, out storage.Directory) (durable.Report, error) {
	var step func(copied, total int64)
	if isTerminal(os.Stderr) {
		told := time.Now()
		step = func(copied, total int64) {
			if now := time.Now(); now.Sub(told) >= time.Second/4 {
				told = now
				fmt.Fprintf(os.Stderr, "\r%d of about %d MB ", copied>>20, max(total, copied)>>20)
			}
		}
		defer fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	return durable.Backup(dir, out, step)
}

// stopSignals are the signals that stop the server. SIGHUP is one where the terminal that
// is closed has our log; elsewhere it has the certificates read anew.
func stopSignals() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if isTerminal(os.Stderr) && !signal.Ignored(syscall.SIGHUP) { // nohup has it ignored
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// tryCommand is what to type to reach addr.
func tryCommand(addr *net.TCPAddr, encrypted, mutual bool) string {
	host := addr.IP.String()
	if addr.IP.IsUnspecified() {
		host = "localhost"
	}
	if mutual {
		return "openssl s_client -quiet -cert FILE -key FILE " + net.JoinHostPort(host,
			strconv.Itoa(addr.Port))
	} else if encrypted {
		return "openssl s_client -quiet " + net.JoinHostPort(host, strconv.Itoa(addr.Port))
	}
	return fmt.Sprintf("nc %s %d", host, addr.Port)
}

// listenProblem says what to do about the error of listening where a flag says.
func listenProblem(name, addr string, err error) error {
	if path, isUnix := strings.CutPrefix(addr, unixPrefix); isUnix {
		return socketProblem(path, err)
	}
	host, port, _ := net.SplitHostPort(addr)
	var dns *net.DNSError
	todo := "Choose another address: kvserver -" + name + " localhost:9999"
	who := ""
	switch {
	case isInUse(err):
		who = userOf(port)
		todo = fmt.Sprint("Stop it, or choose another port: -", name, " ",
			strings.TrimPrefix(freeAddr(host, port), "localhost:"))
	case errors.Is(err, syscall.EACCES):
		todo = "Ports below 1024 are for the administrator. Choose another: kvserver -" + name +
			" 9999"
	case errors.As(err, &dns):
		todo = fmt.Sprintf("Nobody knows the host %q. Choose localhost, or leave the host out to "+
			"listen everywhere: kvserver -%s :%s", host, name, port)
	case isNoAddress(err):
		todo = "This machine does not have that address. Choose localhost, or leave the host out " +
			"to listen everywhere: kvserver -" + name + " :" + port
	}
	var op *net.OpError
	if errors.As(err, &op) { // "listen tcp ADDR:" says again what we say
		err = op.Err
	}
	return problem{fmt.Sprintf("cannot listen on %s: %v%s", addr, err, who), todo}
}

// socketProblem says what to do about the error of listening on a unix socket.
func socketProblem(path string, err error) error {
	todo := "Choose another path: kvserver -addr unix:/run/kvserver/sock"
	switch dir := filepath.Dir(path); {
	case isInUse(err):
		todo = "Stop the server that has it, or choose another path."
	case errors.Is(err, errNoSocket):
		todo = "Nothing was changed. Choose another path, or remove the file if nobody needs it."
	case errors.Is(err, syscall.EINVAL):
		err = fmt.Errorf("the path of a socket may have about 100 bytes, and this has %d", len(path))
		todo = "Choose a shorter one, as in -addr unix:/run/kvserver/sock"
	case errors.Is(err, fs.ErrNotExist):
		todo = "Create the directory: mkdir -p " + dir
	case errors.Is(err, fs.ErrPermission):
		todo = "Start as a user who may write in " + dir + ", or choose another path."
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) { // "listen unix PATH:" says it again
		err = op.Err
	}
	return problem{fmt.Sprintf("cannot listen on %s%s: %v", unixPrefix, path, err), todo}
}

// freeAddr is an address of host with a port above port that nobody has, and that no flag
// of ours has unless told.
func freeAddr(host, port string) string {
	n, _ := strconv.Atoi(port)
	for n = max(n, 1023) + 1; n < 65536; n++ {
		addr := net.JoinHostPort(host, strconv.Itoa(n))
		if n == 9999 {
			continue
		}
		if listeners, err := listen(addr); err == nil {
			closeAll(listeners)
			return addr
		}
	}
	return net.JoinHostPort(host, "0")
}

// userOf says which process listens on port, where Linux's /proc tells us.
func userOf(port string) string {
	n, _ := strconv.Atoi(port)
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		table, _ := os.ReadFile(file)
		for line := range strings.Lines(string(table)) {
			// number, local address, other, state (0A: listening), ..., inode
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) {
				continue
			}
			descriptors, _ := filepath.Glob("/proc/[0-9]*/fd/*")
			for _, d := range descriptors {
				if to, _ := os.Readlink(d); to == "socket:["+f[9]+"]" {
					pid := strings.Split(d, "/")[2]
					name, _ := os.ReadFile("/proc/" + pid + "/comm")
					return fmt.Sprintf(" by process %s (%s)", pid, strings.TrimSpace(string(name)))
				}
			}
		}
	}
	return ""
}

// beClient is kvserver -c and -ping. Where the server refused something it has said
// so already, and only the exit code tells.
func beClient(c config, errs io.Writer) error {
	conn, err := dial(&c)
	if err != nil {
		return err
	}
	defer conn.Close()
	if c.ping {
		conn.SetDeadline(time.Now().Add(cmp.Or(c.timeout, connectTime)))
		c.requests = []string{"Ping"}
	}
	t := talker{conn: conn, requests: c.requests, in: os.Stdin, out: os.Stdout, errs: errs,
		stops: c.stop, silence: c.timeout, flags: os.Args[1:]}
	t.isTyped = len(c.requests) == 0 && isTerminal(os.Stdin)
	t.tells = isTerminal(os.Stderr) && !t.isTyped
	if t.isTyped {
		fmt.Fprintf(errs, "connected to %s; Help lists the requests, Ctrl-D ends\n", c.addr)
		defer fmt.Fprintln(errs)
	}
	ctx, restore := signal.NotifyContext(context.Background(), os.Interrupt)
	defer restore()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	good, err := t.converse()
	switch {
	case err == nil && !good:
		os.Exit(exitFailure)
	case c.ping && errors.Is(err, errFull): // it is healthy
		fmt.Fprintln(errs, "it answers, and has no room for a client")
		return nil
	case ctx.Err() != nil && err != nil:
		err = errInterrupted
	}
	return t.problem(c, err)
}

// problem says what to do about an error of converse.
func (t *talker) problem(c config, err error) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf("%s: %v", c.addr, err)
	through := t.through()
	upTo := fmt.Sprintf("; answered through line %d of the input", through)
	how := fmt.Sprintf("tail -n +%d FILE | kvserver %s", through+1, strings.Join(t.flags, " "))
	if through == 0 {
		upTo = "; nothing of the input was answered"
		how = "kvserver " + strings.Join(t.flags, " ") + " < FILE"
	}
	switch {
	case errors.Is(err, errOutput):
		return problem{what, "Make room where the answers go, and look what was done."}
	case errors.Is(err, errSilent):
		return problem{what, "Perhaps it speaks TLS: give the CA of its certificate as -tls-ca. " +
			"Or it has just ended: look at its log."}
	case errors.As(err, new(tls.AlertError)), strings.Contains(err.Error(), "remote error: tls: "):
		if c.cert != "" {
			return problem{what, "It does not trust the certificate in " + c.cert +
				": give one of the CA that it wants."}
		}
		return problem{what,
			"It wants a certificate that it trusts from us: give -tls-cert and -tls-key."}
	case errors.Is(err, errStranger):
		return problem{what, "Nothing was done. Look at -addr, or try again later."}
	case len(t.requests) > 0 && errors.Is(err, errStopped):
		return problem{what, "Nothing behind the request with the error was sent. Mend it first."}
	case len(t.requests) > 0 && t.onlyReads():
		return problem{what, "Nothing was to be changed: try again."}
	case len(t.requests) > 0:
		return problem{what,
			"What was answered is done. Of the rest nothing is known: look, then send it again."}
	case errors.Is(err, errGone) && t.isTyped:
		return problem{what, "All that was sent is answered. Start it again, then go on."}
	case errors.Is(err, errGone):
		return problem{what + upTo, "That is all that was sent. Start it again, then go on: " + how}
	case errors.Is(err, errStopped):
		return problem{what + upTo,
			"Nothing after the line with the error was sent. Mend it, then go on: " + how}
	}
	return problem{what + upTo,
		"What was answered is done. Of the rest nothing is known: look, then go on: " + how}
}

// onlyReads tells whether no request is a write.
func (t *talker) onlyReads() bool {
	return !slices.ContainsFunc(t.requests, func(line string) bool {
		q := Query{}
		q.parse(line)
		return q.writes()
	})
}

// dial connects to the first server at c.addr that serves, which becomes c.addr.
func dial(c *config) (conn net.Conn, err error) {
	config, err := clientTLS(*c)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: cmp.Or(c.timeout, connectTime)}
	connect := func(addr string) (net.Conn, error) {
		path, isUnix := strings.CutPrefix(addr, unixPrefix)
		switch {
		case isUnix:
			return dialer.Dial("unix", path)
		case config == nil:
			return dialer.Dial("tcp", addr)
		}
		return tls.DialWithDialer(dialer, "tcp", addr, config)
	}
	addrs := strings.Split(c.addr, ",")
	for _, addr := range addrs {
		host, port, splitErr := net.SplitHostPort(addr)
		if ip := net.ParseIP(host); splitErr == nil &&
			(host == "" || ip != nil && ip.IsUnspecified()) {
			host = "localhost" // as a server's address it means everywhere
			addr = net.JoinHostPort(host, port)
		}
		if host == "localhost" {
			if _, err := net.LookupHost(host); err != nil { // no /etc/hosts
				addr = net.JoinHostPort("127.0.0.1", port)
			}
		}
		conn, err = connect(addr)
		if err == nil && len(addrs) > 1 { // a server that stands still connects, too
			err = tryOut(conn, dialer.Timeout)
			conn.Close()
			if err == nil {
				conn, err = connect(addr)
			}
		}
		if err == nil {
			c.addr = addr
			return conn, nil
		}
	}
	todo := "Start a server: kvserver -addr " + c.addr + "   or name one that runs: -addr HOST:PORT"
	if strings.Contains(c.addr, ",") {
		todo = "None of them serves. One that stands by does not listen."
	}
	var dns *net.DNSError
	var name x509.HostnameError
	op := (*net.OpError)(nil)
	if isOp := errors.As(err, &op); len(addrs) == 1 && (!isOp || op.Op != "dial") {
		todo = "Somebody answers there. Give the CA of its certificate as -tls-ca, or no -tls-ca " +
			"if it speaks no TLS."
	} else if isOp {
		err = op.Err
	}
	switch {
	case errors.As(err, &dns):
		todo = fmt.Sprintf("Nobody knows the host %q. Give one that runs a server: -addr HOST:PORT",
			dns.Name)
	case errors.As(err, &name):
		todo = "Call the server as its certificate does, or give it a certificate with this name."
	}
	return nil, problem{fmt.Sprintf("cannot connect to %s: %v", c.addr, err), todo}
}

// tryOut tells whether a server is behind conn and answers in time.
func tryOut(conn net.Conn, limit time.Duration) error {
	conn.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(conn, "Ack\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadSlice('\n')
	if err != nil {
		return err
	}
	if err := checkWelcome(line); !errors.Is(err, errFull) { // it is healthy
		return err
	}
	return nil
}

// keyPair is what a server shows, and whom it trusts, as the files say now.
type keyPair struct {
	c       config
	log     *slog.Logger
	current atomic.Pointer[tls.Config]
	looked  []fileState // of what is in current
	warned  time.Time   // of the end
}

// fileState tells whether a file is another one than before.
type fileState struct {
	changed time.Time
	size    int64
}

// Times of certificates.
const (
	lookAgain = 10 * time.Second    // between two looks at the files
	warnAhead = 14 * 24 * time.Hour // before the end
	warnAgain = 24 * time.Hour      // between two warnings
)

// serverTLS reads the server's certificate and, if clients must show one, whose. From then
// on it reads them anew when they change, or again says so: connections that are there
// stay.
func serverTLS(c config, log *slog.Logger, again <-chan os.Signal) (*tls.Config, error) {
	k := &keyPair{c: c, log: log}
	if err := k.read(); err != nil {
		return nil, err
	}
	go k.watch(again)
	now := func(*tls.ClientHelloInfo) (*tls.Config, error) { return k.current.Load(), nil }
	return &tls.Config{GetConfigForClient: now}, nil
}

// state is that of the files now.
func (k *keyPair) state() (states []fileState) {
	for _, file := range []string{k.c.cert, k.c.key, k.c.clientCA} {
		var state fileState
		if info, err := os.Stat(file); err == nil {
			state = fileState{info.ModTime(), info.Size()}
		}
		states = append(states, state)
	}
	return states
}

// read reads the files, and warns when the certificate is about to end. If it fails all is
// as before.
func (k *keyPair) read() error {
	state := k.state()
	config, err := ownTLS(k.c)
	if err == nil && k.c.clientCA != "" {
		config.ClientAuth = tls.RequireAndVerifyClientCert
		config.ClientCAs, err = readCA(k.c.clientCA)
	}
	k.looked = state // also if they are bad: one complaint for each change
	if err == nil {
		k.current.Store(config)
		k.warned = time.Time{}
		k.warn(time.Now())
	}
	return err
}

// warn logs when the certificate ends, if that is soon and was not said today.
func (k *keyPair) warn(now time.Time) {
	end := k.current.Load().Certificates[0].Leaf.NotAfter
	switch {
	case now.Before(k.warned.Add(warnAgain)):
		return
	case k.warned.IsZero() && now.Before(end.Add(-warnAhead)):
		k.log.Info("the certificate is read", "file", k.c.cert, "until", end)
	case now.Before(end.Add(-warnAhead)):
		return
	case now.Before(end):
		k.log.Warn("the certificate ends soon; put a new one into its file, it is read at once",
			"file", k.c.cert, "until", end)
	default:
		k.log.Error("the certificate has ended, clients will refuse it; put a new one into its "+
			"file, it is read at once", "file", k.c.cert, "until", end)
	}
	k.warned = now
}

// watch reads the files anew when they change, or again says so. One goroutine, until again
// is closed, or the process ends.
func (k *keyPair) watch(again <-chan os.Signal) {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if k.warn(time.Now()); slices.Equal(k.state(), k.looked) {
				continue
			}
		case _, ok := <-again:
			if !ok {
				return
			}
		}
		if err := k.read(); err != nil {
			k.log.Warn("the certificates cannot be read anew, so those from before stay",
				"error", err)
		}
	}
}

// clientTLS is the same for -c: nil without -tls-ca.
func clientTLS(c config) (*tls.Config, error) {
	if c.ca == "" {
		return nil, nil
	}
	pool, err := readCA(c.ca)
	if err != nil {
		return nil, err
	}
	config, err := ownTLS(c)
	if err == nil {
		config.RootCAs = pool
	}
	return config, err
}

// ownTLS shows our own certificate, if there is one.
func ownTLS(c config) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.cert == "" {
		return config, nil
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, problem{fmt.Sprintf("cannot read the certificate %s with the key %s: %v",
			c.cert, c.key,
			err), "Give two files in PEM format that belong together; the README shows how to " +
			"make them."}
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}

// readCA reads certificates to be trusted.
func readCA(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	pool := x509.NewCertPool()
	if err == nil && !pool.AppendCertsFromPEM(pem) {
		err = errors.New(file + " holds no certificate")
	}
	if err != nil {
		return nil, problem{fmt.Sprintf("cannot read the CA: %v", err),
			"Give a file in PEM format; the README shows how to make one."}
	}
	return pool, nil
}

// isTerminal tells whether somebody looks at f.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull) // a device, too
	return err != nil || !os.SameFile(info, null)
}

// ---- the client: kvserver -c

// Errors of converse.
var (
	errStranger   = errors.New("no welcome")
	errFull       = fmt.Errorf("%w: it has no room for a client", errStranger)
	errSilent     = errors.New("it closed the connection without a word")
	errUnanswered = errors.New("it closed the connection before everything was answered")
	errGone       = errors.New("it closed the connection")
	errQuiet      = errors.New("no answer")
	errStopped    = errors.New("stopped at the first error")
	errOutput     = errors.New("cannot write the answers")

	errInterrupted = errors.New("interrupted")
)

// talker is one conversation of kvserver -c: it sends requests to a server and shows the
// answers. One goroutine sends and one reads, so neither side waits for the other to finish.
type talker struct {
	conn      net.Conn
	requests  []string // what to send; none: the lines of in
	in        io.Reader
	out, errs io.Writer     // for data, and for all that is none
	isTyped   bool          // somebody types: there is a prompt, and a write is confirmed
	tells     bool          // how many requests are answered so far, on a line of errs
	stops     bool          // at the first error: each request waits for the one before
	flags     []string      // that we were started with, for what to do next
	silence   time.Duration // without an answer, that is too much; 0: none is

	told  bool          // the line about progress is there
	mayGo chan struct{} // reader to sender, where stops: the next request may go. One slot
	sent  chan ledger   // it, where nobody writes in it. One slot
	end   chan sending  // sender to reader: all is sent, or not. One slot
}

// ledger is what was sent and what was answered. Sender and reader write in it in turns: who
// has taken it out of its channel owns it, until it is put back.
type ledger struct {
	owed     int   // requests without an answer
	answered int   // requests with one; the first is our Ack
	lines    int   // that were read
	blank    []run // which of them are no requests
}

// run is so many lines in a row, from first on.
type run struct{ first, n int }

// addRun adds lines to runs, which they follow.
func addRun(runs []run, more run) []run {
	if n := len(runs); n > 0 && runs[n-1].first+runs[n-1].n == more.first {
		runs[n-1].n += more.n
		return runs
	}
	return append(runs, more)
}

// count takes note of what was sent and of so many answers. Where a silence may be too long,
// the time for the next answer begins.
func (t *talker) count(sent ledger, answers int) (owed, answered int) {
	l := <-t.sent
	wasIdle := l.owed == 0
	l.owed += sent.owed - answers
	l.answered += answers
	l.lines = max(l.lines, sent.lines)
	for _, more := range sent.blank {
		l.blank = addRun(l.blank, more)
	}
	switch {
	case t.silence == 0:
	case l.owed == 0:
		t.conn.SetReadDeadline(time.Time{})
	case wasIdle || answers > 0:
		t.conn.SetReadDeadline(time.Now().Add(t.silence))
	}
	t.sent <- l
	return l.owed, l.answered
}

// through is the last line of the input that was answered.
func (t *talker) through() (line int) {
	if t.sent == nil { // nothing was sent
		return 0
	}
	l := <-t.sent
	line = max(l.answered-1, 0) // but for our Ack
	for _, blank := range l.blank {
		if blank.first > line+1 || l.answered == 0 {
			break
		}
		line += blank.n
	}
	t.sent <- l
	return line
}

// converse has the conversation. It returns whether all requests were answered, none with
// an error.
func (t *talker) converse() (good bool, err error) {
	if len(t.requests) > 0 {
		t.in = strings.NewReader(strings.Join(t.requests, "\n") + "\n")
	}
	t.mayGo, t.end = make(chan struct{}, 1), make(chan sending, 1)
	t.sent = make(chan ledger, 1)
	t.sent <- ledger{}
	if t.silence == 0 {
		t.conn.SetReadDeadline(time.Now().Add(connectTime))
	}
	go t.sendLines()
	defer close(t.mayGo)

	r, w := bufio.NewReaderSize(t.conn, maxWrite), bufio.NewWriterSize(t.out, maxWrite)
	good = true
	welcome := false
	for start := true; ; {
		if r.Buffered() == 0 {
			t.clear()
			if err := w.Flush(); err != nil {
				return false, fmt.Errorf("%w: %w", errOutput, err)
			}
		}
		// A line longer than the buffer comes in parts; its first says what it is.
		part, err := r.ReadSlice('\n')
		switch {
		case err != nil && err != bufio.ErrBufferFull:
			t.clear()
			w.Flush()
			return t.ended(err, welcome, good)
		case welcome:
			isAnswer, isError := t.show(w, part, start)
			if good = good && !isError; isError && t.stops {
				return false, errStopped
			}
			if isAnswer {
				t.answered(w)
			}
		default:
			if err := checkWelcome(part); err != nil {
				return false, err
			}
			if welcome = true; t.silence == 0 {
				t.conn.SetReadDeadline(time.Time{})
			}
			t.answered(w)
		}
		start = err == nil
	}
}

// show shows a line that the server has sent, or a part of one. It tells whether that ends
// the answer to a request, and whether that is an error.
func (t *talker) show(w *bufio.Writer, part []byte, start bool) (isAnswer, isError bool) {
	switch {
	case !start || part[0] != ':':
		w.Write(part)
		return false, false
	case bytes.HasPrefix(part, []byte(": ")):
		w.Write(part[2:])
		return false, false
	case bytes.HasPrefix(part, []byte(":ERROR line ")):
		number, why, _ := strings.Cut(string(part[len(":ERROR line "):]), ":")
		n, _ := strconv.Atoi(number)
		t.clear()
		w.Flush()
		fmt.Fprintf(t.errs, "line %d:%s", n-1, why) // our Ack was line 1
		return true, true
	case bytes.HasPrefix(part, []byte(":PONG")) || t.isTyped: // or :OK
		w.Write(part)
	}
	return true, false
}

// answered takes note of an answer.
func (t *talker) answered(w *bufio.Writer) {
	owed, n := t.count(ledger{}, 1)
	if t.stops {
		t.mayGo <- struct{}{}
	}
	if t.isTyped && owed == 0 {
		w.Flush()
		fmt.Fprint(t.errs, prompt)
	}
	if n--; t.tells && n > 0 && n%100_000 == 0 { // but for our Ack
		t.told = true
		fmt.Fprintf(t.errs, "\r%d requests answered", n)
	}
}

const prompt = "> "

// clear takes the line about progress away, before something else is written.
func (t *talker) clear() {
	if t.told {
		t.told = false
		fmt.Fprint(t.errs, "\r\x1b[K")
	}
}

// ended is what a conversation comes to whose connection gives err: the server's end if
// that is io.EOF.
func (t *talker) ended(err error, welcome, good bool) (bool, error) {
	isReset := !errors.Is(err, io.EOF)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, fmt.Errorf("%w for %v", errQuiet, cmp.Or(t.silence, connectTime))
	case !welcome && isReset:
		return false, err
	case !welcome:
		return false, errSilent
	}
	unanswered := errUnanswered
	if isReset { // as a killed server's
		unanswered = fmt.Errorf("%w: %w", errUnanswered, err)
	}
	owed, _ := t.count(ledger{}, 0)
	select {
	case s := <-t.end:
		switch {
		case owed > 0:
			return false, unanswered
		case s.err != io.EOF:
			return false, fmt.Errorf("reading the requests: %w", s.err)
		}
		if s.more != nil {
			select {
			case s.left = <-s.more:
			case <-time.After(moreTime): // somebody types
			}
		}
		if s.left {
			fmt.Fprintf(t.errs, "line %d: not sent, for it comes after a Quit\n", s.lines+1)
		}
		return good && !s.left, nil
	default: // the input goes on
		if owed == 0 {
			return false, errGone
		}
		return false, unanswered
	}
}

// checkWelcome tells whether the first line that comes is a kvserver's answer to
// an Ack.
func checkWelcome(line []byte) error {
	if bytes.HasPrefix(line, []byte(":OK ")) {
		return nil
	}
	if len(line) > 1 && line[0] == tlsAlert && line[1] == 3 {
		return errSilent
	}
	if why, full := bytes.CutPrefix(line, []byte(":ERROR line 0: ")); full {
		return fmt.Errorf("%w: %s", errFull, bytes.TrimSpace(why))
	}
	return fmt.Errorf("%w: this is no kvserver, it says %.40q", errStranger, line)
}

// tlsAlert is the first byte of what a server of TLS says to who does not speak it (RFC
// 8446, 5.1); its version comes next, 3.
const tlsAlert = 0x15

// sending is how the sender has ended.
type sending struct {
	lines int   // that were read
	left  bool  // there was more behind a Quit
	err   error // that the input ended in, or io.EOF

	// The sender tells here, later, whether there was more; nil: it knows already.
	more chan bool
}

// moreTime is how long to wait for that.
const moreTime = 100 * time.Millisecond

// fullReader knows whether the last Read filled all the room that it was given: then
// more is likely to be there.
type fullReader struct {
	io.Reader
	full bool
}

func (f *fullReader) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	f.full = n == len(p)
	return n, err
}

// mayGoOn waits for the answer to what was sent. It is false if there comes none, or an
// error.
func (t *talker) mayGoOn() bool {
	_, ok := <-t.mayGo
	return ok
}

// sendLines sends the input to the server until its end or a Quit, flushes whenever that
// has nothing more to say for now, and then tells how it ended. One goroutine a
// conversation.
func (t *talker) sendLines() {
	input := &fullReader{Reader: t.in}
	r, w := bufio.NewReaderSize(input, maxWrite), bufio.NewWriterSize(t.conn, maxWrite)
	w.WriteString("Ack\n")
	s := sending{err: io.EOF}
	inHand := ledger{owed: 1} // what is in w
	note := func() {
		t.count(inHand, 0)
		inHand.owed, inHand.blank = 0, nil
	}
	flush := func() error {
		note()
		return w.Flush()
	}
	for start, more := true, true; more; {
		if here, _ := r.Peek(r.Buffered()); bytes.IndexByte(here, '\n') < 0 && flush() != nil {
			break // or the next Read may keep the server waiting
		}
		part, err := r.ReadSlice('\n')
		ends := len(part) > 0 && part[len(part)-1] == '\n'
		if start && len(part) > 0 {
			line := trimCR(strings.TrimSuffix(string(part[:min(len(part), 8)]), "\n"))
			isBlank := line == "" && ends
			inHand.lines++
			switch {
			case isBlank:
				inHand.blank = addRun(inHand.blank, run{inHand.lines, 1})
				if t.isTyped {
					fmt.Fprint(t.errs, prompt)
				}
			case t.stops && (flush() != nil || !t.mayGoOn()):
				t.end <- s
				return
			default:
				inHand.owed++
			}
			if ends && lookUp(line) == quit {
				s.left, more = r.Buffered() > 0, false
				if !s.left && input.full { // the buffer ends here by chance
					s.more = make(chan bool, 1)
				}
			}
		}
		w.Write(part)
		start = ends
		if err != nil && err != bufio.ErrBufferFull {
			s.err, more = err, false
		}
	}
	note()
	s.lines = inHand.lines
	t.end <- s // before the server can end the conversation
	w.Flush()
	t.halfClose()
	if s.more != nil {
		_, err := r.Peek(1)
		s.more <- err == nil
	}
}

// halfClose ends our side of the connection: nothing more is sent.
func (t *talker) halfClose() {
	if half, ok := t.conn.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}
