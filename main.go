// Kvserver is a key-value server on TCP. A request is a line of text, so netcat can be the client.
//
// The map of the code:
//
//	main.go    flags and the environment; the log; start and stop; the commands help, check, repair
//	           and backup; the client (kvserver -c, -ping)
//	server.go  keyValueServer: listening, its accept goroutines, and workLoop, which owns the store
//	           and the list of clients; -max-memory; TLS; Stats, metrics and health over HTTP
//	client.go  Client: one connection, its reading and its writing goroutine; input, which cuts
//	           bytes into lines; outbox, which packs replies into messages; listing, for Keys and
//	           Dump
//	query.go   Query: parse a line, run it, format the reply
//	kvstore/   the store behind the KVStore interface: in memory, with a log on disk or in etcd
//
// The glossary (package durable has the words about files):
//
//	line      bytes from a client up to a newline; each line that is not blank should be a request
//	request   what a client asks for; a Query is a request on its way through the server
//	reply     the lines that answer a request; a reply may have no line
//	burst     the lines that one Read has completed
//	chain     the queries of a burst, or of a part of it, that travel together in one send
//	batch     the chains that workLoop runs before one Commit; if the last Commit was slow, it first
//	          waits a moment for the clients that write each time (gathering in server.go)
//	message   bytes of replies that wait in a client's buffer to be written
//	outbox    where a client's replies become messages
//	holder    the one goroutine that has a client's chain now, and with it the client's outbox
//	long line a line for which a client needs a larger read buffer than for bursts (forLine)
//	slow      a client is slow if its connection took no byte for 1 to 6 s (patience in client.go)
//	drip      a client drips if it takes far less than 256 KiB/s while replies wait (noteWait)
//	parked    a Take is parked while it waits, in takes, for a value
//	pinned    values that waiting replies keep in memory even if others remove them
//	heavy     a client is heavy if its requests take long (isHeavy in server.go)
//	round     the time for which workLoop runs requests before it commits and answers
//	share     how much of workLoop's time a client has had; a client that had much waits for its turn
//	snapshot  the store as it was at one moment; Keys, Dump and compaction each read one, and
//	          compaction writes it to a file, snap-N.log
//	log       the lines that the server writes for people; in kvstore the data's, see there
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storage/etcd"
)

// readme is the manual.
//
//go:embed README.md
var readme string

// commands can stand in the place of flags, each with the arguments that it needs.
var commands = map[string]string{"check": "DIR", "backup": "DIR NEW", "repair": "DIR NEW", "help": ""}

const (
	exitFailure = 1 // kvserver could not do what it was asked to do
	exitMisuse  = 2 // the command line or the environment is wrong

	stopTime    = 5 * time.Second // for a stop without a heal (giveUp); a fifth of it while opening
	connectTime = 5 * time.Second // without -timeout: to connect, for -c's first and -ping's answer
)

func main() {
	out := bufio.NewWriter(os.Stdout)
	err := run(os.Args[1:], out)

	// Only once the file is closed is it certain that the output is written. -c or -ping may have
	// closed it already, and the process may have been started without one.
	lost := cmp.Or(out.Flush(), os.Stdout.Close())
	if err == nil && lost != nil && !isAny(lost, os.ErrClosed, os.ErrInvalid) {
		err = problem("cannot write the output: "+lost.Error(), "Make room where it goes.")
	}
	new(config).tell(os.Stderr, err)

	// A script can tell a wrong command line from a failure.
	switch {
	case errors.As(err, new(misuse)):
		os.Exit(exitMisuse)
	case err != nil:
		os.Exit(exitFailure)
	}
}

// run does what the command line asks for. Its output goes to out, except that of -c and -ping.
func run(args []string, out io.Writer) error {
	if len(args) > 0 {
		if _, isCommand := commands[args[0]]; isCommand {
			return runCommand(args[0], args[1:], out)
		}
	}

	// Without -c or -ping this process is a server.
	c, err := parseFlags(args, out)
	switch {
	case errors.Is(err, flag.ErrHelp): // parseFlags has printed it
		return nil
	case err != nil:
		return misuse{c.tell(os.Stderr, err)}
	case c.client || c.ping:
		return beClient(c, os.Stderr)
	}
	return beServer(c)
}

// misuse is an error of the command line or of the environment.
type misuse struct{ error }

func (m misuse) Unwrap() error { return m.error }

// errTold stands for an error that tell, the log or -c has shown already.
var errTold = errors.New("it was reported")

// problem returns an error, with what the user can do about it.
func problem(what, todo string) error { return storage.NewError(what, todo) }

// tell writes to w what is wrong and what to do: two lines of text, or one line of JSON where a
// server is to log in JSON. It returns errTold; nil if err is nil. An errTold was told already.
func (c *config) tell(w io.Writer, err error) error {
	if err == nil || errors.Is(err, errTold) {
		return err
	}

	todo := storage.Advice(err)
	if c.log == "json" && !c.client && !c.ping {
		slog.New(slog.NewJSONHandler(w, nil)).Error("the server does not start", "error", err, "todo", todo)
	} else {
		fmt.Fprintln(w, strings.TrimSpace(fmt.Sprintf("kvserver: %v\n%s", err, todo)))
	}
	return errTold
}

// isTerminal reports whether f is a terminal.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	null, _ := os.Stat(os.DevNull) // a character device, too, but no terminal
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && !os.SameFile(info, null)
}

// ---- flags and the environment

const usage = `Usage:
  kvserver [FLAG ...]                    serve
  kvserver [FLAG ...] -c [REQUEST ...]   send requests, or those of stdin
  kvserver [FLAG ...] -ping              exit code 0 if a server answers
  kvserver check DIR                     read all data, and report damage
  kvserver backup DIR NEW                copy DIR, even beside a server
  kvserver repair DIR NEW                copy to NEW what can be read
  kvserver help [WORD ...]               the manual's headings, or a part

Flags that most people need:
`

const moreUsage = `
All: kvserver help flags. KVSERVER_ADDR=:9999 does what -addr :9999 does.
Try it:   kvserver &   then   nc localhost 9999   and type   Help
`

const seeHelp = "kvserver help flags lists the flags."

// The flags that -h shows, and those that have no variable.
var (
	helpFlags = strings.Fields(
		"addr data fsync http max-memory tls-cert tls-key tls-client-ca tls-ca timeout")
	nowFlags = strings.Fields("c out ping stop version")
)

// strayFlags has, for each kind of process, the flags that do nothing in it.
var strayFlags = map[string]string{
	"a server": "out stop timeout tls-ca",
	"-c":       serverFlags,
	"-ping":    serverFlags + " out stop",
}

const serverFlags = "data fsync http log max-clients max-line max-memory max-queues " +
	"tls-client-ca v write-timeout"

// config is what the command line and the environment ask for. Each flag's own text, in flags, says
// what it means.
type config struct {
	addr  string // one address, or several with commas between them
	data  string // "": memory only
	fsync string
	http  string // "": none
	log   string

	maxClients                    int
	maxLine, maxMemory, maxQueues int64 // bytes
	writeTimeout, timeout         time.Duration
	cert, key, clientCA, ca       string // files; "": none
	answers                       string // the file for -c's output; "": standard output
	verbose, client, stop, ping   bool
	version                       bool     // print the version, and do nothing else
	requests, args                []string // the arguments after the flags; the whole command line
}

// flags returns a flag set that reads a command line into c, and puts the defaults there. A flag's
// text, with its default at the end, is in the README, in messages about wrong values, and for
// helpFlags in -h.
//
// To add a flag, add: its field in config, its text and default here, its row in the README,
// helpFlags if -h shows it, nowFlags if it has no variable, serverFlags or strayFlags if it is not
// for all, wrongValues in the tests, and what New or applyLimits does with it.
func (c *config) flags() *flag.FlagSet {
	f := flag.NewFlagSet("kvserver", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	*c = config{addr: "localhost:9999", fsync: "always", log: "text", maxClients: defaultMaxClients,
		maxLine: defaultMaxLine, maxQueues: defaultMaxQueues, writeTimeout: defaultWriteTimeout}

	// Where it serves, and where it keeps the data.
	f.Func("addr", "`PORT` (0 to 65535), HOST:PORT or unix:PATH (localhost:9999)",
		into(&c.addr, fullAddrs, nil))
	f.Func("data", "`DIR` for the data, or etcd://HOST:PORT,.../PREFIX", into(&c.data, text,
		func(s string) bool { return etcd.IsAddress(s) || !strings.Contains(s, "://") }))
	f.Func("fsync", "`WHEN`: always, never, or a time from 1ms to 1h (always)", into(&c.fsync, text,
		func(s string) bool { _, ok := durable.ParseFsync(s); return ok }))
	f.Func("http", "`PORT`, :PORT or HOST:PORT for /metrics, /healthz, /livez", into(&c.http, fullAddrs,
		func(s string) bool { return !strings.Contains(s, ",") && !strings.HasPrefix(s, unixPrefix) }))

	// Its limits.
	f.Func("max-clients", "`N` connections at a time, 1 or more (10000)",
		into(&c.maxClients, strconv.Atoi, func(n int) bool { return n >= 1 }))
	f.Func("max-line", "`SIZE` of a request line, from 64 bytes to 1GiB (1MiB)",
		into(&c.maxLine, parseSize, func(n int64) bool { return n >= 64 && n <= 1<<30 }))
	f.Func("max-memory", "`SIZE` of the process, 64MB or more; 0: no limit",
		into(&c.maxMemory, parseSize, func(n int64) bool { return n == 0 || n >= 64_000_000 }))
	f.Func("max-queues", "`SIZE` of all replies that wait; 0: no limit (1GiB)",
		into(&c.maxQueues, parseSize, nil))
	f.Func("write-timeout", "`TIME` until a client that reads nothing is cut off; 0: never (5m)",
		into(&c.writeTimeout, time.ParseDuration, nil))

	// TLS, for a server or a client, and the log.
	f.Func("tls-cert", "`FILE` with a certificate to show: use TLS", into(&c.cert, text, nil))
	f.Func("tls-key", "`FILE` with its key", into(&c.key, text, nil))
	f.Func("tls-client-ca", "`FILE` with a CA: admit only clients that it certified",
		into(&c.clientCA, text, nil))
	f.Func("tls-ca", "`FILE` with a CA to trust: -c and -ping use TLS", into(&c.ca, text, nil))
	f.Func("log", "`FORMAT` of the log: text or json (text)", into(&c.log, text,
		func(s string) bool { return s == "text" || s == "json" }))
	f.BoolVar(&c.verbose, "v", false, "also log every connection")

	// The flags of a client, and -version.
	f.BoolVar(&c.client, "c", false, "be a client: send requests")
	f.BoolVar(&c.stop, "stop", false, "with -c: end at the first error")
	f.Func("timeout", "`TIME`, as 5s, that -c and -ping wait for an answer",
		into(&c.timeout, time.ParseDuration, nil))
	f.Func("out", "`FILE` for what -c would print, byte for byte", into(&c.answers, text, nil))
	f.BoolVar(&c.ping, "ping", false, "ask whether a server answers")
	f.BoolVar(&c.version, "version", false, "print the version")
	return f
}

// into returns a function that puts a flag's value into p, once. fits is for a value that parse can
// read; nil: all fit. If the value is empty, or looks like a flag, somebody has forgotten it.
func into[T any](p *T, parse func(string) (T, error), fits func(T) bool) func(string) error {
	isSet := false
	return func(text string) error {
		value, err := parse(text)
		switch {
		case isSet:
			return errors.New("it is given twice")
		case err != nil || text == "" || text[0] == '-' || fits != nil && !fits(value):
			return errors.New("it does not fit")
		}
		*p, isSet = value, true
		return nil
	}
}

// text is the parse function of a flag whose value is used as it is.
func text(s string) (string, error) { return s, nil }

// parseFlags reads the command line and the environment. It returns flag.ErrHelp if it has printed
// to out what -h or -version asks for.
func parseFlags(args []string, out io.Writer) (c config, err error) {
	flags, typed := c.flags(), map[string]bool{}
	err = flags.Parse(args)
	flags.Visit(func(f *flag.Flag) { typed[f.Name] = true })
	c.requests, c.args = flags.Args(), args // for -c each argument after the flags is a request

	// A variable is for a flag that is not on the command line.
	var unset error
	flags.VisitAll(func(f *flag.Flag) {
		if !typed[f.Name] {
			unset = cmp.Or(unset, setByVariable(f))
		}
	})

	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(out, helpText(flags))
		return c, err
	case err != nil:
		return c, flagProblem(flags, err)
	case c.version && len(c.requests) == 0:
		fmt.Fprintln(out, "kvserver", version(), runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
		return c, flag.ErrHelp
	}
	return c, cmp.Or(unset, c.checkRequests(), c.checkFlags(flags, typed))
}

// setByVariable sets f to the value of its variable in the environment. An empty one is none.
func setByVariable(f *flag.Flag) error {
	name, value := variable(f), os.Getenv(variable(f))
	if value == "" || value == strings.TrimSpace(value) && f.Value.Set(value) == nil {
		return nil
	}
	return problem(fmt.Sprintf("%s=%q in the environment is no value for -%s", name, value, f.Name),
		explain(name, f)+" No blank or newline may stand around it.")
}

// helpText is what -h prints. The README has all flags: kvserver help flags prints them.
func helpText(flags *flag.FlagSet) string {
	text := usage
	for _, name := range helpFlags {
		unit, does := flag.UnquoteUsage(flags.Lookup(name))
		text += fmt.Sprintf("  %-20s%s\n", "-"+name+" "+unit, does)
	}
	return text + moreUsage
}

// unitHints say how a kind of value is written.
var unitHints = map[string]string{"SIZE": " A size is a number with a unit, as 64MB or 1GiB.",
	"TIME": " A time is a number with a unit, as 10s or 5m."}

// explain says which value a flag takes, or its variable: name is what the user gave.
func explain(name string, f *flag.Flag) string {
	kind, does := flag.UnquoteUsage(f)
	if kind == "" { // a flag that is on or off
		does = "1 or 0: " + does
	}
	return name + " takes " + does + "." + unitHints[kind]
}

// envPrefix begins the names of our variables in the environment.
const envPrefix = "KVSERVER_"

// variable returns the name of a flag's variable in the environment; "": it has none.
func variable(f *flag.Flag) string {
	if slices.Contains(nowFlags, f.Name) { // others often set KVSERVER_VERSION for their own use
		return ""
	}
	return envPrefix + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
}

// warnOfVariables logs the variables whose names begin like ours but are unknown, and which of ours
// they may stand for. It is only a warning, because a newer kvserver may know them.
func warnOfVariables(log *slog.Logger, environment []string) {
	var ours []string
	new(config).flags().VisitAll(func(f *flag.Flag) {
		ours = append(ours, strings.TrimPrefix(variable(f), envPrefix))
	})

	// Kubernetes sets some for a service named kvserver.
	others := regexp.MustCompile("^((VERSION|PORT|ETCD_USER)$|(SERVICE|PORT|TEST)_)")
	for _, line := range environment {
		name, _, _ := strings.Cut(line, "=")
		name, isOurs := strings.CutPrefix(name, envPrefix)
		isKnown := slices.Contains(ours, name) || others.MatchString(name)
		if isOurs && !isKnown {
			log.Warn("unknown variable in the environment: it does nothing",
				"name", envPrefix+name, "todo", suggest(envPrefix, name, ours))
		}
	}
}

// suggest says what the user may have meant by name: the one of names that is equal to it, or is
// over two bytes long and one slip away. prefix stands before it.
func suggest(prefix, name string, names []string) string {
	for _, near := range names {
		if name == near || len(near) > 2 && oneSlip(name, near) {
			return "Did you mean " + prefix + near + " ? " + seeHelp
		}
	}
	return seeHelp
}

// flagProblem returns err, of flags.Parse, with what to do about it. The last word of err that
// begins with a hyphen is the flag.
func flagProblem(flags *flag.FlagSet, err error) error {
	name, _, _ := strings.Cut(err.Error()[strings.LastIndex(err.Error(), " -")+2:], ":")
	if f := flags.Lookup(name); f != nil { // its value is wrong, or missing
		return problem(err.Error(), explain("-"+name, f))
	}

	// The flag may be one that other programs have.
	var names []string
	flags.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	name = strings.ToLower(name)
	return problem(err.Error(), suggest("-", cmp.Or(otherFlags[name], name), names))
}

// The names that other programs have for our flags, and words that they take, with what to do here.
var (
	otherFlags = map[string]string{"port": "addr", "p": "addr", "host": "addr", "listen": "addr",
		"bind": "addr", "d": "data", "dir": "data", "datadir": "data", "verbose": "v",
		"client": "c", "metrics": "http", "o": "out", "output": "out", "cert": "tls-cert",
		"key": "tls-key", "ca": "tls-ca"}
	otherWords = map[string]string{"serve": leaveOut, "server": leaveOut, "start": leaveOut,
		"run": leaveOut, "stop": "Press Ctrl-C where it runs, or send it SIGTERM: kill PID.",
		"version": "Did you mean kvserver -version ?", "ping": "Did you mean kvserver -ping ?",
		"client":  "Did you mean kvserver -c ?",
		"restore": "A copy is a data directory: give it to -data, as kvserver help backup says."}
)

const leaveOut = "Leave it out: without a command kvserver serves."

// checkRequests returns what is wrong with the arguments after the flags, or nil.
func (c config) checkRequests() error {
	for i, request := range c.requests {
		// Only -c takes arguments. This one may be a command, or another program's word for one.
		if !c.client {
			word := strings.ToLower(request)
			meant := suggest("kvserver ", word, slices.Sorted(maps.Keys(commands)))
			if needs, isCommand := commands[word]; isCommand {
				meant = "A command comes first: kvserver " + word + " " + needs
			} else if meant == seeHelp {
				example := "Get:a"
				if refusal(request) == "" {
					example = request
				}
				meant = "Set flags, as in kvserver -addr 9999, or send a request: kvserver -c " + example
			}
			return problem(fmt.Sprintf("unexpected argument %q: everything is set by flags", request),
				cmp.Or(otherWords[word], meant))
		}

		// An argument that is no request may be a file, and two may be the words of one request.
		why, rest := "", c.requests[i:]
		switch {
		case refusal(request) != "" && isFile(request):
			return problem(fmt.Sprintf("%q is a file, not a request", request),
				"Send the lines in it: kvserver -c < "+request)
		case trimCR(request) == "" || request[0] == '-' || strings.Contains(request, "\n"):
			why = fmt.Sprintf("%q is not one request", request)
		case len(rest) > 1 && !strings.Contains(request, ":") && refusal(request) != "" &&
			refusal(rest[1]) != "":
			why = refusal(strings.Join(rest, " "))
		}
		if why != "" {
			return problem(why, "Each argument is one request, and flags go before: "+
				"kvserver -addr 9999 -c Put:a:b Get:a")
		}
	}
	return nil
}

// isFile reports whether there is a file at path, and no directory.
func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir()
}

// checkFlags returns which flags exclude each other, need another, or are not for this process, a
// server or a client; or nil. typed has the flags of the command line. A flag there must be for
// this process; a variable in the environment need not, because one environment may be for both.
func (c config) checkFlags(flags *flag.FlagSet, typed map[string]bool) error {
	kind, isDisk := "a server", c.data != "" && !etcd.IsAddress(c.data)
	switch {
	case c.client && c.ping:
		return problem("-c and -ping do not go together", "Give one: -ping asks whether a server "+
			"answers, -c sends requests, as in kvserver -c Ping.")
	case c.client:
		kind = "-c"
	case c.ping:
		kind = "-ping"
	}
	for name := range strings.FieldsSeq(strayFlags[kind]) {
		if typed[name] {
			return problem("-"+name+" is not for "+kind,
				"Leave it out. "+explain("-"+name, flags.Lookup(name)))
		}
	}

	// Flags that need another.
	isServer := kind == "a server"
	switch {
	case isServer && !isDisk && (c.fsync != "always" || typed["fsync"] && c.data == ""):
		return problem("-fsync is for data on a disk", "Give a directory, as in -data data -fsync "+
			c.fsync+". In etcd everything that was answered is kept: leave it out.")
	case (c.cert == "") != (c.key == "") || c.clientCA != "" && c.cert == "":
		return problem("-tls-cert and -tls-key go together, and -tls-client-ca with both",
			"Give the certificate and its key, as in -tls-cert server.pem -tls-key server.key.")
	case !isServer && c.cert != "" && c.ca == "":
		return problem("-tls-cert with -c or -ping needs -tls-ca",
			"Give the CA of the server's certificate, as in -tls-ca ca.pem.")
	}
	return nil
}

// fullAddrs puts localhost before each address that is only a port; addrs has commas between the
// addresses. It fails if one is no address of TCP, or of a unix socket.
func fullAddrs(addrs string) (string, error) {
	all := strings.Split(addrs, ",")
	for i, addr := range all {
		path, isUnix := strings.CutPrefix(addr, unixPrefix)
		if isUnix && path != "" && path[0] != '@' { // @ begins a socket of Linux without a file
			continue
		}

		// A host alone gets localhost before it, too, and the check of the port refuses it.
		if !strings.Contains(addr, ":") {
			all[i] = "localhost:" + addr
		}

		// A port must be a number, because the names of services differ between systems.
		_, port, err := net.SplitHostPort(all[i])
		_, portErr := strconv.ParseUint(port, 10, 16)
		if err = cmp.Or(err, portErr); err != nil {
			return "", err
		}
	}
	return strings.Join(all, ","), nil
}

// units are the units of a size, each with its number of bytes.
var units = map[string]int64{"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
	"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}

// parseSize reads a number of bytes: 1048576, 64MB (64 million) or 1GiB.
func parseSize(text string) (int64, error) {
	number := strings.TrimRightFunc(text, unicode.IsLetter)
	unit, isUnit := units[strings.ToLower(text[len(number):])]
	n, err := strconv.ParseUint(strings.TrimRight(number, " "), 10, 63)
	if err != nil || !isUnit || int64(n) > math.MaxInt64/unit {
		return 0, errors.New("no size")
	}
	return int64(n) * unit, nil
}

// version returns the module version that the binary was built from: a tag, or the time and the
// hash of a commit, with +dirty at the end if files were changed after the commit; devel or unknown
// if the binary does not know it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return strings.Trim(info.Main.Version, "()")
	}
	return "unknown"
}

// ---- the log

const (
	logLines  = 1000                   // lines of the log that may wait to be written
	flushTime = 200 * time.Millisecond // for these lines to be written at the end
)

// queuedLog is a log that never makes its callers wait, even if its reader pauses for ever: a line
// that finds no room in the queue is counted and dropped.
type queuedLog struct {
	*slog.Logger
	lines  chan logLine // Write and flush to writeLog; never closed
	counts logCounts
}

// logLine is a line of the log. If written is not nil it is flush's mark instead: writeLog closes
// written when it has written all lines before the mark.
type logLine struct {
	text    []byte
	written chan struct{}
}

// newLog returns a log that writes to w. Its writeLog goroutine runs from now on.
func newLog(w io.Writer, json, verbose bool) *queuedLog {
	l := &queuedLog{lines: make(chan logLine, logLines)}
	options := &slog.HandlerOptions{ReplaceAttr: l.counts.note}
	if verbose {
		options.Level = slog.LevelDebug
	}

	// One handler is for all lines. The other writes past the queue: it is for the line about lost
	// lines, which must not wait in the queue that was full.
	handler := func(w io.Writer) slog.Handler {
		if json {
			return slog.NewJSONHandler(w, options)
		}
		return slog.NewTextHandler(w, options)
	}

	l.Logger = slog.New(handler(l))
	go l.writeLog(w, slog.New(handler(w)))
	return l
}

// Write queues a line of the log, or counts it as lost. It never waits.
func (l *queuedLog) Write(line []byte) (int, error) {
	select {
	case l.lines <- logLine{text: bytes.Clone(line)}:
	default:
		l.counts.lost.Add(1)
	}
	return len(line), nil
}

// writeLog writes the queued lines to w. With log, which writes to w directly, it says how many
// were lost. It is one goroutine per log, ends with the process, and may wait for w for ever.
func (l *queuedLog) writeLog(w io.Writer, log *slog.Logger) {
	told := int64(0) // how many lost lines the log has mentioned
	for line := range l.lines {
		if line.written != nil {
			close(line.written)
			continue
		}

		// If nobody reads the log any more, each line is lost, and the server goes on.
		if _, err := w.Write(line.text); err != nil {
			l.counts.lost.Add(1)
		} else if n := l.counts.lost.Load() - told; n > 0 {
			told += n
			log.Warn("lines of log were lost: they could not be written in time", "lines", n)
		}
	}
}

// flush waits until the queued lines are written, but no longer than flushTime.
func (l *queuedLog) flush() {
	late, written := time.After(flushTime), make(chan struct{})
	select {
	case l.lines <- logLine{written: written}: // the wait for room counts, too
		select {
		case <-written:
		case <-late:
		}
	case <-late:
	}
}

// ---- start and stop

// beServer runs a server until a signal stops it, or until it fails: then it returns errTold.
func beServer(c config) error {
	signal.Ignore(syscall.SIGPIPE) // the log's reader may end, and must not end the server with it
	log := newLog(os.Stderr, c.log == "json", c.verbose)
	defer log.flush()

	// The log may be a pipe that nobody reads, so the error goes through the log's queue, too.
	return c.tell(log, serve(c, log))
}

// serve opens the store, listens, serves and stops. An error from before it serves is returned; a
// later one is logged, and errTold is returned.
func serve(c config, log *queuedLog) error {
	ctx, restore := signal.NotifyContext(context.Background(), stopSignals()...)
	warnOfVariables(log.Logger, os.Environ()) // it may explain what goes wrong later
	log.Info("starting", "version", version(), "go", runtime.Version(), "pid", os.Getpid())
	s := New(nil) // openStore sets the store
	s.log, s.logged, s.version = log.Logger, &log.counts, version()
	if c.data != "" {
		s.status = new(storage.Status)
	}

	// Metrics and health come first, so that one can watch how the data is opened.
	if c.http != "" {
		web, err := s.watchAt(c.http)
		if err != nil {
			return listenProblem("http", c.http, err)
		}
		defer web.Close()
	}

	// From here on each way out closes the data.
	data, err := openStore(ctx, c, s, log)
	switch {
	case err != nil && ctx.Err() != nil:
		log.Info("stopped while opening the data")
		return nil
	case err != nil:
		return storage.Advise(c.data, err, tryAgain)
	}

	listeners, err := listenFor(c)
	if err == nil {
		applyLimits(s, c)
		err = s.serve(listeners...)
	}
	if err != nil {
		data.Close()
		return err
	}

	tellStart(c, s, listeners)
	(&gcPacer{server: s}).follow()

	// The server serves until a signal stops it, or the lock is lost, or the store fails.
	select {
	case <-ctx.Done():
	case <-data.Lost():
		err = data.WhyLost()
	case err = <-s.Failed():
	}
	restore() // a further SIGINT or SIGTERM ends the process at once
	return stop(c, log, s, data, err)
}

// tryAgain is the advice for an error of the store that has no advice of its own.
const tryAgain = "Make room, or mend what else is wrong, then start again. What a server has answered is " +
	"kept, but with another -fsync than always perhaps not the last writes: look."

// stopSignals returns the signals that stop the server. SIGHUP says that a terminal was closed, so
// it is one of them if the log goes there. Otherwise it ends nothing.
func stopSignals() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if isTerminal(os.Stderr) && !signal.Ignored(syscall.SIGHUP) { // under nohup it is ignored
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// openStore gives s the certificates and the store that c asks for. If ctx is done first, it gives
// up: no client has been answered yet, so nothing can be lost. It returns the store, which the
// caller closes; nil if the data is in memory only.
func openStore(ctx context.Context, c config, s *keyValueServer,
	log *queuedLog) (store *durable.Store, err error) {
	stuck := time.AfterFunc(math.MaxInt64, func() {
		log.Warn("stopped while opening the data, because the disk does not answer")
		log.flush()
		os.Exit(0)
	})
	defer stuck.Stop()
	defer context.AfterFunc(ctx, func() { stuck.Reset(stopTime / 5) })()

	// Reading the data may take minutes, so a bad certificate is found first. SIGHUP has it read
	// again.
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	if c.cert != "" {
		if s.tls, err = storage.WatchTLS(c.cert, c.key, c.clientCA, s.log, again); err != nil {
			return nil, err
		}
	}

	if c.data == "" {
		s.db = kvstore.NewMemory()
		return nil, nil
	}

	// This may take minutes, or wait for another server to end.
	log.Info("opening the data", "at", c.data)
	dir, err := openDirectory(ctx, c.data, etcd.Options{Addr: c.addr, Log: s.log, Status: s.status})
	if err != nil {
		return nil, err
	}

	fsync, _ := durable.ParseFsync(c.fsync) // parseFlags has checked it
	store, err = durable.Open(ctx, dir, durable.Options{Fsync: fsync, Log: s.log, Status: s.status})
	if err != nil {
		dir.Close()
		return nil, err
	}

	s.db = store
	return store, nil
}

// openDirectory opens a directory of the file system, or one in an etcd cluster.
func openDirectory(ctx context.Context, path string, opts etcd.Options) (storage.Directory, error) {
	if etcd.IsAddress(path) {
		return etcd.Open(ctx, path, opts)
	}
	return storage.OpenDisk(path, opts.Log)
}

// listenFor listens for clients at all addresses of c. If one fails it listens at none, because
// nobody would soon notice that one is missing.
func listenFor(c config) (all []net.Listener, err error) {
	for addr := range strings.SplitSeq(c.addr, ",") {
		listeners, err := listen(addr)
		if err != nil {
			closeAll(all)
			return nil, listenProblem("addr", addr, err)
		}
		all = append(all, listeners...)
	}
	return all, nil
}

// listenProblem returns err, of listening at addr, with what to do. name is the address's flag.
func listenProblem(name, addr string, err error) error {
	todo := "Choose another address: kvserver -" + name + " localhost:9999"
	switch {
	case isAny(err, inUse...):
		todo = "Stop what listens there, or choose another port or path. Port 0 takes a free one."
	case strings.HasPrefix(addr, unixPrefix):
		todo = "Nothing was changed. Choose another path of at most 100 bytes, in a directory where you " +
			"may write, where no other file is, as in -addr unix:/run/kvserver/sock."
	case errors.Is(err, syscall.EACCES):
		todo = "Ports below 1024 are for the administrator: choose -" + name + " 9999"
	case errors.As(err, new(*net.DNSError)), isAny(err, noAddress...):
		todo = "This machine has no such name or address. Choose localhost, or leave the host out to " +
			"listen everywhere, as in -" + name + " :9999"
	}

	// "listen tcp ADDR:" repeats our own words.
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	return problem(fmt.Sprintf("cannot listen on %s: %v", addr, err), todo)
}

// tellStart logs what an operator should know about a server that begins to serve at listeners.
func tellStart(c config, s *keyValueServer, listeners []net.Listener) {
	if c.data == "" {
		s.log.Info("data is in memory only and lost on exit")
	} else {
		s.log.Info("data is kept", "at", c.data, "fsync", c.fsync)
	}

	// Where it listens, and what to type there.
	for _, listener := range listeners {
		path := listener.Addr().String()
		addr, try := unixPrefix+path, "nc -U "+path
		if tcp, isTCP := listener.Addr().(*net.TCPAddr); isTCP {
			addr = tcp.String()
			host, port, _ := net.SplitHostPort(reachable(addr))
			try = "nc " + host + " " + port
			if c.cert != "" {
				try = "kvserver help TLS"
			}

			// Only client certificates keep strangers out.
			if !tcp.IP.IsLoopback() && c.clientCA == "" {
				s.log.Warn("anyone who can reach this address can read and change the data", "addr", addr)
			}
		}
		s.log.Info("listening", "addr", addr, "try", try)
	}
}

// stop closes s, and then data. It logs failure, or the error of closing data, and then returns
// errTold; nil: there was neither.
func stop(c config, log *queuedLog, s *keyValueServer, data *durable.Store, failure error) error {
	tell := func(err error) {
		p := storage.Advise(c.data, err, tryAgain)
		log.Error("the data cannot be kept any more, so the server ends", "error", p, "todo", storage.Advice(p))
		failure = errTold
	}

	// The cause is logged first, because the end may take seconds.
	if failure != nil {
		tell(failure)
	}

	// If this takes too long, giveUp ends the process.
	ended := make(chan struct{})
	defer close(ended)
	go giveUp(log, data, ended)
	s.Close()

	// The server has ended, so nobody changes the data any more.
	if err := data.Close(); err != nil && failure == nil {
		tell(err)
	}
	return failure
}

// giveUp ends the process if ended is not closed within stopTime. It runs as a goroutine. While the
// store writes all its data again, it goes on waiting. It counts ticks, not time: however long the
// process itself is stopped, that counts as one tick.
func giveUp(log *queuedLog, data *durable.Store, ended <-chan struct{}) {
	for left := stopTime; left > 0; left -= lookTime {
		select {
		case <-ended:
			return
		case <-time.After(lookTime):
		}

		// Somebody has removed or changed files, and their data is not on disk again yet.
		if left == lookTime && data.IsHealing() {
			log.Warn("stopping waits until all data is written again; a second signal ends it at once")
			left += stopTime
		}
	}

	log.Error("stopping takes too long, giving up; what was not answered may not be kept",
		"limit", stopTime, "fsync", data.Syncing())
	log.flush()
	os.Exit(exitFailure)
}

// ---- the commands: help, check, repair, backup

// runCommand runs a command, and prints its report to out.
func runCommand(command string, args []string, out io.Writer) error {
	if command == "help" {
		return printManual(out, args)
	}
	if len(args) > 0 && slices.Contains([]string{"-h", "-help", "--help"}, args[0]) {
		return printManual(out, []string{command})
	}

	// A flag where a directory should be is a mistake, never the directory's name.
	needs := commands[command]
	isNone := func(arg string) bool { return arg == "" || arg[0] == '-' }
	if len(args) != len(strings.Fields(needs)) || slices.ContainsFunc(args, isNone) {
		return misuse{problem(command+" needs "+needs+", and no flags", "DIR is the server's data "+
			"directory, NEW is a new one; kvserver help "+command+" says more.")}
	}

	// The report is printed in any case, because it says more than the error.
	path := args[0]
	report, err := lookAt(command, path, args[len(args)-1])
	for _, line := range report.Lines {
		fmt.Fprintln(out, line)
	}
	if err = cmp.Or(err, report.Err); err != nil {
		err = storage.Advise(path, err, "Make room, or mend what else is wrong, then try again.")
	}
	return err
}

// printManual prints the parts of the README that have all words in their heading; without words
// it prints all headings. If no heading has the words, it prints the rows of tables that begin with
// a cell that has them, such as a flag's or a request's.
func printManual(w io.Writer, words []string) error {
	has := func(text string) bool {
		return !slices.ContainsFunc(words, func(word string) bool {
			return !strings.Contains(strings.ToLower(text), strings.ToLower(word))
		})
	}

	isFound := len(words) == 0
	for _, part := range strings.Split("\n#"+readme, "\n## ")[1:] {
		heading, _, _ := strings.Cut(part, "\n")
		switch {
		case len(words) == 0:
			fmt.Fprintln(w, heading)
		case has(heading):
			isFound = true
			printPart(w, "## "+part)
		}
	}

	hasHeading := isFound
	for line := range strings.Lines(readme) {
		row, isRow := strings.CutPrefix(line, "| ")
		cell, _, _ := strings.Cut(row, " | ")
		if !hasHeading && isRow && has(cell) {
			isFound = true
			printPart(w, line)
		}
	}

	if !isFound {
		return misuse{problem(fmt.Sprintf("no heading or table of the manual has %q", strings.Join(words, " ")),
			"kvserver help lists the headings.")}
	}
	return nil
}

// line76 matches as many words as fit on a line of 76 characters.
var line76 = regexp.MustCompile("(.{1,76})( |$)")

// printPart prints a part of the README. Tables are hard to read on a terminal, so each cell begins
// a line, and the first of a row stands out.
func printPart(w io.Writer, part string) {
	lines := strings.Split(part, "\n")
	for i, line := range lines {
		row, isRow := strings.CutPrefix(line, "| ")
		switch {
		case !isRow && !strings.HasPrefix(line, "|---"):
			fmt.Fprintln(w, line)
		case isRow && !strings.HasPrefix(lines[i+1], "|---"): // and not the names of the columns
			indent := ""
			for cell := range strings.SplitSeq(strings.TrimSuffix(row, " |"), " | ") {
				fmt.Fprint(w, line76.ReplaceAllString(strings.ReplaceAll(cell, "`", ""), indent+"$1\n"))
				indent = "    "
			}
		}
	}
}

// lookAt runs a command on the store at path. A backup or a repair writes its copy to the directory
// to. If that fails, lookAt removes the directory, if it has made it and it is empty.
func lookAt(command, path, to string) (report durable.Report, err error) {
	opts := etcd.Options{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	dir, err := openDirectory(context.Background(), path, opts)
	if err != nil {
		return report, err
	}
	defer dir.Close()

	// A check only reads.
	if command == "check" {
		report, err = durable.Check(dir)
		if report.Empty && etcd.IsAddress(path) { // the prefix is probably wrong
			return durable.Report{}, fmt.Errorf("%w at %s", durable.ErrNoStore, path)
		}
		return report, err
	}

	// The other two write into another directory, which must not be inside the store's. One can be
	// inside the other only if both are on disk, or both in etcd.
	var out storage.Directory
	undo := func() {}
	switch {
	case etcd.IsAddress(to) && etcd.Overlap(path, to):
		err = fmt.Errorf("%w: %s", storage.ErrInside, to)
	case etcd.IsAddress(to):
		out, err = etcd.Open(context.Background(), to, opts)
	case etcd.IsAddress(path):
		out, undo, err = storage.MakeDisk(to, "", opts.Log)
	default:
		out, undo, err = storage.MakeDisk(to, path, opts.Log)
	}
	if err != nil {
		return report, err
	}

	copyTo := durable.Backup
	if command == "repair" {
		copyTo = durable.Repair
	}
	report, err = copyTo(dir, out)

	// Without a copy the directory is empty: undo removes it if it is new.
	out.Close()
	if err != nil {
		undo()
	}
	return report, err
}

// ---- the client: kvserver -c, -ping

// beClient runs kvserver -c and -ping. It returns errTold if errs has all that is to be said:
// the errors that the server answered.
func beClient(c config, errs io.Writer) error {
	t := newTalker(c, errs)

	// For a health check a server that has no room for one more client is healthy.
	err := t.dial()
	switch {
	case c.ping && errors.Is(err, errNoPlace):
		fmt.Fprintln(errs, "the server answers, and has no room for one more client")
		return nil
	case err != nil:
		return dialProblem(t.addr, err)
	}
	defer t.conn.Close()

	// -out says where the answers go. Otherwise they go to standard output.
	if c.answers != "" {
		file, err := os.Create(c.answers)
		if err != nil {
			return problem("cannot write the answers: "+err.Error(), "Nothing was sent. Give another -out FILE.")
		}
		t.out = file
	}
	if t.isTyped {
		fmt.Fprintf(errs, "connected to %s; Help lists the requests, Ctrl-D ends\n", t.addr)
	}

	// Ctrl-C ends the conversation. The error then says how far an input from a file was answered.
	ctx, restore := signal.NotifyContext(context.Background(), os.Interrupt)
	defer restore()
	defer context.AfterFunc(ctx, func() { t.conn.Close() })()

	err = t.converse()
	switch {
	case err == nil || err == errTold:
		return err
	case ctx.Err() != nil:
		err = errInterrupted
	}
	return t.problem(err)
}

// talker is one conversation of kvserver -c or -ping: it sends requests to a server and shows the
// answers. One goroutine sends (sendLines) and one reads (readAnswers), so that the server never
// waits for us to read while we wait for it to read. Each line that is sent has one answer, so the
// number of answers is the number of lines that were answered.
type talker struct {
	config
	conn    net.Conn
	in      io.Reader      // lines to send, if the command line has no requests
	out     io.WriteCloser // for data; closed at the end: some disks say only then that they are full
	errs    io.Writer      // for everything else
	isTyped bool           // somebody types, and there is no -out: show each :OK n
	silence time.Duration  // for an owed answer; 0: no limit. Set by greet, and when converse begins

	// Owned by the reading goroutine.
	r        *bufio.Reader // from conn; made by greet
	answered int           // lines that have been answered, beside our own Ack
	quit     int           // the answered line that was a Quit: later lines are not run; 0: none
	told     error         // errTold, once an error of the server's is shown

	// Sender to reader: the kind of each line, before it is sent. The reader takes it out when the
	// line is answered. With -stop there is one slot, so one line at a time is owed. Never closed.
	owed chan queryType
	sent chan error    // sender to reader: how the input ended, io.EOF if it is complete; one slot
	over chan struct{} // closed by the reader: send nothing more
}

// maxOwed is how many lines may wait for their answers.
const maxOwed = 100_000

// newTalker returns the conversation that c asks for.
func newTalker(c config, errs io.Writer) *talker {
	t := &talker{config: c, in: os.Stdin, out: os.Stdout, errs: errs}
	if c.ping {
		t.requests, t.timeout = []string{"Ping"}, cmp.Or(c.timeout, connectTime)
	}
	t.isTyped = len(t.requests) == 0 && c.answers == "" && isTerminal(os.Stdin)
	return t
}

// Errors of a conversation.
var (
	errStranger = problem("this is no kvserver", "Nothing was done. Look at -addr, or try again later.")
	errNoPlace  = problem("it has no room for one more client",
		"Nothing was done. Try again later, or raise the server's -max-clients.")
	errSilent = problem("it closed the connection without a word", "Perhaps it speaks TLS: give the CA "+
		"of its certificate as -tls-ca. Or it has just ended: look at its log.")
	errUTF16 = problem("the input is UTF-16, as PowerShell's > writes it, so nothing of it was sent",
		"Have a Dump written by kvserver -c -out FILE, and other text saved as UTF-8.")
	errOutput = problem("cannot write the answers",
		"Make room where the answers go, or give another -out FILE, and look what was done.")

	errUnanswered  = errors.New("it closed the connection before everything was answered")
	errUnasked     = errors.New("it sent an answer that was not asked for")
	errGone        = errors.New("it closed the connection")
	errQuiet       = errors.New("no answer")
	errStopped     = errors.New("stopped at the first error")
	errInterrupted = errors.New("interrupted")
)

// dial connects to the first of the servers at t.addr that answers our Ack, or says that it is full
// (errNoPlace), and sets t.addr to its address. A connection alone proves nothing: a process that
// hangs accepts one, too.
func (t *talker) dial() (err error) {
	// Unix sockets use plain: they have no TLS.
	plain := &net.Dialer{Timeout: cmp.Or(t.timeout, connectTime)}
	dial := plain.Dial
	if t.ca != "" {
		trusted, err := storage.TLSConfig(t.cert, t.key, t.ca)
		if err != nil {
			return err
		}
		dial = (&tls.Dialer{NetDialer: plain, Config: trusted}).Dial
	}

	// In the given order, so that all clients use the same server.
	for addr := range strings.SplitSeq(t.addr, ",") {
		if path, isUnix := strings.CutPrefix(addr, unixPrefix); isUnix {
			t.conn, err = plain.Dial("unix", path)
		} else {
			t.conn, err = dial("tcp", reachable(addr))
		}
		if err != nil {
			continue
		}

		// Close with a reset. The server takes a plain close for a half-close: our Take would wait
		// on.
		if tcp, isTCP := underTLS(t.conn).(*net.TCPConn); isTCP {
			tcp.SetLinger(0)
		}

		err = t.greet()
		if err == nil || errors.Is(err, errNoPlace) {
			t.addr = addr
			return err
		}
		t.conn.Close()
	}
	return err
}

// reachable returns where a client on this machine finds a server that listens at addr.
func reachable(addr string) string {
	host, port, _ := net.SplitHostPort(addr) // parseFlags has checked it

	// A server with one of these hosts listens at all addresses of the machine.
	if host == "" || net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	if host == "localhost" {
		if _, err := net.LookupHost(host); err != nil { // no /etc/hosts
			host = "127.0.0.1"
		}
	}
	return net.JoinHostPort(host, port)
}

// dialProblem returns err, of dial, with what to do. err is of the last of addrs, or of our own
// certificates.
func dialProblem(addrs string, err error) error {
	op := (*net.OpError)(nil)
	isDial := errors.As(err, &op) && op.Op == "dial"
	if isDial {
		err = op.Err // the rest repeats our own words
	}

	todo := "Nobody listens there. A server that loads its data, or stands by, does not listen yet: look " +
		"at its log. Or start one, or name another with -addr."
	switch {
	case strings.Contains(addrs, ","):
		todo = "None of them serves. One that stands by does not listen."
	case errors.Is(err, fs.ErrPermission):
		todo = "Its mode and its group say who may connect: ls -l " + strings.TrimPrefix(addrs, unixPrefix)
	case isAny(err, context.DeadlineExceeded, errQuiet):
		todo = "Somebody listens there, and does not answer. Look at its log, or try again with a " +
			"longer -timeout."
	case strings.Contains(err.Error(), "remote error: tls: "):
		todo = "It admits only certificates from its own CA that have not ended: look at -tls-cert and -tls-key."
	case !isDial:
		todo = "Somebody answers there. With TLS give a host name that is in its certificate, and the " +
			"certificate's CA as -tls-ca; without TLS give no -tls-ca."
	}
	return problem(fmt.Sprintf("cannot connect to %s: %v", addrs, err), cmp.Or(storage.Advice(err), todo))
}

// greet makes r and owed, sets silence, sends an Ack, and fails unless a kvserver answers it :OK.
func (t *talker) greet() error {
	// A process that does not answer our Ack is no kvserver, or hangs.
	t.silence, t.r = cmp.Or(t.timeout, connectTime), bufio.NewReaderSize(t, maxWrite)
	t.owed = make(chan queryType, maxOwed)
	if t.stop {
		t.owed = make(chan queryType, 1)
	}
	t.owed <- ack

	// The CR makes it five bytes: a TLS server does not answer before it has so many. If the write
	// fails, there may still be an answer to read.
	io.WriteString(t.conn, "Ack\r\n")
	line, err := t.r.ReadSlice('\n')

	// Another kind of server speaks first, or closes, or answers something else.
	why, isFull := bytes.CutPrefix(line, []byte(":ERROR line 0: "))
	switch {
	case errors.Is(err, io.EOF), bytes.HasPrefix(line, []byte("\x15\x03")): // an alert of TLS
		return errSilent
	case err != nil && err != bufio.ErrBufferFull:
		return err
	case isFull:
		return fmt.Errorf("%w: %s", errNoPlace, bytes.TrimSpace(why))
	case !bytes.HasPrefix(line, []byte(":OK ")):
		return fmt.Errorf("%w: it says %.40q", errStranger, line)
	}
	return nil
}

// Read reads from the connection. It fails with errQuiet if an owed answer does not come within
// silence, or if the server does not close the connection so soon after the last answer.
func (t *talker) Read(p []byte) (n int, err error) {
	// The sender puts something into owed or sent before it sets a deadline. We take the deadline
	// away before we look at both. So there is a deadline whenever one of them has something.
	t.conn.SetReadDeadline(time.Time{})
	if len(t.owed) > 0 || len(t.sent) > 0 {
		t.limitRead()
	}

	n, err = t.conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w for %v", errQuiet, t.silence)
	}
	return n, err
}

// limitRead sets the time at which an answer is late.
func (t *talker) limitRead() {
	if t.silence > 0 {
		t.conn.SetReadDeadline(time.Now().Add(t.silence))
	}
}

// converse has the rest of the conversation, after greet. It returns errTold if all requests were
// answered, and the server has said an error. It is the reading goroutine.
func (t *talker) converse() error {
	t.silence, t.sent, t.over = t.timeout, make(chan error, 1), make(chan struct{})
	w := bufio.NewWriterSize(t.out, maxWrite)
	<-t.owed // greet has read the answer to our Ack
	go t.sendLines()

	err := t.readAnswers(w)
	close(t.over)
	if closeErr := t.out.Close(); closeErr != nil && (err == nil || err == errTold) {
		err = fmt.Errorf("%w: %w", errOutput, closeErr)
	}
	return err
}

// readAnswers reads the answers until the conversation ends, and writes to w what is to be seen.
func (t *talker) readAnswers(w *bufio.Writer) error {
	for {
		// The next Read may take long, so show what was answered before it.
		if t.r.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return fmt.Errorf("%w: %w", errOutput, err)
			}
		}

		line, err := t.r.ReadBytes('\n')
		if err != nil {
			w.Flush()
			return cmp.Or(t.ended(err), t.told)
		}

		// A line that begins with a colon ends an answer, unless it is ": text".
		text, isText := bytes.CutPrefix(line, []byte(": "))
		if isText || line[0] != ':' {
			w.Write(text)
		} else if err := t.readEnd(w, line); err != nil {
			return err
		}
	}
}

// readEnd takes the last line of an answer, or an error that answers none of our lines.
func (t *talker) readEnd(w *bufio.Writer, line []byte) error {
	why, isError := bytes.CutPrefix(line, []byte(":ERROR line "))
	if isError {
		t.told = errTold
		w.Flush()
		number, why, _ := strings.Cut(string(why), ":")
		n, _ := strconv.Atoi(number)

		// The server says something of its own accord.
		if n == 0 || len(t.owed) == 0 {
			fmt.Fprintf(t.errs, "the server says:%s", why)
			return nil
		}
		fmt.Fprintf(t.errs, "line %d:%s", n-1, why) // our Ack was line 1
		if t.stop {
			return errStopped
		}
	}

	// Each answer is for the oldest line that has none.
	if len(t.owed) == 0 {
		return errUnasked
	}
	kind := <-t.owed
	verb := kind.row()
	if !isError && (t.isTyped || verb.tells || verb.tellsNone && string(line) == ":OK 0\n") {
		w.Write(line)
	}
	if t.answered++; kind == quit && !isError {
		t.quit = t.answered
	}
	return nil
}

// ended returns the error of a conversation whose connection has failed with err, which is io.EOF
// if the server has closed it, or errQuiet; nil if everything was answered.
func (t *talker) ended(err error) error {
	// Was all of the input sent? After a Quit the server closes, and the sender may not be done.
	end := errGone
	if t.quit > 0 {
		end = io.EOF
	}
	if len(t.sent) > 0 || t.quit > 0 && len(t.owed) == 0 && !t.isTyped {
		select {
		case end = <-t.sent:
		case <-time.After(closeTime): // an input that stays open
		}
	}

	// Was all that was sent answered?
	switch {
	case len(t.owed) > 0 && errors.Is(err, errQuiet):
		return err
	case len(t.owed) > 0:
		return fmt.Errorf("%w: %w", errUnanswered, err)
	case end == io.EOF:
		return nil
	}
	return end
}

// sendLines sends the input to the server, a long line in pieces. It flushes when there is no more
// input for now, and at the end tells the reader how the input ended. It runs as one goroutine per
// conversation.
func (t *talker) sendLines() {
	// Requests on the command line are sent as lines of input.
	in := t.in
	if len(t.requests) > 0 {
		in = strings.NewReader(strings.Join(t.requests, "\n") + "\n")
	}
	r, w := bufio.NewReaderSize(in, maxWrite), bufio.NewWriterSize(t.conn, maxWrite)

	var err error // of the last read; bufio.ErrBufferFull: the rest of a line follows
	for isFirst := true; err == nil || err == bufio.ErrBufferFull; isFirst = false {
		// The next Read may take long, and the server must not wait for it.
		if here, _ := r.Peek(r.Buffered()); bytes.IndexByte(here, '\n') < 0 {
			w.Flush() // if this fails, the reading goroutine finds out why
		}

		isRest := err != nil
		var piece []byte
		piece, err = r.ReadSlice('\n')
		switch {
		case isFirst && isUTF16(piece):
			err = errUTF16
		case isRest:
			w.Write(piece)
		case len(piece) > 0 && !t.beginLine(w, piece):
			return
		}
	}
	w.Flush()

	// The reader must know how the input ended before the server closes the connection.
	if err != io.EOF {
		err = fmt.Errorf("reading the requests: %w", err)
	}
	t.sent <- err

	// Half-close: the server answers all that it has read, and then closes the connection, which it
	// may fail to do.
	closeWrite(t.conn)
	t.limitRead()
}

// beginLine waits for a slot in owed and sends a line, or as much of a long one as has come. false:
// send nothing more.
func (t *talker) beginLine(w *bufio.Writer, line []byte) bool {
	// The server does not answer a blank line. It answers an Ack, which we send instead.
	request := trimCR(strings.TrimSuffix(string(line[:min(len(line), maxQuoted)]), "\n"))
	if request == "" && line[len(line)-1] == '\n' {
		line, request = []byte("Ack\n"), "Ack"
	}

	// Only an answer frees a slot, so all lines before this one must be on their way.
	if len(t.owed) == cap(t.owed) {
		w.Flush()
	}
	select {
	case t.owed <- begun(request):
	case <-t.over:
		return false
	}

	// If no other answer is owed, the reader's time limit begins now.
	if len(t.owed) == 1 {
		t.limitRead()
	}
	w.Write(line)
	return true
}

// isUTF16 reports whether an input that begins with start is text in UTF-16: it begins with a byte
// order mark, or with a letter in two bytes.
func isUTF16(start []byte) bool {
	mark := string(start[:min(2, len(start))])
	return mark == "\xff\xfe" || mark == "\xfe\xff" ||
		len(mark) == 2 && mark[0]|mark[1] >= 'A' && (mark[0] == 0) != (mark[1] == 0)
}

// problem returns err, of a conversation, with what to do.
func (t *talker) problem(err error) error {
	// For an input, say how far it was answered, and how to send the rest.
	what, goOn := fmt.Sprintf("%s: %v", t.addr, err), "send the rest."
	if len(t.requests) == 0 && !t.isTyped {
		what += fmt.Sprintf("; answered through line %d of the input", t.answered)
		goOn = fmt.Sprintf("go on: tail -n +%d FILE | kvserver %s", t.answered+1, strings.Join(t.args, " "))
	}

	todo := "What was answered is done. The rest may be done or not: look, then " + goOn
	switch {
	case t.answered > 0 && t.answered == t.quit:
		todo = "Nothing after a Quit is run. Leave it out, and " + goOn
	case errors.Is(err, errStopped):
		todo = "Nothing after the error was sent. Mend it, then " + goOn
	case len(t.owed) == 0 && !errors.Is(err, errUnasked):
		todo = "All that was sent is answered, so " + goOn
	}
	return problem(what, cmp.Or(storage.Advice(err), todo))
}
