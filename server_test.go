// The tests stand in the order of the source files. The first words of a test's name are its
// subject: go test -run Dump -v runs all tests about Dump.
//
//	main.go    Flags, Manual, Readme, Log, Signals, KilledServer, TLS, Command (kvserver -c)
//	server.go  Start, Counts, Close, Accept, MaxClients, Turns, Store, Commit, Expire, Take,
//	           MemoryLimit, MaxQueues, MemoryOf (what one client takes), Listen, Stats,
//	           Watch (-http)
//	client.go  Input, SlowLine, Dump (and Keys), Outbox, SlowReader, SteadyReader,
//	           End (of a connection), WriteTimeout
//	query.go   Conversations, EveryRequest, Hints, and what is fuzzed
//	all of it  Simulation; its worlds are in kvstore/storetest/world
//
// What a test says in one line needs nothing of package main: as protocol.SlowLine a connection to
// the server, and as command.TLS the program. It stands in that package in kvstore/storetest.
//
// The store has its own tests in kvstore/.
//
// The promises of the README, and more, each with the tests that show it. (go test -run '^TestX$'
// ./... finds a test in any package; make simulate SEED=7 SEEDS=1 plays one world, and tells its
// story.)
//
//	Every input gets exactly the protocol's replies, however the network splits it
//		FuzzConversation, TestInputAtEverySplitPoint
//	There is one order of all operations; one that ended before another began comes first
//		TestSimulation, TestKilledServer
//	With -data, and -fsync always, nothing that was answered is lost
//		TestCrashAfterEveryCall, TestEveryCallFails, TestKilledServer, TestSimulation
//	Files that somebody removes under a running server are written again
//		TestRemovedFilesAreWrittenAnew, TestHealMayFail, TestRemovedRealFiles
//	A start copies nothing, and a full disk stops neither it nor reading
//		TestStartCopiesNothing, TestFullDisk, TestFullDiskRefusesWrites
//	On a full disk everything can be deleted
//		TestFullDiskDeletesEverything, TestFullDiskRemovesEverything
//	One process at a time has a directory, whatever becomes of LOCK
//		TestRemovedLockStillLocks, TestMissingLock, TestInUseBesideALock, TestSecondStartWithoutLock
//	A repair changes nothing that it reads
//		TestRepair, TestRepairIsKilled
//	The disk holds at most twice the live data and 128 MiB
//		TestDiskUseIsBounded
//	A missing descriptor or a full disk does not end the store where a new file is due
//		TestMissingDescriptors, TestRotationIsTriedAgain
//	A Dump is one exact moment, and a compaction writes one
//		TestDumpIsOneMoment, TestMemoryInside, TestSnapshotBesideChanges
//	All of it together, whatever the network, the disk and the process do
//		TestSimulation, make simulate
//	A backup beside a running server holds what was answered before it
//		TestBackup, TestBackupBesideARealStore
//	No reply leaves before its Commit
//		TestCommitBeforeReplies
//	A start that finds damage names the file and changes nothing
//		TestFlippedBits, TestIdleLogIsVouchedFor, TestRefusals, TestOlderCopyOverNewer,
//		TestMovedRealDirectory, FuzzRecovery
//	A slow reader keeps 500 replies, not many more, learns by Ping how many it has lost, and delays nobody
//		TestSlowReaderDelaysOnlyItself, TestSlowReaderIsToldAtTheEnd
//	A steady reader loses nothing; after Ack no reply is dropped
//		TestSteadyReaderOnRealSocket, TestSteadyReaderOfAPausedServer,
//		TestSlowReaderWithAck
//	No client waits more than some milliseconds for others, whatever they send; only a Keys or Dump may
//		TestTurnsOfLightClients, TestDumpSortTakesTurns, TestHintsAreCheap,
//		TestOutboxMeasuresNoLongReply
//	Log output can neither stop nor end a server
//		TestLogNeverBlocks, TestLogMayEnd, TestLogTellsOfAFailingDisk
//	Stopping is bounded, and answers what was read
//		TestCloseInEveryState, TestCloseUnderASteadyReader, TestCloseWithTLS, TestEndByHalfClose,
//		TestSignalsWhileTheDiskHangs
//	An fsync counts for what it covered, and no file is trusted whose fsync failed
//		TestPowerFailsBesideEverything, TestFsyncDuringWrite, TestEveryCallFails
//	A key is gone for everybody when its time is over, and stays gone
//		TestExpire, TestExpireWhileTheClockJumps, TestExpireBeforeTheStart, TestExpireManyAtOnce,
//		TestExpireIsCommitted, TestExpireOnAFullDisk
//	The Take that has waited longest gets the next value, and nobody else gets it
//		TestTakeWaitsInLine, TestTakeOfClientsThatGo, TestCommitBeforeReplies, TestKilledServer
//	Locks, counters and queues are right
//		TestReadmeConversations, TestExpire, TestExpireBeforeTheStart, TestKilledServer
//	Every limit holds at its edge
//		TestMaxClients, TestMemoryLimit, TestMaxQueues, TestSlowLine, TestWriteTimeout,
//		TestInputLimitAtEverySplitPoint, TestWatchIsLimited
//	With `-tls-client-ca` only clients that this CA has certified get in over TCP
//		TestTLS
//	Strangers who begin TLS, or ask over HTTP, and say nothing keep nobody out
//		TestTLSHandshakesHoldNoPlace, TestWatchFewConnections
package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/command"
	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
	"kvserver/kvstore/storetest/world"
)

// ---- main.go: flags and the environment

// Ensure that the help text fits a screen, and that the README's table has each flag with the same
// words as the help text.
func TestFlagsAreDocumented(t *testing.T) {
	var c config
	flags, saidDefaults := c.flags(), 0
	lines := strings.Split(strings.TrimSuffix(helpText(flags), "\n"), "\n")
	for _, name := range helpFlags {
		is.In(t, "the help text", helpText(flags), "\n  -"+name+" ")
	}
	if len(lines) > 24 {
		t.Errorf("the help text has %d lines, want at most 24", len(lines))
	}
	for _, line := range lines {
		if len(line) > 80 {
			t.Errorf("%d columns: %s", len(line), line)
		}
	}

	_, table, _ := strings.Cut(readme, "\n| flag | environment | is |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(table, "\n")

	flags.VisitAll(func(f *flag.Flag) {
		// A default that the help text says in brackets is the one that the flag has.
		if said, isSaid := strings.CutSuffix(f.Usage, ")"); isSaid {
			said = said[strings.LastIndex(said, "(")+1:]
			saidDefaults++
			before := c
			if err := f.Value.Set(said); err != nil || !reflect.DeepEqual(c, before) {
				t.Errorf("-%s has another default than %q: %v", f.Name, said, err)
			}
		}

		want := row(f)
		at := slices.IndexFunc(rows, func(row string) bool {
			rest, ok := strings.CutPrefix(row, want)
			return ok && (strings.HasPrefix(rest, " |") || strings.HasPrefix(rest, ". "))
		})
		if at < 0 {
			t.Errorf("the README's table of flags has no row that begins\n%s", want)
			return
		}
		rows = slices.Delete(rows, at, at+1)
	})

	if len(rows) > 0 {
		t.Errorf("the README's table of flags has a row for no flag:\n%s", rows[0])
	}

	// Every default that is not empty is said in the help text.
	for field := range reflect.ValueOf(c).NumField() {
		if !reflect.ValueOf(c).Field(field).IsZero() {
			saidDefaults--
		}
	}
	is.Equal(t, "said defaults that there are not", saidDefaults, 0)
}

// row returns the beginning of a flag's row in the README.
func row(f *flag.Flag) string {
	code := func(text string) string {
		if text == "" {
			return ""
		}
		return "`" + text + "`"
	}
	unit, does := flag.UnquoteUsage(f)
	return fmt.Sprintf("| %s | %s | %s", code(strings.TrimSpace("-"+f.Name+" "+unit)),
		code(variable(f)), does)
}

func TestFlagMistakes(t *testing.T) { command.FlagMistakes(t, binary, misuseOf, explained) }

// misuseOf returns what is said about a command line that is wrong. It starts no process: that this
// goes to standard error, and the exit code, is the same for all of them.
func misuseOf(args []string) string {
	var said strings.Builder
	var c config
	var err error
	if _, isCommand := commands[args[0]]; isCommand {
		err = run(args, io.Discard)
	} else {
		c, err = parseFlags(args, io.Discard)
	}
	if err != nil {
		c.tell(&said, err)
	}
	return said.String()
}

// explained returns what is said about a wrong value of a flag.
func explained(name string) string { return explain(name, new(config).flags().Lookup(name[1:])) }

// storeIn opens the store in dir.
func storeIn(t *testing.T, dir storage.Directory, status *storage.Status) *durable.Store {
	t.Helper()
	store, err := durable.Open(t.Context(), dir, durable.Options{Status: status})
	is.OK(t, err)
	return store
}

func TestRepairSaysWhatIsLost(t *testing.T) { command.RepairSaysWhatIsLost(t, binary) }

// Ensure that flags can come from the environment, and that the command line takes precedence.
func TestFlagsInTheEnvironment(t *testing.T) {
	t.Setenv("KVSERVER_ADDR", ":1234")
	t.Setenv("KVSERVER_MAX_LINE", "77")
	c, err := parseFlags(nil, io.Discard)
	if err != nil || c.addr != ":1234" || c.maxLine != 77 {
		t.Errorf("from the environment: %+v, %v", c, err)
	}
	if c, err = parseFlags([]string{"-addr", "5"}, io.Discard); err != nil ||
		c.addr != "localhost:5" || c.maxLine != 77 {
		t.Errorf("with a flag: %+v, %v", c, err)
	}

	t.Setenv("KVSERVER_MAX_LINE", "")
	t.Setenv("KVSERVER_VERSION", "1.2")
	if c, err = parseFlags(nil, io.Discard); err != nil || c.maxLine != defaultMaxLine {
		t.Errorf("with an empty value and a version: %+v, %v", c, err)
	}

	t.Setenv("KVSERVER_LOG", "json") // for a server; what a client says is text
	for _, args := range [][]string{{"-ping", "x"}, {"-c", ""}} {
		is.In(t, "what is said", misuseOf(args), "kvserver: ")
	}

	t.Setenv("KVSERVER_TLS_CA", "ca.pem") // for -ping, on the machine of a server
	if _, err = parseFlags(nil, io.Discard); err != nil {
		t.Errorf("a server with a CA for -ping beside it: %v", err)
	}
	t.Setenv("KVSERVER_FSYNC", "1s") // of that server
	if c, err = parseFlags([]string{"-ping"}, io.Discard); err != nil || c.ca != "ca.pem" {
		t.Errorf("-ping with a CA from the environment: %q, %v", c.ca, err)
	}

	for _, bad := range []string{"many", "1kB2", "1", "2GiB"} {
		t.Setenv("KVSERVER_MAX_LINE", bad)
		if _, err = parseFlags(nil, io.Discard); err == nil || err.Error() !=
			`KVSERVER_MAX_LINE="`+bad+`" in the environment is no value for -max-line` {
			t.Errorf("a bad value: %v", err)
		}
	}

	// A boolean flag has no value, but its variable has one.
	t.Setenv("KVSERVER_MAX_LINE", "")
	t.Setenv("KVSERVER_V", "yes")
	_, err = parseFlags(nil, io.Discard)
	wantTodo(t, err, "KVSERVER_V takes 1 or 0: also log every connection.")
	t.Setenv("KVSERVER_V", "")

	// A blank or a newline at an end of a value is shown, because nobody would see it.
	for name, flag := range map[string]string{"DATA": "data", "ADDR": "addr", "TLS_CERT": "tls-cert",
		"TLS_CA": "tls-ca"} {
		t.Setenv("KVSERVER_"+name, "unix:/tmp/none\n")
		want := "KVSERVER_" + name + `="unix:/tmp/none\n" in the environment is no value for -` + flag
		if _, err = parseFlags(nil, io.Discard); err == nil || err.Error() != want {
			t.Errorf("an odd path: %v, want %s", err, want)
		}
		if _, err = parseFlags([]string{"-" + flag, "x:1"}, io.Discard); err != nil && err.Error() == want {
			t.Errorf("an odd path that does not count: %v", err)
		}
		os.Unsetenv("KVSERVER_" + name)
	}

	// Advice shows such a path in quotes.
	for why, todo := range map[error]string{
		storage.ErrMissing: `mkdir -m 700 "/none\n"`,
		syscall.EROFS:      `Mount its file system for writing, or give another directory. kvserver check "/n`,
		syscall.ENOSPC:     "Make room, or mend what else is wrong, then start again",
	} {
		wantTodo(t, storage.Advise("/none\n", why, tryAgain), todo)
	}
}

func TestFlagsUnknownInTheEnvironment(t *testing.T) { command.UnknownVariables(t, warnOfVariables) }
func TestFlagSizes(t *testing.T)                    { command.FlagSizes(t, parseSize) }

func TestRepairBesideASilentEtcd(t *testing.T) { command.RepairBesideASilentEtcd(t, binary) }

func TestManual(t *testing.T)            { command.Manual(t, printManual, printPart, runCommand) }
func TestManualOnAFullDisk(t *testing.T) { command.ManualOnAFullDisk(t, binary) }

// ---- main.go: the README

// Ensure that the tests named on the first page exist, and that it has all promises of the README.
func TestPromisesHaveTests(t *testing.T) {
	var code []byte
	var files []string
	for _, pattern := range []string{"*", "kvstore/*", "kvstore/*/*", "kvstore/*/*/*"} {
		found, _ := filepath.Glob(pattern + "_test.go")
		files = append(files, found...)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		is.OK(t, err)
		code = append(code, b...)
	}

	page, _, _ := strings.Cut(string(code), "\npackage main")
	names := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(page, -1)

	_, promises, _ := strings.Cut(readme, "\n## What it promises\n")
	promises, _, _ = strings.Cut(promises, "\n## ")
	if strings.Count(promises, "\n- ") < 10 {
		t.Fatalf("the README promises %q", promises)
	}

	for _, m := range regexp.MustCompile(`(?m)^- (.*)\.$`).FindAllStringSubmatch(promises, -1) {
		if !strings.Contains(page, "\n//\t"+m[1]+"\n//\t\t") {
			t.Errorf("the README promises %q, of which the first page names no test", m[1])
		}
	}

	if len(names) < 40 {
		t.Errorf("the first page names %d tests", len(names))
	}
	for _, name := range names {
		if !bytes.Contains(code, []byte("\nfunc "+name+"(")) {
			t.Errorf("the first page names %s, which is not there", name)
		}
	}
}

func TestReadmeSession(t *testing.T)       { protocol.ReadmeSession(t, serveEmpty, readme) }
func TestReadmeConversations(t *testing.T) { protocol.ReadmeConversations(t, serveEmpty, readme) }
func TestReadmePrograms(t *testing.T)      { command.ReadmePrograms(t, readme, serveTCP) }
func TestReadmeCommands(t *testing.T)      { command.ReadmeCommands(t, readme, binary, serveTCP) }
func TestReadmeUnit(t *testing.T)          { command.ReadmeUnit(t, binary) }
func TestReadmeAlerts(t *testing.T)        { command.ReadmeAlerts(t, metricsAtStart) }

// metricsAtStart returns what an empty server that has just started shows to Prometheus, each
// series as an hour of values, one a minute.
func metricsAtStart(t *testing.T) map[string]string {
	log := newLog(io.Discard, false, false)
	s := New(nil)
	s.log, s.logged, s.status = log.Logger, &log.counts, new(storage.Status)
	s.db = storeIn(t, storetest.New(), s.status)
	startTCP(t, s)

	answer := httptest.NewRecorder()
	ask := httptest.NewRequest("GET", "http://localhost/metrics", nil)
	s.watchHandler("").ServeHTTP(answer, ask)

	series := map[string]string{"up": "1x60"}
	for line := range strings.Lines(answer.Body.String()) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			series[name] = value + "x60"
		}
	}

	// The uptime grows, because the server goes on.
	series["kvserver_uptime_seconds"] = "0+60x60"

	if len(series) < 40 {
		t.Errorf("the server shows %d numbers", len(series))
	}
	return series
}

// ---- main.go: the log

// Ensure that nobody waits for the reader of the log: lines wait in a queue, then they are counted
// instead, and their number is logged later.
func TestLogNeverBlocks(t *testing.T) {
	for _, json := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, w := io.Pipe()
			log := newLog(w, json, false)
			for i := range logLines + 100 { // one line is being written
				log.Info("a line", "number", i)
			}
			is.Within(t, flushTime, flushTime, log.flush) // for somebody who does not read

			// From here on somebody reads.
			var text strings.Builder
			done := make(chan struct{})
			go func() {
				io.Copy(&text, r)
				close(done)
			}()

			synctest.Wait()
			log.Info("the last line")
			log.flush()
			close(log.lines)
			w.Close()
			<-done

			lines := strings.Split(strings.TrimSpace(text.String()), "\n")
			lost := regexp.MustCompile(`lines of log were lost.*lines"?[=:](9[89]|100)\b`).FindAllString(
				text.String(), -1)
			if len(lines) < logLines || len(lines) > logLines+4 || len(lost) != 1 ||
				!strings.Contains(lines[len(lines)-1], "the last line") {
				t.Errorf("%d lines, of which %q tell of lost ones; the last is %s", len(lines),
					lost, lines[len(lines)-1])
			}
		})
	}
}

// Ensure that each line about lost lines counts those that were lost since the one before.
func TestLogCountsLostLinesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var text strings.Builder
		log := newLog(&text, false, true)
		for _, lost := range []int64{2, 0, 3, 0} {
			log.counts.lost.Add(lost)
			log.Debug("a line")
			is.Within(t, 0, 0, log.flush)
		}
		close(log.lines)

		// A line that cannot be written is lost, too.
		none, w := io.Pipe()
		none.Close()
		broken := newLog(w, false, false)
		broken.Debug("a line that is not for the log")
		broken.Info("a line")
		broken.flush()
		close(broken.lines)
		is.Equal(t, "lost lines", broken.counts.lost.Load(), 1)

		told := regexp.MustCompile(`lines=\d+`).FindAllString(text.String(), -1)
		if !slices.Equal(told, []string{"lines=2", "lines=3"}) {
			t.Errorf("the log tells of %q:\n%s", told, &text)
		}
	})
}

func TestLogMayEnd(t *testing.T)              { command.LogMayEnd(t, binary) }
func TestLogTellsOfAFailingDisk(t *testing.T) { command.LogTellsOfAFailingDisk(t, binary) }
func TestLogTellsOfAFailedStart(t *testing.T) { command.LogTellsOfAFailedStart(t, binary) }

// Ensure that a client's goodbye is logged with its reason, as a warning if replies were dropped,
// and that ordinary connects and disconnects are not logged.
func TestLogSaysWhyAClientLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.fill("big", strings.Repeat("v", 1200), 2000)
		n.Dial(t).HangUp()
		n.Dial(t).Close()

		a := n.Dial(t)
		a.Send("Get:big\nGet:big\n")
		world.Pass(2 * slowAfter)
		a.Close()
		c := n.Dial(t)
		c.Post("Get:big\n")
		c.Close() // a Write fails
		synctest.Wait()

		b := n.Dial(t)
		b.WantStat("replies_dropped_total", 1)
		b.HangUp()
		n.server.Close()

		text := regexp.MustCompile(`(?m)^time=\S+ `).ReplaceAllString(n.log.Take(), "")
		want := `level=WARN msg="client left" client=3 addr=fake ` +
			`reason="slow reader, 1 replies dropped; then `
		if lines := strings.Split(text, "\n"); len(lines) != 4 || !strings.HasPrefix(lines[0], want) {
			t.Errorf("the log is\n%s\nwant first %s", text, want)
		}
	})
}

// ---- main.go: start and stop

func TestSignalsWhileLoading(t *testing.T) { command.SignalsWhileLoading(t, binary) }
func TestSignalsStopCleanly(t *testing.T)  { command.SignalsStopCleanly(t, binary) }
func TestSignalsTwice(t *testing.T)        { command.SignalsTwice(t, binary) }
func TestSignalsOnATerminal(t *testing.T)  { command.SignalsOnATerminal(t, binary) }

// Ensure that a stop takes the time that it needs where all data has to be written again first.
func TestSignalsWhileAllDataIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, goOn, ended := storetest.New(), make(chan struct{}), make(chan error)
		var isRemoved atomic.Bool
		dir.Before = func(call storetest.Call) error {
			if call.What == "create" && isRemoved.Load() {
				<-goOn
			}
			return nil
		}

		db := storeIn(t, dir, nil)
		db.Put("k", "v")
		is.OK(t, db.Commit())

		// All data has to be written again, and that stands still until goOn.
		is.OK(t, dir.Remove("seg-1.log"))
		isRemoved.Store(true)
		world.Pass(2 * time.Second) // until the store looks at its files

		var text command.Screen
		log := newLog(&text, false, false)
		go func() { ended <- stop(config{}, log, New(nil), db, nil) }() // it may end this process

		world.Pass(2 * stopTime)
		close(goOn)
		is.OK(t, <-ended)

		log.flush()
		close(log.lines)
		is.Equal(t, "lines that say why", strings.Count(text.Take(), "waits until all data is written again"), 2)
	})
}

// Ensure that a stop gives up if the disk does not answer.
func TestSignalsWhileTheDiskHangs(t *testing.T) {
	const name = "KVSERVER_TEST_HANG" // the stop ends its process, which must be another one
	if os.Getenv(name) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=1m")
		cmd.Env = append(os.Environ(), name+"=1")
		_, errs, code := protocol.Outputs(cmd)
		is.Equal(t, "its exit code", code, exitFailure)
		is.In(t, "the log", errs, ":05.000", "stopping takes too long, giving up") // stopTime
		return
	}

	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		db := storeIn(t, dir, nil)
		dir.Before = func(storetest.Call) error { select {} }
		stop(config{}, newLog(os.Stderr, false, false), New(nil), db, nil)
	})
}

// Ensure that a stop fails, and says why, if the data cannot be closed.
func TestSignalsBesideABrokenDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, text := storetest.New(), new(command.Screen)
		db, log := storeIn(t, dir, nil), newLog(text, false, false)
		dir.Before = func(storetest.Call) error { return errors.New("broken") }
		is.Equal(t, "the result", stop(config{}, log, New(nil), db, nil), errTold)
		log.flush()
		close(log.lines)
		is.In(t, "the log", text.Take(), "the data cannot be kept any more", "broken")
	})
}

// Ensure that the log says whether strangers can reach the server, and how to try it.
func TestStartTellsWhatToTry(t *testing.T) {
	for _, c := range []struct {
		c       config
		at, try string
		isOpen  bool
	}{
		{config{}, "127.0.0.1:5", `"nc 127.0.0.1 5"`, false},
		{config{}, "[::]:5", `"nc localhost 5"`, true},
		{config{cert: "c"}, "192.0.2.1:5", `"kvserver help TLS"`, true},
		{config{cert: "c", clientCA: "ca"}, "192.0.2.1:5", `"kvserver help TLS"`, false},
	} {
		n := newFakeNet()
		tellStart(c.c, n.server, []net.Listener{listenerAt{n, c.at}})
		said := n.log.Take()
		is.In(t, "the log", said, "try="+c.try)
		is.Equal(t, c.at+" is open", strings.Contains(said, "anyone who can reach this address"), c.isOpen)
	}
}

// listenerAt is a listener that seems to listen at an address.
type listenerAt struct {
	net.Listener
	at string
}

func (l listenerAt) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(l.at))
}

func TestFullDiskRefusesWrites(t *testing.T) { command.FullDiskRefusesWrites(t, binary) }
func TestKilledServer(t *testing.T)          { protocol.KilledServer(t, binary) }

// ---- main.go: certificates, and server.go: TLS

func TestTLS(t *testing.T) { command.TLS(t, binary) }

// Ensure that a handshake that does not go on ends in time, and that Close does not wait for one,
// even if it has not begun because others are under way.
func TestTLSHandshakeIsLimited(t *testing.T) {
	withTLS := serverConfig(t)
	for state, takes := range map[string]time.Duration{"serves": handshakeTime, "closes": 0, "full, closes": 0} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.tls = withTLS
			n.start(t)
			for state == "full, closes" && len(n.server.shaking.slots) < cap(n.server.shaking.slots) {
				n.server.shaking.slots <- struct{}{}
			}
			a := n.Dial(t)
			synctest.Wait()

			is.Within(t, takes, takes, func() {
				if state != "serves" {
					n.server.Close()
				}
				a.WantClosed()
			})
			a.Close()
		})
	}
}

// Ensure that failing handshakes are counted, and not logged one by one.
func TestTLSFailuresAreCounted(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.tls = new(tls.Config)
		flood := func() {
			for range 100 {
				a := n.Dial(t)
				a.Send("garbage, not a handshake\n")
				io.Copy(io.Discard, a.R)
				a.Close()
			}
		}

		// The first line comes at once, the next one a while later: it counts what came between.
		flood()
		world.Pass(seldomTime)
		flood()
		synctest.Wait()

		lines := regexp.MustCompile(
			`TLS handshakes failed" since_last_line=(\d+)`).FindAllStringSubmatch(n.log.Take(), -1)
		if len(lines) != 2 || lines[0][1] != "1" || lines[1][1] != "100" {
			t.Errorf("200 failing handshakes are told as %q", lines)
		}
	})
}

// Ensure that handshakes that do not go on take no client's place and keep nobody out, however many
// they are: a new one takes the place of the oldest that has sent nothing. So a client that has
// sent its hello stays, up to handshakeTime, while there is one that has not.
func TestTLSHandshakesHoldNoPlace(t *testing.T) {
	t.Parallel()
	withTLS := serverConfig(t)
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.tls, n.server.maxClients, n.server.handshakes = withTLS, 1, 10
		const interval = time.Second / 400

		done := make(chan struct{})
		var flood sync.WaitGroup
		flood.Go(func() {
			for !isClosed(done) {
				n.Dial(t) // and sends nothing
				<-time.After(interval)
			}
		})
		world.Pass(2 * handshakeTime)

		// A silent handshake is replaced after ten intervals, but one whose hello has come stays.
		for _, trip := range []time.Duration{0, 5 * interval, time.Second} {
			a := n.Dial(t)
			a.Conn = &farConn{a.Conn, trip} // one trip for a hello, a handshake and a request
			is.Within(t, 0, 5*trip, func() { a.OverTLS().Ask("Ping", ":PONG") })
			a.Close()
			synctest.Wait()
		}

		close(done)
		flood.Wait()
	})
}

// Ensure that while workLoop waits for a Commit no more handshakes begin than may be under way,
// whether they fail or succeed, and that all end afterwards.
func TestTLSHandshakesWaitForACommit(t *testing.T) {
	withTLS := serverConfig(t)
	const most, clients = 10, 200
	for _, succeeds := range []bool{true, false} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			store := protocol.GatedStore{Memory: kvstore.NewMemory(), Gate: make(chan error)}
			n.server.db = kvstore.StoreOf(store)
			n.server.tls, n.server.handshakes = withTLS, most
			n.Dial(t).OverTLS().Post("Put:k:v\n") // its Commit lasts

			var came atomic.Int64
			var all sync.WaitGroup
			for range clients {
				all.Go(func() {
					a := n.Dial(t)
					if came.Add(1); succeeds {
						a.OverTLS().SendSome("Quit\n")
					} else {
						a.SendSome("garbage, not a handshake\n")
					}

					io.Copy(io.Discard, a.R)
					a.Close()
				})
			}

			world.Pass(handshakeTime / 2)
			is.Between(t, "connections that were accepted", came.Load(), most, most+maxBatch+2)

			close(store.Gate)
			all.Wait()
			n.Dial(t).OverTLS().Ask("Ping", ":PONG")
		})
	}
}

// Ensure that handshakes that do not go on keep to their share of the memory, whatever they have
// sent.
func TestTLSHandshakesTakeLittleMemory(t *testing.T) {
	withTLS := serverConfig(t)
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.tls = withTLS
		b := &n.server.budget
		b.limitTo(64<<20, 0)

		// Of a hello of 64 KiB all but the last quarter comes.
		hello := []byte("\x16\x03\x01\x40\x00\x01\x00\xff\xff") // in records of 16 KiB
		hello = append(hello, make([]byte, 1<<14-4)...)
		for range 2 {
			hello = append(append(hello, "\x16\x03\x01\x40\x00"...), make([]byte, 1<<14)...)
		}

		// The first connection starts the server, which has memory of its own.
		n.Dial(t)
		before := protocol.HeapBytes()
		for range 300 {
			n.Dial(t).Conn.Write(hello)
			synctest.Wait()
		}
		is.Between(t, "bytes of handshakes", int64(protocol.HeapBytes()-before), 0, b.reserve/2)
	})
}

// farConn is a client's connection on which each answer takes a while.
type farConn struct {
	world.HalfConn
	trip time.Duration
}

func (f *farConn) Read(p []byte) (int, error) {
	n, err := f.HalfConn.Read(p)
	<-time.After(f.trip)
	return n, err
}

// ---- main.go: the client in the binary

// Ensure that kvserver -c prints data and errors to the right outputs, counts lines as its user
// does, and knows whether all requests were answered.
func TestCommand(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		for _, c := range []struct {
			requests  []string
			in        string
			out, errs string
			good      bool
			err       error
		}{
			{requests: []string{"Put:k:v", "Put:k:w", "Get:k"}, out: "k:v\nk:w\n", good: true},
			{in: "Get:k\nPing:x\n\nget k\nGet:k\n", out: "k:v\nk:w\n:PONG x\nk:v\nk:w\n",
				errs: "line 4: unknown request \"get k\"; did you mean Get:k ?\n"},
			{in: "Get:k\nDelete:k", out: "k:v\nk:w\n",
				errs: "line 2: the last line has no newline at its end, so it was not run\n"},
			{in: "Get:k\n\r", out: "k:v\nk:w\n",
				errs: "line 2: the last line has no newline at its end, so it was not run\n"},
			{in: "Get:k\nquit\n", out: "k:v\nk:w\n", good: true},
			{in: "Get:k\r\n\r\nQUIT\r\nDelete:k\n", out: "k:v\nk:w\n", err: errUnanswered},
			{in: strings.Repeat("\n", maxWrite-len("Quit\n")) + "Quit\nDelete:k\n", err: errUnanswered},
			{in: strings.Repeat("\n", maxWrite-len("Quit\n")) + "Quit\n", good: true},
			{requests: []string{"Keys"}, out: "k\n", good: true},
			{requests: []string{"Dump"}, out: "Put:k:v\nPut:k:w\n", good: true},
			{good: true},
		} {
			out, errs, good, err := converseWith(t, n, c.in, c.requests...)
			if out != c.out || errs != c.errs || good != c.good || !errors.Is(err, c.err) {
				t.Errorf("%q %q: prints %q and %q, %v, %v\nwant %q and %q, %v, %v", c.requests,
					c.in, out, errs, good, err, c.out, c.errs, c.good, c.err)
			}
		}

		// The input goes on when the server has closed already, or just stays open.
		for rest, want := range map[string]error{"": nil, "Delete:k\n": errUnanswered} {
			in, w := io.Pipe()
			go func() {
				io.WriteString(w, "Quit\n")
				<-time.After(closeTime / 2)
				io.WriteString(w, rest)
			}()
			_, err := talk(&talker{conn: n.Dial(t).Conn, in: in, out: command.Closing(io.Discard)})
			is.Equal(t, "an error is "+fmt.Sprint(want), errors.Is(err, want), true)
			w.Close()
		}

		a := n.Dial(t)
		go func() {
			<-time.After(time.Second)
			n.server.Close()
		}()

		if _, err := talk(&talker{conn: a.Conn, in: strings.NewReader(""),
			out: command.Closing(io.Discard), errs: io.Discard}); err != nil {
			t.Errorf("with no input: %v", err)
		}
		<-time.After(2 * time.Second)
	})
}

// Ensure that -c shows :OK n only if it is the result of the request, however long the request is.
func TestCommandShowsResults(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.maxLine = 1 << 20
		long := strings.Repeat("v", 2*maxWrite)

		for _, c := range []struct {
			requests []string
			out      string
		}{
			{[]string{"Count:k", "Add:k:v", "ADD:k:w", "Count:k"}, ":OK 0\n:OK 1\n:OK 0\n:OK 1\n"},
			{[]string{"Lease:lock:30:a", "Lease:lock:30:b", "Swap:lock:b:b", "Swap:lock:a:a"},
				":OK 1\n:OK 0\n:OK 0\n:OK 1\n"},
			{[]string{"Remove:lock:b", "Remove:lock:a"}, ":OK 0\n:OK 1\n"},
			{[]string{"Put:l:" + long, "Swap:l:" + long + ":a", "Swap:l:" + long + ":a"}, ":OK 1\n:OK 0\n"},

			// Requests as in a Dump, requests that only change something, and requests with lines
			// of their own.
			{[]string{"Put:k:w", "Expire:k:60", "Update:k:v:x", "Set:k:y", "Delete:none", "Ack"}, ""},
			{[]string{"Get:k", "Expire:k:60", "Expire:k", "Keys", "Take:k", "Take:k", "Get:k"},
				"k:y\n60\nk\nl\nk:y\n"},

			// That an Expire has found no key.
			{[]string{"Expire:none:60", "Expire:none", "Expire:l:0", "Expire:l"}, ":OK 0\n:OK 0\n"},
		} {
			out, errs, good, err := converseWith(t, n, "", c.requests...)
			if out != c.out || errs != "" || !good || err != nil {
				t.Errorf("%.100q: prints %q and %q, %v, %v, want %q", c.requests, out, errs, good, err, c.out)
			}
		}
	})
}

func TestCommandHearsTheServer(t *testing.T)  { command.ClientHearsTheServer(t, inProcess) }
func TestCommandLosesItsServer(t *testing.T)  { command.ClientLosesItsServer(t, inProcess) }
func TestCommandLeavesAStranger(t *testing.T) { command.ClientLeavesAStranger(t, inProcess) }
func TestCommandResumes(t *testing.T)         { command.ClientResumes(t, inProcess, serveEmpty) }
func TestCommandSendsLongLines(t *testing.T)  { command.ClientSendsLongLines(t, inProcess, maxWrite) }
func TestCommandTimeout(t *testing.T)         { command.ClientTimeout(t, inProcess) }
func TestCommandLeavesTheLine(t *testing.T)   { command.ClientLeavesTheLine(t, binary, serveTCP) }

func TestCommandBesideASilentServer(t *testing.T) {
	command.ClientBesideASilentServer(t, inProcess, connectTime)
}

func TestCommandRefusesUTF16(t *testing.T)  { command.ClientRefusesUTF16(t, inProcess, serveEmpty) }
func TestCommandOutput(t *testing.T)        { command.ClientOutput(t, binary, serveTCP) }
func TestCommandOnATerminal(t *testing.T)   { command.ClientOnATerminal(t, inProcess, serveEmpty) }
func TestCommandIsInterrupted(t *testing.T) { command.ClientIsInterrupted(t, binary, serveTCP) }

// Ensure that checking many requests on the command line takes linear memory: each is checked
// without joining all that follow.
func TestCommandWithManyRequests(t *testing.T) {
	c := config{client: true, requests: slices.Repeat([]string{"Put:key:value"}, 5000)}
	is.Between(t, "bytes", allocated(func() { is.OK(t, c.checkRequests()) }), 0, 5000*10_000)
}

func TestCommandBehindAQuit(t *testing.T) { command.ClientBehindAQuit(t, binary, serveTCP) }

// Ensure that -c gives correct advice on what to do next: with the flags that it was given, and to
// look first only if something may have been changed.
func TestCommandSaysWhatToDo(t *testing.T) {
	answered := func(t *talker) *talker { // through two lines
		t.answered = 2
		return t
	}

	owed := make(chan queryType, 1)
	owed <- put
	quits := answered(new(talker))
	quits.quit = 2

	for _, c := range []struct {
		talker *talker
		err    error
		want   string
	}{
		{&talker{config: config{args: []string{"-addr", "7000", "-c", "-stop"}}}, errStopped,
			"go on: tail -n +1 FILE | kvserver -addr 7000 -c -stop"},
		{answered(&talker{config: config{args: []string{"-addr", "7000", "-c", "-stop"}}}), errStopped,
			"go on: tail -n +3 FILE | kvserver -addr 7000 -c -stop"},
		{answered(&talker{owed: owed, config: config{args: []string{"-c"}}}), errUnanswered,
			"look, then go on: tail -n +3 FILE | kvserver -c"},
		{&talker{config: config{args: []string{"-c"}}}, errGone, "go on: tail -n +1 FILE | kvserver -c"},
		{&talker{config: config{requests: []string{"Foo"}}}, errStopped, "Mend it, then send the rest."},
		{&talker{isTyped: true}, errGone, "All that was sent is answered, so send the rest."},
		{&talker{isTyped: true}, errInterrupted, "All that was sent is answered, so send the rest."},
		{&talker{owed: owed, config: config{requests: []string{"Get:a", "set:a:b"}}}, errUnanswered,
			"look, then send the rest."},
		{quits, errUnanswered, "Nothing after a Quit is run."},
		{&talker{}, errUnasked, "may be done or not: look, then go on"},
		{&talker{}, errOutput, "Make room where the answers go"},
	} {
		wantTodo(t, c.talker.problem(c.err), c.want)
	}

	// A user who may not connect to a socket is not told to start a server that runs.
	denied := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	wantTodo(t, dialProblem("unix:/run/sock", denied), "ls -l /run/sock")
	wantTodo(t, listenProblem("http", ":80", syscall.EACCES), "for the administrator: choose -http 9999")
	wantTodo(t, listenProblem("addr", ":80", io.EOF), "Choose another address: kvserver -addr localhost:9999")

	closed, _ := os.Open(os.DevNull) // as an output of a service may be
	closed.Close()
	is.Equal(t, "a closed file is a terminal", isTerminal(closed), false)

	// Only a server that listens everywhere is looked for on localhost.
	is.Equal(t, "the address of another machine", reachable("192.0.2.1:5"), "192.0.2.1:5")
}

func TestCommandFailsWithItsFiles(t *testing.T) {
	command.ClientFailsWithItsFiles(t, inProcess, serveEmpty)
}

// ---- server.go: start, counts and close

// Ensure that Start serves its port, and returns an error if it cannot.
func TestStart(t *testing.T) {
	first := New(kvstore.NewMemory())
	is.OK(t, first.Start(0))
	defer first.Close()
	port := first.listener.Addr().(*net.TCPAddr).Port
	a := protocol.DialTCP(t, first.listener.Addr().String())
	a.Ask("Ping", ":PONG")
	a.HangUp()

	second := New(kvstore.NewMemory())
	is.Equal(t, "a taken port", errors.Is(second.Start(port), syscall.EADDRINUSE), true)
	is.OK(t, second.Start(0)) // a free port after a taken one
	second.Close()
	is.Equal(t, "second Start", first.Start(0), errStarted)
}

// Ensure that a server that cannot serve gives its data back, and a lock in etcd with it.
func TestStartThatFailsGivesItsDataBack(t *testing.T) {
	dir := t.TempDir()
	log := newLog(io.Discard, false, false)
	defer close(log.lines)
	c, _ := parseFlags([]string{"-data", dir, "-addr", "unix:/no/such/sock"}, io.Discard)
	is.Equal(t, "it serves", serve(c, log) == nil, false)
	command.OpenStore(t, dir).Close()
}

// Ensure that every call may come twice, early, late and concurrently.
func TestStartAndCloseInAnyOrder(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		s := New(kvstore.NewMemory())
		is.Equal(t, "counts before Start", s.CountActive()+s.CountDropped(), 0)
		s.Close()
		s.Close()
		is.Equal(t, "Start after Close", s.Start(0), errClosed)
		is.Equal(t, "counts after Close", s.CountActive()+s.CountDropped(), 0)

		a := n.Dial(t)
		is.Equal(t, "second start", n.server.serve(newFakeNet()), errStarted)
		a.Send("Get:k\n")
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(n.server.Close)
			wg.Go(func() { n.server.CountActive() })
			wg.Go(func() { n.server.CountDropped() })
		}
		wg.Wait()

		is.Equal(t, "clients after Close", n.server.CountActive(), 0)
		is.Equal(t, "start after Close", n.server.serve(newFakeNet()), errClosed)
		a.Close() // its Get may have come too late, so the server may have reset the connection

		none := New(nil)
		is.Equal(t, "Start without a store", none.Start(0), errNoStore)
		is.Equal(t, "counts without a store", none.CountActive()+none.CountDropped(), 0)
		none.Close()
	})
}

// Ensure that one server serves the clients of several listeners, that a listener that fails keeps
// nobody from another, and that Close ends all.
func TestStartOnSeveralListeners(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		other, failing := newFakeNet(), newFakeNet()
		other.server, failing.Failures = n.server, 1<<30
		is.OK(t, n.server.serve(n, other, failing))

		a, b := n.Dial(t), other.Dial(t)
		a.Ask("Put:k:v\nPing", ":PONG")
		b.Ask("Get:k", "k:v")
		is.Equal(t, "clients", n.server.CountActive(), 2)

		n.server.Close()
		protocol.WantAllClosed(a, b)
		for _, l := range []*fakeNet{n, other, failing} {
			is.Equal(t, "the listener is closed", isClosed(l.Closed()), true)
		}
		closeClients([]*protocol.Client{a, b})
	})
}

// Ensure that the counts are right while clients come and go, whoever asks.
func TestCounts(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		check := func(active, dropped int) {
			t.Helper()
			synctest.Wait()
			var wg sync.WaitGroup
			for range 10 { // concurrently, so that no answer goes to another's call
				wg.Go(func() { is.Equal(t, "CountActive", n.server.CountActive(), active) })
				wg.Go(func() { is.Equal(t, "CountDropped", n.server.CountDropped(), dropped) })
			}
			wg.Wait()
		}

		n.start(t)
		check(0, 0)
		a, b, c := n.Dial(t), n.Dial(t), n.Dial(t)
		check(3, 0)
		a.Ask("Ping", ":PONG")
		check(3, 0)

		// A client may leave in several ways, and each counts once.
		a.HangUp()
		check(2, 1)
		b.Close()
		check(1, 2)
		c.Send("Quit\n")
		c.WantClosed()
		c.Close()
		check(0, 3)
		n.Dial(t).HangUp()
		check(0, 4)

		// A server that closes gives its last client a moment, and still tells the counts.
		d := n.Dial(t)
		d.Ask("Ping", ":PONG")
		go n.server.Close()
		is.Within(t, 0, 0, func() { check(1, 4) })
		d.WantClosed()
	})
}

// closeStates are states of a client when the server closes, and how long Close may take then.
var closeStates = []struct {
	name  string
	begin func(a *protocol.Client)
	most  time.Duration
}{
	{"idle", func(a *protocol.Client) {}, 0},
	{"quiet", func(a *protocol.Client) { a.Ask("Ping", ":PONG") }, busyTime},
	{"inside a line", func(a *protocol.Client) { a.Send("Put:k:") }, busyTime},
	{"inside a long line", func(a *protocol.Client) { a.Send(strings.Repeat("x", testMaxLine*3)) }, busyTime},
	{"after a burst", func(a *protocol.Client) { a.Send(strings.Repeat("Put:k:v\n", 5000)) }, 2 * busyTime},
	{"sending when it sees the end", func(a *protocol.Client) {
		a.Ask("Ping", ":PONG")
		go func() { // a pause ends the connection, not the time since the end
			a.WantClosed()
			for i := range 20 {
				if _, err := io.WriteString(a.Conn, "more\n"); err != nil {
					a.T.Errorf("line %d of 20: %v", i+1, err)
					return
				}
				<-time.After(busyTime / 2)
			}
		}()
	}, 11 * busyTime},
	{"half-closed", func(a *protocol.Client) { a.Conn.CloseWrite() }, 0},
	{"gone", func(a *protocol.Client) { a.Close() }, 0},
	{"after Quit", func(a *protocol.Client) { a.Send("Quit\n") }, drainTime},
	{"waiting for a snapshot", func(a *protocol.Client) { a.Send("Keys\n") }, 0},
	{"not reading", func(a *protocol.Client) { a.Send("Get:big\n") }, closeTime + busyTime},
	{"not reading, ack", func(a *protocol.Client) {
		a.SendSome("Ack\n" + strings.Repeat("Get:big\n", 300))
	}, closeTime + busyTime},
	{"sending on and on", func(a *protocol.Client) {
		go func() {
			for {
				if _, err := a.Conn.Write([]byte("Put:on:on\n")); err != nil {
					return
				}
				<-time.After(busyTime / 2)
			}
		}()
	}, busyTime + drainTime},
}

// Ensure that Close is bounded in time in every state of the clients, and that it ends every
// goroutine (a bubble does not end while one is left).
func TestCloseInEveryState(t *testing.T) {
	for _, s := range closeStates {
		for _, after := range []time.Duration{0, time.Second / 2, time.Minute} {
			t.Run(fmt.Sprint(s.name, " ", after), func(t *testing.T) {
				inBubble(t, func(t *testing.T, n *fakeNet) {
					n.fill("big", strings.Repeat("v", 1200), 1000)
					for range maxSnapshots { // none is free
						n.server.snapshots.slots <- struct{}{}
					}

					b, a := n.Dial(t), n.Dial(t)
					s.begin(a)
					if after > 0 {
						world.Pass(after)
					}

					// A client that has just spoken may get up to a second to send more.
					most := s.most
					if after < quietAfter {
						most = max(most, drainTime)
					}

					is.Within(t, 0, most+busyTime, n.server.Close)
					b.WantClosed()
					a.Close()
					world.Pass(busyTime) // for those who still send to notice
				})
			})
		}
	}
}

// Ensure that requests that were read before Close are answered, and that a stop waits for a client
// that goes on sending while it reads: until it has taken all its answers, or its second is over.
// No reset destroys the answers.
func TestCloseUnderASteadyReader(t *testing.T) {
	for _, config := range []*tls.Config{nil, serverConfig(t)} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.tls = config
			a := n.dialTLS(t)
			const puts = 9 * kilo
			a.Post("Ack\n" + strings.Repeat("Put:k:v\n", puts))
			readAndSend(a, n.server, ":OK 0\n"+strings.Repeat(":OK 1\n", puts), 15*kilo, 50*time.Millisecond)
		})

		// The client may pause, for longer than a steady reader takes for the whole answer.
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.tls = config
			a := n.dialTLS(t)
			a.Ask("Get:none\nPing", ":PONG")
			a.Post("Put:k:v\nPing\n")
			readAndSend(a, n.server, ":PONG\n", 1, closeTime/10)
		})

		// It may have sent nothing for a second, and still have much to read.
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.tls = config
			n.fill("k", strings.Repeat("v", kilo), 650)
			a, piece := n.dialTLS(t), make([]byte, 15*kilo)
			a.Post("Get:k\n")

			const before = 30 // pieces that it reads before the server closes
			for range before {
				<-time.After(closeTime / 20)
				io.ReadFull(a.Conn, piece)
			}

			all := strings.Repeat("k:"+strings.Repeat("v", kilo)+"\n", 650)
			readAndSend(a, n.server, all[before*len(piece):], len(piece), closeTime/20)
		})
	}
}

// Ensure the same on a real socket. The answer is so long that, even on a busy machine, the server
// knows that its client has not read all of it yet. It is read in few pieces, because their second
// is a second of real time.
func TestCloseUnderASteadyReaderOnRealSocket(t *testing.T) {
	t.Parallel()
	s := New(kvstore.NewMemory())
	value := strings.Repeat("v", kilo)
	for range kilo {
		s.db.Put("k", value)
	}
	addr := startTCP(t, s)
	a, watch := protocol.DialTCP(t, addr), protocol.DialTCP(t, addr)
	a.Conn.(*net.TCPConn).SetReadBuffer(256 * kilo) // the rest waits at the server's side

	a.Send("Get:k\n")
	protocol.Await(t, "the Get", func() bool { return watch.Stat("get_requests_total") == 1 })
	watch.HangUp()
	readAndSend(a, s, strings.Repeat("k:"+value+"\n", kilo), 150*kilo, time.Millisecond)
}

// Ensure that time in which the server stands still does not count as a client's time to read.
func TestCloseWhileTheServerStandsStill(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.db = &protocol.SlowStore{Memory: kvstore.NewMemory(), Takes: 3 * closeTime}
		value := strings.Repeat("v", kilo)
		n.fill("k", value, 1200)
		a, b := n.Dial(t), n.Dial(t)
		b.Ask("Ping", ":PONG")

		a.Post("Get:k\n")
		b.Post("Put:x:y\n") // its Commit takes long
		readAndSend(a, n.server, strings.Repeat("k:"+value+"\n", 1200), 15*kilo, closeTime/20)
	})
}

// readAndSend has a client read its answers in pieces, with a pause before and a Put after each,
// while the server closes. The answers must be want. The server has read all requests before.
func readAndSend(a *protocol.Client, s *keyValueServer, want string, size int, pause time.Duration) {
	var closing sync.WaitGroup
	closing.Go(s.Close)
	<-s.closeSignal

	var got []byte
	piece := make([]byte, size)
	for err := error(nil); err == nil; {
		<-time.After(pause)
		var n int
		n, err = io.ReadFull(a.Conn, piece)
		got = append(got, piece[:n]...)
		a.SendSome("Put:k:w\n")
	}
	if string(got) != want {
		a.T.Errorf("%T: %d bytes of %d came", a.Conn, len(got), len(want))
	}

	a.Close()
	closing.Wait()
}

// Ensure that Close ends a reader that is just setting its own deadline.
func TestCloseMeetsADeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		var once sync.Once
		n.beforeDeadline = func() {
			once.Do(func() {
				go n.server.Close()
				synctest.Wait() // until workLoop has set its deadline
			})
		}

		a := n.Dial(t)
		is.Within(t, 0, 2*busyTime, func() {
			a.Send(strings.Repeat("Put:k:v\n", 1000))
			a.WantClosed()
		})
	})
}

// Ensure that Close does not wait for TLS to say goodbye, neither to a client that does not read
// nor to a silent one that is turned away.
func TestCloseWithTLS(t *testing.T) {
	withTLS := serverConfig(t)
	for _, request := range []string{"Get:big\n", "Get:big\nQuit\n", "Get:small\nQuit\n"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.tls = withTLS
			n.fill("big", strings.Repeat("v", 1200), 1000)
			n.fill("small", "v", world.StreamSize/len("small:v\n")) // a stream and a Write hold more
			n.server.maxClients = 1

			a := n.dialTLS(t)
			a.Post(request)
			silent := n.Dial(t)
			synctest.Wait()

			is.Within(t, 0, closeTime+drainTime+closeTime, n.server.Close)
			a.Close()
			silent.Close()
		})
	}

	// A goodbye has a limit of its own, also on a connection that ignores deadlines.
	inBubble(t, func(t *testing.T, n *fakeNet) {
		deaf := &deafConn{closed: make(chan struct{})}
		n.server.tls = withTLS
		n.wrap = func(conn net.Conn) net.Conn {
			deaf.Conn = conn
			return deaf
		}

		a := n.Dial(t).OverTLS()
		a.Ask("Ping", ":PONG")
		is.Equal(t, "bytes of its send buffer", deaf.buffer, sendBuffer)

		deaf.on.Store(true)
		go a.Send("Quit\n")
		is.Within(t, closeTime, closeTime, func() { <-deaf.closed })
		a.Close()
	})
}

// deafConn accepts no more bytes once on is set, and ignores deadlines.
type deafConn struct {
	net.Conn
	on     atomic.Bool
	once   sync.Once
	closed chan struct{}
	buffer int // bytes that the kernel is to hold for it
}

func (d *deafConn) SetWriteBuffer(bytes int) error {
	d.buffer = bytes
	return nil
}

func (d *deafConn) Write(p []byte) (int, error) {
	if d.on.Load() {
		<-d.closed
	}
	return d.Conn.Write(p)
}

func (d *deafConn) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.Conn.Close()
}

// Ensure that Close answers the Takes that wait, at once.
func TestCloseWhileTakesWait(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		a, b, c := n.Dial(t), n.Dial(t), n.Dial(t)
		a.Ask("Ack\nTake:k:1", ":OK 0", ":OK 0")
		a.Send("Take:k:60\n")
		b.Send("Ack\nTake:k:60\n")
		b.Conn.CloseWrite()
		c.Post("Ack\nTake:k:60\nPut:l:v\nPing\n") // another client might still be waiting for k

		is.Within(t, 0, drainTime, n.server.Close)
		a.WantRest(":OK 0\n")
		b.WantRest(":OK 0\n:OK 0\n")
		c.WantRest(":OK 0\n:OK 0\n:OK 1\n:PONG\n")
	})
}

// Ensure that Close waits for no endless walk, whether that counts the keys or lists them, nor for
// memory for a list, and that nothing is answered then, nor what comes after it.
func TestCloseDuringKeys(t *testing.T) {
	for keys, lists := range map[int]int64{-1: 0, 0: 0, fewKeys + 1: 1 << 40} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			walks := new(atomic.Bool)
			n.server.db = endless{kvstore.NewMemory(), keys, walks}
			n.server.budget.keyLists.Store(lists)
			a := n.Dial(t)
			a.Send("Keys\nPing\n")
			for !walks.Load() && n.server.snapshots.waiting.Load() == 0 {
				runtime.Gosched()
			}
			go n.server.Close()
			a.WantRest("")
		})
	}
}

// Ensure that Close does not wait for the Dump of very many keys.
func TestCloseDuringDump(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		const pairs = 10_000
		n.fillKeys("", pairs, strings.Repeat("v", 1000))
		a := n.DialAck(t)
		a.Send("Dump\n")
		synctest.Wait() // until its queue is full
		go n.server.Close()
		is.Between(t, "pairs that came", strings.Count(a.ReadAll(), ": Put:"), 1, pairs-1)
	})
}

// endless is a store, and its own snapshot, with endlessly many keys, though it tells another
// number.
type endless struct {
	kvstore.Store
	keys  int
	walks *atomic.Bool // one has begun
}

func (e endless) Size() (keys, values int, bytes int64) { return e.keys, 0, 0 }

func (e endless) Snapshot() kvstore.Snapshot { return e }

func (endless) View([]string, string) []string { return nil }

func (e endless) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		e.walks.Store(true)
		for i := 0; yield(strconv.Itoa(i), nil); i++ {
		}
	}
}

// ---- server.go: accepting clients

// Ensure that a failing Accept is tried again at growing intervals, with one line in the log for
// each change.
func TestAcceptBacksOff(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.Failures = 12
		const want = 1275*time.Millisecond + 4*time.Second // 5, 10, 20 ... 640 ms, then 1 s four times
		is.Within(t, want, want, func() { n.Dial(t).Ask("Ping", ":PONG") })

		n.server.Close()
		log := n.log.Take()
		for _, line := range []string{"cannot accept connections", "accepting connections again"} {
			is.Equal(t, line+", in the log", strings.Count(log, line), 1)
		}
	})

	inBubble(t, func(t *testing.T, n *fakeNet) { // Close does not wait for the next attempt
		n.Failures = 1 << 30
		n.server.serve(n)
		world.Pass(time.Minute)
		is.Within(t, 0, 0, n.server.Close)
	})
}

// Ensure that one client too many gets a line that says so, that the others do not notice it, and
// that there is room for another when one leaves.
func TestMaxClients(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.maxClients = 2
		a, b := n.Dial(t), n.Dial(t)
		for range 3 {
			c := n.Dial(t)
			c.Want(":ERROR line 0: server is full (2 clients)")
			c.WantClosed()
			c.Close()
		}

		is.Equal(t, "clients", n.server.CountActive(), 2)
		a.WantStat("clients_refused_total", 3)

		b.HangUp()
		synctest.Wait()
		c := n.Dial(t)
		c.Ask("Ping", ":PONG")

		// Of those who are turned away at a time all are told, and so many may stay for a while.
		world.Pass(time.Minute)
		told := n.DialMany(t, maxRejecting+3, func(_ int, d *protocol.Client) {
			d.Want(":ERROR line 0: server is full (2 clients)")
			d.WantClosed()
		})

		staying := func() (number int) {
			for _, d := range told { // none of them closes
				if _, err := d.Conn.Write([]byte("x")); err == nil {
					number++
				}
			}
			return number
		}
		is.Equal(t, "clients too many that stay", staying(), maxRejecting)
		closeClients([]*protocol.Client{a, c})
		synctest.Wait()
		is.Within(t, 0, drainTime, n.server.Close)
		is.Equal(t, "clients too many that stay behind Close", staying(), 0)
		closeClients(told)
		is.Equal(t, "full at the beginning and end of a minute, lines of log",
			strings.Count(n.log.Take(), "turning clients away"), 2)
	})

	synctest.Test(t, func(t *testing.T) {
		ours, theirs := world.Pipe(1, 1) // it takes one byte of that line
		New(kvstore.NewMemory()).reject(theirs)
		world.Pass(2 * closeTime)
		_, err := ours.Write([]byte("x"))
		is.Equal(t, "one that reads nothing is turned away in the end", err != nil, true)
	})
}

// Ensure that clients too many get that line under TLS as well, however many there are.
func TestMaxClientsOverTLS(t *testing.T) {
	config := serverConfig(t)
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.tls, n.server.maxClients = config, 1
		a := n.Dial(t).OverTLS()
		a.Ask("Ping", ":PONG")
		others := n.DialMany(t, maxRejecting+3, func(_ int, c *protocol.Client) {
			c.OverTLS().Want(":ERROR line 0: server is full (1 clients)")
		})
		a.Ask("Ping", ":PONG")
		closeClients(others)
	})
}

// Ensure that clients, handshakes and -http together open no more files than the process may.
func TestMaxClientsAreFewerThanFiles(t *testing.T) {
	s := New(kvstore.NewMemory())
	applyLimits(s, config{maxClients: math.MaxInt})
	is.Equal(t, "files without TLS and -http", s.maxClients+spareFiles, storage.OpenFiles())
	s.tls = new(tls.Config)
	applyLimits(s, config{maxClients: math.MaxInt, http: "x"})
	is.Equal(t, "files", s.maxClients+s.handshakes+maxWatchers+spareFiles, storage.OpenFiles())
}

// Ensure that with -max-memory clients count for half of the data's share at most, as the log says.
func TestMaxClientsLeaveMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	for most, secure := range map[int]*tls.Config{689: nil, 260: new(tls.Config)} {
		var log bytes.Buffer
		s := New(kvstore.NewMemory())
		s.log, s.tls = slog.New(slog.NewTextHandler(&log, nil)), secure
		for _, asked := range []int{most, most + 1} {
			applyLimits(s, config{maxClients: asked, maxMemory: 64e6})
			is.Equal(t, "bytes that the collector is told", debug.SetMemoryLimit(-1), 64e6)
			is.Equal(t, "clients", s.maxClients, most)
			is.Equal(t, "lines of log", strings.Count(log.String(),
				`level=INFO msg="fewer clients than -max-clients: -max-memory has no room`), asked-most)
		}
	}
}

// Ensure that a server that is full counts as healthy.
func TestMaxClientsAndPing(t *testing.T) {
	t.Parallel()
	s := New(kvstore.NewMemory())
	s.maxClients = 1
	addr := startTCP(t, s)
	protocol.DialTCP(t, addr).Ask("Ping", ":PONG")
	binary.Prints(t, "", "the server answers", true, "-addr", addr, "-ping")
	binary.Prints(t, "", "server is full (1 clients)\nNothing was done. Try again later", false,
		"-addr", addr, "-c", "Get:k")
}

// ---- server.go: turns of clients

// Ensure that a client waits hardly longer for its next turn if the system suspends the process in
// the middle of its chain, but that time in which long lists may have been searched counts in full.
func TestTurnsBesideStalls(t *testing.T) {
	const usual, stall = 50 * time.Microsecond, 3 * time.Millisecond
	floor := time.Second
	for _, searched := range []bool{false, true} {
		clock := round{epoch: time.Now().Add(-time.Hour)}
		sh := share{spent: floor, cost: usual}
		clock.looked = time.Since(clock.epoch) - stall
		clock.charge(&sh, searched)

		if isBehind := sh.finish() > floor+4*maxLead+4*usual; isBehind != searched ||
			sh.isHeavy() != searched {
			t.Errorf("after %v, searched: %v, the client is due %v behind, slow: %v", stall, searched,
				sh.finish()-floor, sh.isHeavy())
		}
	}
}

func TestTurnsOfLightClients(t *testing.T)    { protocol.TurnsOfLightClients(t, serveOn) }
func TestTurnsAfterALongRequest(t *testing.T) { protocol.TurnsAfterALongRequest(t, serveOn, maxRound) }

// chainOf returns a chain of a client that has had spent of workLoop's time, and nobody writes to
// it.
func chainOf(s *keyValueServer, spent, cost time.Duration) *Query {
	c := newClient(1, new(world.Conn), s)
	c.buffer, c.share = make(chan []byte), share{spent: spent, cost: cost}
	return &Query{queryType: get, client: c, key: "k"}
}

// Ensure that the chain of a client that has had more time than others waits for theirs, if some
// may come behind it, and that another chain runs as it comes.
func TestTurnsInOrderOfTime(t *testing.T) {
	s := New(kvstore.NewMemory())
	s.round.begin()
	much, little := chainOf(s, s.floor+maxLead, time.Microsecond), chainOf(s, s.floor, time.Microsecond)
	s.queries <- little
	s.schedule(much)
	s.schedule(<-s.queries)

	if len(s.turns) != 1 || s.turns[0] != much.client || !slices.Equal(s.batch, []*Query{little}) {
		t.Errorf("%d chains wait, and %d ran", len(s.turns), len(s.batch))
	}
}

// Ensure that of many quiet clients that wake in turn, beside a heavy one, none is far ahead of it.
func TestTurnsOfManyThatWake(t *testing.T) {
	s := New(kvstore.NewMemory())
	heavy, last := chainOf(s, time.Hour, longTime), (*Query)(nil)
	s.lineUp(heavy, heavy)
	s.runBatch(nil)
	heavy = <-heavy.client.done
	s.lineUp(heavy, heavy)
	for range 1000 {
		last = chainOf(s, 1, 0)
		s.round.over = true // so that it has to wait for its turn
		s.schedule(last)
		s.runBatch(nil)
	}
	is.Between(t, "the time that it is ahead", heavy.client.share.spent-last.client.share.spent, 0, maxRound)
}

// Ensure that a turn is short only while requests take long.
func TestTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var takes time.Duration
		s := New(protocol.LazyStore{Memory: kvstore.NewMemory(), Takes: func() time.Duration { return takes }})
		s.round.epoch = time.Now()
		c := newClient(1, new(world.Conn), s)
		c.buffer = make(chan []byte, 1) // so that nobody writes

		turn := func() (n int, took time.Duration) {
			chain := make([]Query, 6*kilo) // more than are run in a turn
			for i := range chain {
				chain[i] = Query{queryType: update, client: c, key: "k", line: i}
				if i > 0 {
					chain[i-1].next = &chain[i]
				}
			}

			start := time.Now()
			s.round.begin()
			s.runChain(&chain[0], &chain[0])
			s.turns = nil
			return c.share.next.line, time.Since(start)
		}

		// The first turn cannot know yet how long requests take.
		takes = 2 * time.Millisecond
		first, _ := turn()
		is.Between(t, "the first long Updates", first, 0, maxStride/searchCost)
		later, _ := turn()
		is.Between(t, "long Updates", later, 0, 1)

		takes = time.Microsecond
		turn()
		_, took := turn()
		is.Between(t, "a round of short Updates after long ones", took, maxRound, maxRound+maxStride*takes)

		takes = 2 * time.Millisecond
		first, _ = turn()
		is.Between(t, "the first long Updates after short ones", first, 0, maxStride/searchCost)
		again, _ := turn()
		is.Between(t, "long Updates after short ones", again, 0, 1)

		// The time of a chain is its client's, however short it is.
		takes = time.Microsecond
		turn()
		turn()
		last, before := &Query{queryType: update, client: c, key: "k"}, c.share.spent
		s.runChain(last, last)
		is.Equal(t, "the time of one short Update", c.share.spent-before, takes)
	})
}

// ---- server.go: the store, and Commit

func TestStoreOfAnyKind(t *testing.T) { protocol.StoreOfAnyKind(t, serveOn, helpLines) }
func TestStoreIsTouched(t *testing.T) { protocol.StoreIsTouched(t, serveOn, touchLeast) }

// Ensure that files that somebody removes under an idle server are written again without a request,
// so that kill -9 loses nothing.
func TestStoreMissesItsFiles(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		dir := storetest.New()
		n.server.status = &storage.Status{}
		db := storeIn(t, dir, n.server.status)
		n.server.db = db
		a := n.Dial(t)
		a.Ask("Put:k:v\nPing", ":PONG")

		is.OK(t, dir.Remove("seg-1.log"))
		world.Pass(3 * fileCheckTime)
		killed := storeIn(t, dir.Kill(), nil)
		is.Equal(t, "values of k after kill -9", killed.Count("k"), 1)
		killed.Close()

		a.HangUp()
		n.server.Close()
		is.OK(t, db.Close())
	})
}

// Ensure that no reply leaves when Commit fails, neither of a write nor of a read nor of a Take
// that has waited; that every client is disconnected; and that Failed reports it.
func TestCommitBeforeReplies(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		store := &protocol.PlainStore{KVStore: kvstore.NewMemory()}
		n.server.db = kvstore.StoreOf(store)
		var log bytes.Buffer
		n.server.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))

		a, b, c, taker, waiter := n.DialAck(t), n.Dial(t), n.Dial(t), n.Dial(t), n.Dial(t)
		a.Ask("Put:k:v", ":OK 1")
		b.Ask("Get:k", "k:v")
		taker.Send("Take:job:60\n")
		waiter.Post("Take:none:60\n")

		store.Fail = errors.New("disk on fire")
		a.Post("Put:k:w\nPut:job:v\n") // which the Take gets
		protocol.WantAllClosed(a, b, c, taker, waiter)
		is.Equal(t, "Failed", <-n.server.Failed(), store.Fail)

		// A client that comes later has no reply either, and nothing is committed for it.
		commits := store.Commits
		n.Dial(t).WantClosed()
		n.server.Close()
		is.Equal(t, "Commits after one that failed", store.Commits, commits)

		is.Equal(t, "clients that left because the store failed, in the log",
			strings.Count(log.String(), `reason="the store failed"`), 3)
	})
}

func TestCommitBeforeGets(t *testing.T) { protocol.CommitBeforeGets(t, serveOn) }
func TestCommitGathers(t *testing.T)    { protocol.CommitGathers(t, serveOn) }
func TestCommitWithoutRoom(t *testing.T) {
	protocol.CommitWithoutRoom(t, func(t *testing.T, db kvstore.Store) *protocol.Net {
		return serveWith(func(s *keyValueServer) { s.db, s.status = db, &storage.Status{} })(t)
	})
}

// Ensure that no batch waits for a client before its second write, not even a server's first
// batches, and that one wait follows another in which half of the clients have come.
func TestCommitGathersOnlyIfThatPays(t *testing.T) {
	g, sh := New(kvstore.NewMemory()).gathering, share{}
	g.wrote(&sh)
	is.Equal(t, "clients that are steady", g.steady, 0)

	for came, skip := range map[int]int{4: 2, 5: 0} {
		g := gathering{writers: 1, missing: 10, took: time.Second}
		is.Equal(t, "a wait", g.mustWait(), true)
		g.missing, g.timedOut = 10-came, true
		g.committed(g.took)
		is.Equal(t, "batches that do not wait", g.skip, skip)
	}

	g = gathering{writers: 1, missing: 9, took: maxRound}
	g.mustWait()
	g.began = g.began.Add(-maxRound / 2)
	is.Equal(t, "a wait for nearly all", g.mustWait(), true)
	g.writers, g.missing = 9, 1
	is.Equal(t, "a wait when nearly all have come", g.mustWait(), false)

	g = gathering{number: 5, missing: 1}
	g.excuse(&share{wroteIn: 4})
	is.Equal(t, "steady clients that have not come, beside one that seldom writes", g.missing, 1)

	// Neither a full batch waits, nor one for which a client waits that is heavy.
	for chains, heavy := range map[int]int{maxBatch: 0, 1: 1} {
		s := New(kvstore.NewMemory())
		s.gathering = gathering{writers: 1, missing: 9, took: time.Second}
		for range chains {
			s.batch = append(s.batch, chainOf(s, 0, 0))
		}
		for range heavy {
			chain := chainOf(s, 0, longTime)
			s.lineUp(chain, chain)
		}
		s.runBatch(nil)
		is.Equal(t, fmt.Sprint("chains that wait, of ", chains), len(s.batch), 0)
	}
}

// Ensure that the log does not tell of each write for which the disk has no room.
func TestRoomIsToldOnce(t *testing.T) {
	n, db := newFakeNet(), &protocol.Roomless{Memory: kvstore.NewMemory()}
	db.Full.Store(true)
	n.server.db = db
	for range 9 {
		n.server.admit(&Query{queryType: put})
	}
	is.Equal(t, "lines of log", strings.Count(n.log.Take(), "\n"), 1)
}

// Ensure that a look at the files does not end a batch that waits for clients.
func TestCommitGathersBesideLook(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.status = new(storage.Status)
		n.server.db = &protocol.SlowStore{Memory: kvstore.NewMemory(), Takes: 10 * time.Millisecond}
		a, b, began := n.Dial(t), n.Dial(t), time.Now()
		a.Ask("Ack", ":OK 0")

		<-time.After(fileCheckTime - 50*time.Millisecond)
		for range 3 { // both come each time
			a.Send("Put:k:v\n")
			b.Ask("Put:k:v\nPing", ":PONG")
			a.Want(":OK 1")
		}

		<-time.After(time.Until(began.Add(fileCheckTime - 3*time.Millisecond)))
		a.Ask("Put:k:v", ":OK 1") // it waits for b, and the look comes meanwhile
	})
}

// ---- server.go: keys that expire

func TestExpire(t *testing.T) { protocol.Expire(t, serveEmpty) }
func TestExpireWhileTheClockJumps(t *testing.T) {
	protocol.ExpireWhileTheClockJumps(t, func(now func() time.Time) protocol.Start {
		return serveWith(func(s *keyValueServer) { s.now = now })
	})
}

// Ensure that a key whose time ended while no server ran is never seen.
func TestExpireBeforeTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		for round := range 3 {
			n := newFakeNet()
			db := storeIn(t, dir, nil)
			n.server.db = db
			a := n.Dial(t)

			switch round {
			case 0:
				a.Ask("Lease:k:60:v\nLease:l:90:v\nPut:stays:v\nPing", ":PONG")
			case 1:
				a.WantStat("keys", 2)
				a.Ask("Keys\nDump\nGet:k\nGet:l", ": l", ": stays", ":OK 2", ": Put:l:v", ": Expire:l:30",
					": Put:stays:v", ":OK 3", "l:v")
			case 2: // nobody asks
			}

			a.HangUp()
			n.server.Close()
			is.OK(t, db.Close())
			world.Pass(time.Minute)
		}

		if report, err := durable.Check(dir); err != nil ||
			!strings.Contains(strings.Join(report.Lines, "\n"), "1 key") {
			t.Errorf("a check says %q, %v", report.Lines, err)
		}
	})
}

// Ensure that a key is gone from the very millisecond of its end, even if there are so many that it
// has not been deleted yet.
func TestExpireInTheMillisecond(t *testing.T) {
	db := kvstore.NewMemory()
	s := New(db)
	end := time.UnixMilli(5000)
	db.PutUntil("later", "v", end.UnixMilli()+1)
	db.Put("stays", "v")
	for after, want := range map[time.Duration]int{-time.Millisecond: 1, 0: 0} {
		db.Delete("k")
		db.PutUntil("k", "v", end.UnixMilli())
		s.now = func() time.Time { return end.Add(after) }
		s.overdue = someOverdue

		listed, list := 0, &Query{queryType: keys}
		s.run(list)
		for range list.snapshot.All() {
			listed++
		}
		for range list.snapshot.All() { // which may end early
			break
		}
		is.Equal(t, fmt.Sprint("keys in a list ", after, " after its end"), listed, want+2)

		q := &Query{queryType: get, key: "k"}
		s.run(q)
		is.Equal(t, fmt.Sprint("values ", after, " after its end"), q.n, want)
	}
}

func TestExpireManyAtOnce(t *testing.T) {
	protocol.ExpireManyAtOnce(t, serveOn, maxHeavyRound, expireStride)
}

func TestExpireIsCommitted(t *testing.T) { protocol.ExpireIsCommitted(t, serveOn) }
func TestExpireOnAFullDisk(t *testing.T) { protocol.ExpireOnAFullDisk(t, serveOn) }
func TestRoomForEveryWrite(t *testing.T) { protocol.RoomForEveryWrite(t, serveOn) }

// ---- server.go: Takes that wait

func TestTakeWaitsInLine(t *testing.T)  { protocol.TakeWaitsInLine(t, serveEmpty) }
func TestTakeWaitsItsTime(t *testing.T) { protocol.TakeWaitsItsTime(t, serveEmpty) }

// Ensure that a Take must not take a value any more, instead of just ending its wait, if nobody
// could be told of the value.
func TestTakeIsDropped(t *testing.T) {
	for what, end := range map[string]func(c *Client){
		"a Write fails":         func(c *Client) { close(c.closed) },
		"the server closes":     func(c *Client) { close(c.server.closeSignal) },
		"the connection breaks": func(c *Client) { c.connection.Close() },
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, _ := world.Pipe(world.StreamSize, world.StreamSize)
			c := newClient(1, ours, New(kvstore.NewMemory()))
			c.takeUntil = time.Now().Add(time.Hour)

			end(c)
			go func() {
				is.Equal(t, what+": type of the query that workLoop is sent", (<-c.server.queries).queryType, dropTake)
				c.done <- &Query{}
			}()
			c.awaitDone()
		})
	}
}

func TestTakeOfClientsThatGo(t *testing.T) { protocol.TakeOfClientsThatGo(t, serveEmpty) }
func TestTakeThatComesLate(t *testing.T)   { protocol.TakeThatComesLate(t, serveOn) }
func TestTakeWaitsWhileItsClientSends(t *testing.T) {
	protocol.TakeWaitsWhileItsClientSends(t, serveWith(func(s *keyValueServer) { s.maxLine = 300 * kilo }))
}

func TestTakeBeforeASlowLine(t *testing.T) { protocol.TakeBeforeASlowLine(t, serveEmpty) }
func TestTakeOfALateReader(t *testing.T)   { protocol.TakeOfALateReader(t, serveEmpty) }
func TestTakeOnAFullDisk(t *testing.T)     { protocol.TakeOnAFullDisk(t, serveOn) }

func TestTakeOnRealSockets(t *testing.T) {
	protocol.TakeOnRealSockets(t, func(listeners ...net.Listener) {
		s := New(kvstore.NewMemory())
		is.OK(t, s.serve(listeners...))
		t.Cleanup(s.Close)
	})
}

func TestTakeIsSmallWhileItWaits(t *testing.T) {
	protocol.TakeIsSmallWhileItWaits(t, serveEmpty, burstSize, quietAfter)
}

// ---- server.go: -max-memory and -max-queues

// Ensure that writes are refused just beyond the limit, with Ack and without, that everything else
// works, and that Delete makes room.
func TestMemoryLimit(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		long := strings.Repeat("v", 10*kilo) // long enough for memory of its own
		a := n.DialAck(t)
		a.Ask("Put:short:1", ":OK 1")

		// Three quarters are for data: as much as it takes now, and 40 kB.
		n.server.budget.reserve = kilo
		n.server.budget.limit = (int64(a.Stat("memory_bytes"))+40*kilo)*4/3 + kilo
		full := fmt.Sprintf("the server's memory is full (%d bytes): Delete something first",
			n.server.budget.forData())

		for i := range 3 {
			a.Ask(fmt.Sprint("Put:", i, ":", long), ":OK 1")
			synctest.Wait() // the reply is written, and takes no memory any more
		}

		refuse := func(request string) {
			t.Helper()
			a.Send(request + "\n")
			if line := a.Read(); !strings.HasSuffix(line, full) {
				t.Errorf("%.20q: got %q, want %q", request, line, full)
			}
		}

		refuse("Put:3:" + long)
		refuse("Update:short:1:" + long)

		// Now there is no room for a byte.
		synctest.Wait()
		for n.server.budget.data() < n.server.budget.forData() {
			n.server.budget.other.Add(100)
		}
		refuse("Put:short:2")
		a.Ask("Update:short:1:2", ":OK 1")

		// Nor for a copy, while there is a snapshot.
		n.server.budget.other.Add(n.server.budget.reserve)
		refuse("Update:short:2:1")
		a.Ask("Get:short", "short:2", ":OK 1")

		n.server.budget.other.Store(0)
		a.Ask("Delete:1", ":OK 1")
		synctest.Wait()
		a.Ask("Put:3:"+long, ":OK 1")
		if a.Stat("memory_limit_bytes") != int(n.server.budget.forData()) || a.Stat("process_bytes") == 0 {
			t.Error("Stats does not tell the limit, and what the process takes")
		}

		a.HangUp()
		is.Equal(t, "lines of log that say so", strings.Count(n.log.Take(), "the memory is full"), 1)
	})
}

func TestMemoryLimitRefusesWhatAdds(t *testing.T) {
	protocol.FullMemoryRefusesWhatAdds(t, serveOn, serveFull)
}
func TestMemoryLimitCollectsSeldom(t *testing.T) {
	protocol.FullMemoryCollectsSeldom(t, serveFull, collectTime)
}

// Ensure that a start says so if the data takes more than -max-memory leaves for it.
func TestMemoryLimitBelowTheData(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	n := newFakeNet()
	for _, want := range []int{0, 1} {
		applyLimits(n.server, config{maxMemory: 64_000_000})
		is.Equal(t, "lines of log", strings.Count(n.log.Take(), "writes are refused: the data takes more"), want)
		n.fill("k", strings.Repeat("v", 30<<20), 1)
	}
}

func TestMemoryLimitIsUsedAgain(t *testing.T) {
	protocol.FullMemoryIsUsedAgain(t, serveWith(func(s *keyValueServer) { s.budget.limit = 10 << 20 }))
}

// Ensure that memory that the last collection found alive, and that is not data, counts: for
// example a snapshot keeps values that were changed since.
func TestMemoryLimitCountsWhatIsAlive(t *testing.T) {
	s := New(kvstore.NewMemory())
	used := func() int64 {
		s.noteMemory()
		return s.budget.data()
	}
	before := used()
	s.budget.other.Store(10 * kilo)
	is.Equal(t, "bytes that are used", used(), before+10*kilo)
	s.db.Put("k", strings.Repeat("v", 5*kilo)) // a slab for itself, and a page of their table
	is.Between(t, "bytes that are used with 5 kB more", used(), before+15*kilo, before+20*kilo)
	s.budget.other.Store(0)
	is.Between(t, "bytes that are used with nothing else alive", used(), before, before+10*kilo)

	// Lines that have ended since the last collection took their share, and nothing of the data's.
	s.budget.inputs.Store(1 << 20)
	s.noteMemory()
	s.budget.inputs.Store(0)
	s.noteMemory()
	for _, unknown := range []int64{0, 1 << 20} {
		s.budget.collected(s.budget.store.Load() + 1<<20)
		is.Equal(t, "bytes of unknown use", s.budget.other.Load(), unknown)
	}
}

// Ensure that there may be less garbage while replies pin values that were removed, because the two
// share the reserve.
func TestMemoryLimitLeavesLessGarbage(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // no collection comes in between
	s := New(kvstore.NewMemory())
	s.budget.limitTo(1<<30, 0)
	pinned := make([]byte, 2*garbageMin)
	runtime.GC()

	p := gcPacer{server: s}
	p.choose()
	without := p.percent

	s.budget.pinned.Store(int64(len(pinned)))
	p.choose()
	is.Between(t, "percent of garbage beside pinned values", p.percent, 1, without*3/4)
	runtime.KeepAlive(pinned)
}

// Ensure that a refused write starts a collection: memory that others have released must not count
// until somebody allocates much.
func TestMemoryLimitIsLookedAtAgain(t *testing.T) {
	s := New(kvstore.NewMemory())
	s.budget.limitTo(64<<20, 0)
	a := protocol.DialTCP(t, startTCP(t, s))

	// No other collection comes in between.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	runtime.GC()
	(&gcPacer{server: s}).follow()
	a.Ask("Ack", ":OK 0")

	before := forced()
	s.budget.other.Store(1 << 30)
	a.Ask("Put:k:v", fmt.Sprintf(":ERROR line 2: the server's memory is full (%d bytes): Delete "+
		"something first", s.budget.forData()))

	for forced() == before || s.budget.other.Load() == 1<<30 {
		runtime.Gosched()
	}
	a.Ask("Put:k:v", ":OK 1")
}

// Ensure that a client that takes nothing of a long reply, or hardly anything, is cut off while
// writes need the memory of its values, which others have deleted, and that no write is refused for
// it. Before Ack such a reply that waits behind another is dropped instead.
func TestMemoryLimitBesideALongReply(t *testing.T) {
	fill := strings.Repeat("Get:small\n", 3*maxBufferSize)
	for _, c := range []struct {
		before, request  string
		isDropped, drips bool
	}{
		{request: "Get:big\n"},
		{request: "Get:big\n", drips: true},
		{request: "Ack\nGet:first\nGet:big\n"},
		{before: fill, request: "Ping\nGet:big\nGet:big\n", isDropped: true},
		{before: fill, request: "Ping\nAck\nGet:big\n"},
	} {
		for _, isNeeded := range []bool{true, false} {
			inBubble(t, func(t *testing.T, n *fakeNet) {
				n.server.budget.limitTo(64<<20, 0)
				n.fill("big", strings.Repeat("v", kilo), 9000)
				n.fill("first", strings.Repeat("v", kilo), 300)
				n.fill("small", strings.Repeat("v", kilo), 1)

				mute, b := n.Dial(t), n.Dial(t)
				go mute.Send(c.before)
				world.Pass(2 * seenSlow)
				mute.Send(c.request)
				synctest.Wait()

				b.Send("Delete:big\n")
				held := protocol.HeapBytes()

				// This is long enough to see that a client drips.
				for range 2 * dripTime / slowAfter {
					// The collector finds the values alive, though they are not stored any more.
					used := &n.server.budget
					eighths := int64(5)
					if isNeeded && used.pinned.Load() > 0 {
						eighths = 9
					}
					used.collected(used.ofClients() + used.forData()/8*eighths)

					b.Ask("Put:k:v\nPing", ":PONG")
					for range slowAfter / lookTime {
						if world.Pass(lookTime); c.drips {
							mute.Conn.Read(make([]byte, 5*kilo))
						}
					}
				}

				is.Equal(t, c.request+": the memory is free", held-protocol.HeapBytes() > 8000*kilo, isNeeded)
				is.Equal(t, c.request+": it is cut off", b.Stat("clients") == 1, isNeeded && !c.isDropped)

				if c.isDropped && isNeeded {
					mute.Count("small:")
					mute.Ask("Ping", ":PONG dropped 2")
				}

				mute.Close()
			})
		}
	}
}

// Ensure that a Dump that nobody reads is cut off while writes need the memory of what was changed
// since, and that no write is refused for it.
func TestMemoryLimitBesideADump(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		used := &n.server.budget
		used.limitTo(64<<20, 0)
		n.fillKeys("key", 9000, strings.Repeat("v", kilo))
		mute, a := n.Dial(t), n.Dial(t)
		mute.Send("Dump\n")

		for range 3 {
			world.Pass(slowAfter)
			is.Equal(t, "clients while there is memory", a.Stat("clients"), 2)
			used.collected(used.ofClients() + used.forData())
			a.Ask("Put:k:v\nPing", ":PONG")
		}

		// A little more than there is for data.
		used.collected(used.ofClients() + used.forData() + 1<<20)
		a.Ask("Put:k:v\nPing", ":PONG")
		world.Pass(2 * slowAfter)
		is.Equal(t, "clients", a.Stat("clients"), 1)
		mute.Close()
	})
}

// Ensure that values which were removed, and which replies keep, take memory of the reserve, and
// count as data only beyond a part of that.
func TestMemoryLimitOfWhatIsPinned(t *testing.T) {
	b := &New(kvstore.NewMemory()).budget
	b.limitTo(64<<20, 0)

	// A little (1<<20) that is pinned need not be given up; much (1<<30) may have to be.
	for _, c := range []struct {
		eighths, before, after int64 // that are alive, of data; bytes that are pinned
		needsPinned, isFull    bool
	}{
		{5, 1 << 30, 1 << 30, false, false},
		{9, 1 << 30, 1 << 30, true, false},
		{9, 1 << 30, 0, false, false},
		{9, 1 << 20, 1 << 20, false, true},
		{9, 0, 1 << 30, false, true},
		{20, 1 << 30, 1 << 30, true, true},
	} {
		b.pinned.Store(c.before)
		b.collected(b.forData() / 8 * c.eighths)
		b.pinned.Store(c.after)

		is.Equal(t, fmt.Sprint(c), b.needsPinned(), c.needsPinned)
		is.Equal(t, fmt.Sprint(c, ": the memory is full"), !b.fits(0, 0), c.isFull)
	}
}

// forced returns how many collections were asked for.
func forced() uint32 {
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.NumForcedGC
}

// Ensure that memory is given back to the system once data and clients have shrunk by much.
func TestMemoryIsGivenBack(t *testing.T) {
	s, before := New(kvstore.NewMemory()), forced()

	// The data shrinks by a fifth, then by more than a quarter, then by a sixth.
	for _, c := range []struct{ now, largest int64 }{{100 << 20, 100 << 20}, {80 << 20, 100 << 20},
		{60 << 20, 60 << 20}, {50 << 20, 60 << 20}} {
		s.budget.store.Store(c.now)
		s.freeMemory()
		is.Equal(t, "bytes since memory was given back", s.largest, c.largest)
	}
	s.largest = 1 << 30
	s.answerBatch()
	is.Equal(t, "bytes behind a batch", s.largest, s.budget.store.Load())
	for forced() == before { // which giving back begins with
		runtime.Gosched()
	}
}

// Ensure that the memory of a TLS connection counts.
func TestMemoryLimitCountsTLS(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.tls = serverConfig(t)
		a := n.Dial(t)
		a.OverTLS()
		a.Ask("Ping", ":PONG")
		synctest.Wait()
		is.Equal(t, "bytes of one client", n.server.budget.store.Load()-n.server.db.Footprint(),
			memoryPerClient+memoryOfTLS)
		a.HangUp()
	})
}

// Ensure that data that is there at the start counts once, whenever a collection comes.
func TestMemoryLimitCountsLoadedDataOnce(t *testing.T) {
	s := New(kvstore.NewMemory())
	for i := range 1000 {
		s.db.Put(fmt.Sprint(i), strings.Repeat("v", kilo))
	}
	loaded := s.db.Footprint()
	startTCP(t, s)
	is.Between(t, "bytes of data that the collector is told", s.budget.store.Load(), loaded, math.MaxInt64)
}

// Ensure that unfinished lines keep to their share of the memory, whether they are many or long;
// that all are accepted if they end soon; that their memory is given back; and that of lines that
// do not go on those are refused whose memory others wait for.
func TestMemoryLimitOfBegunLines(t *testing.T) {
	for _, kind := range []struct{ clients, bytes int }{{150, 60 * kilo}, {40, 300 * kilo}} {
		for _, end := range []bool{true, false} {
			inBubble(t, func(t *testing.T, n *fakeNet) {
				b := n.limit(64<<20, 1<<20)
				if kind.clients > 100 {
					b.limitTo(16<<20, 0)
				}

				share := int(b.forInput())
				line := []byte("Set:k:" + strings.Repeat("v", kind.bytes)) // one for all
				clients := n.DialMany(t, kind.clients, func(_ int, c *protocol.Client) {
					c.Conn.(*world.Conn).SetWriteBuffer(kilo) // so that little is on the way
				})

				synctest.Wait()
				before := protocol.HeapBytes()
				mayEnd := make(chan struct{})

				for _, c := range clients {
					go func() {
						c.Conn.Write(line)
						if <-mayEnd; end {
							c.SendSome("\nPing\n")
						}
					}()
				}

				world.Pass(quietAfter / 2)
				most := share + kind.clients*grantedInput + 1<<19 // one line has a slot
				if held := protocol.HeapBytes() - before; held > most {
					t.Errorf("%d lines that have begun take %d bytes, want up to %d", kind.clients,
						held, most)
				}
				is.Between(t, "bytes of lines that have begun", n.server.budget.inputs.Load(), 1, math.MaxInt64)

				a := n.DialAck(t)
				a.Ask("Put:other:v", ":OK 1")
				a.HangUp()

				close(mayEnd)
				if end {
					for _, c := range clients {
						c.Want(":PONG")
						c.HangUp()
					}
				} else {
					got := map[string]int{}
					for _, c := range clients {
						got[c.Read()]++
						c.Close()
					}

					refused := got[":ERROR line 1: too long for the memory that is left, skipped"]
					slow := got[":ERROR line 1: the line was begun but not ended within 30s"]
					if refused == 0 || slow == 0 || refused+slow != kind.clients {
						t.Errorf("lines that do not end are answered %v", got)
					}
				}

				synctest.Wait()
				is.Equal(t, "bytes that are counted when all have gone", n.server.budget.inputs.Load(), 0)
			})
		}
	}
}

// Ensure that long keys of Takes that wait, and lines whose answers nobody reads, before Ack as
// well, have a limit, and that nobody's writes are refused because of them.
func TestMemoryLimitOfWaitingLines(t *testing.T) {
	long := strings.Repeat("k", 450*kilo)
	for _, line := range []string{"Take:" + long + ":60\n", strings.Repeat("Ping:"+long+"\n", 10),
		"Set:other:" + long + "\nGet:big\n"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			b := n.limit(32<<20, 1<<19)
			n.fill("big", long, 4)
			share := b.shared() / inputShare
			sent := []byte(line) // one for all
			before := protocol.HeapBytes()
			clients := n.DialMany(t, storetest.Fewer(50, 2), func(_ int, c *protocol.Client) { go c.Conn.Write(sent) })
			world.Pass(slowAfter + lineTime)

			is.Between(t, fmt.Sprintf("%.4s: bytes that they hold", line), b.waitingLines.Load()+b.inputs.Load(),
				0, 3*share)
			b.collected(int64(protocol.HeapBytes() - before))
			a := n.DialAck(t)
			a.Ask("Put:other:v", ":OK 1")
			a.HangUp()

			closeClients(clients)
			world.Pass(2 * probeTime) // so that the server notices that waiting clients have gone
			is.Equal(t, fmt.Sprintf("%.4s: bytes when all have gone", line), b.waitingLines.Load()+b.inputs.Load(), 0)
		})
	}
}

// Ensure that a Take whose long key has no memory to wait in takes a value that is there, and does
// not wait for another.
func TestMemoryLimitOfALongTake(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		long := strings.Repeat("k", 3*kilo)
		n.fill(long, "v", 1)

		// Others take all that there is for lines.
		n.server.budget.limitTo(64<<20, 0)
		n.server.budget.inputs.Store(n.server.budget.forInput())

		a := n.DialAck(t)
		a.Ask("Take:"+long+":60", long+":v", ":OK 1")
		is.Within(t, 0, time.Second, func() { a.Ask("Take:"+long+":60", ":OK 0") })
		n.server.budget.inputs.Add(-n.server.budget.forInput())
	})
}

// Ensure that the memory of a long key with which a Take has waited is soon given back, even if its
// client sends nothing more.
func TestMemoryLimitAfterALongTake(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.maxLine = 1 << 20
		long := strings.Repeat("k", 900*kilo)
		a, b := n.Dial(t), n.Dial(t)
		a.Send("Take:" + long + ":3600\n")
		world.Pass(2 * quietAfter)
		b.Send("Put:" + long + ":v\n")
		a.Want(long + ":v")
		world.Pass(3 * quietAfter)
		is.Equal(t, "bytes that are counted for a Take that has ended", n.server.budget.inputs.Load(), 0)
	})
}

// Ensure that a Remove or Delete of any length is taken in and run, though the memory is full, and
// though others fill all that there is for lines, with lines that free, too, that hardly go on, or
// that are followed by replies which nobody reads.
func TestMemoryLimitTakesInWhatFrees(t *testing.T) {
	begun := ":k:" + strings.Repeat("v", 100*kilo)
	for _, c := range []struct {
		clients         int           // 60 lines are twice what there is for lines
		others, another string        // what the clients send, and then another one
		most            time.Duration // that a line may wait
	}{
		{60, "Put" + begun, "", time.Second},
		{60, "Remove" + begun, "", 10 * time.Second},
		{60, "Put" + begun, "Remove:k:" + strings.Repeat("v", 900*kilo) +
			strings.Repeat("\nGet:big", 3*maxChain) + "\n", time.Second},
	} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.limit(16<<20, 1<<20)
			long := strings.Repeat("l", 900*kilo)
			n.fill("k", long, 2)
			n.fill(long, "v", 1)
			n.fill("big", "v", kilo)

			hungUp := make(chan struct{})
			mute := n.DialMany(t, c.clients, func(_ int, m *protocol.Client) {
				go func() {
					for m.SendSome(c.others); !isClosed(hungUp); <-time.After(quietAfter / 2) {
						m.SendSome("v")
					}
				}()
			})

			another := n.Dial(t)
			world.Pass(quietAfter / 2)
			go another.SendSome(c.another)
			synctest.Wait()

			// From here on the memory is full.
			n.server.budget.other.Store(1 << 40)
			a := n.DialAck(t)
			a.Send("Put:x:y\n")
			if line := a.Read(); !strings.Contains(line, "memory is full") {
				t.Errorf("the memory is not full: %q", line)
			}

			is.Within(t, 0, c.most, func() {
				a.Ask("Remove:k:"+long, ":OK 1")
				a.Ask("delete:"+long, ":OK 1")
				a.Ask("Remove:k:"+long, ":OK 1")
			})

			a.HangUp()
			close(hungUp)
			closeClients(append(mute, another))
			world.Pass(quietAfter)
			b := &n.server.budget
			is.Equal(t, "lines that wait", b.freeing.waiting.Load()+b.anyLine.waiting.Load(), 0)
		})
	}
}

// Ensure that the bursts and the long lines of many clients keep to their share of the memory while
// nobody reads the replies, that all are answered, and that their memory is given back.
func TestMemoryLimitOfBursts(t *testing.T) {
	token := strings.Repeat("p", 200)
	for _, c := range []struct {
		burst, token string
		most         func(b *budget) int64
	}{
		{strings.Repeat("Ping:"+token+"\n", 600), token, (*budget).forBursts},
		{strings.Repeat("Ping:p\n", 3000), "p", (*budget).forBursts}, // they fill chains, not buffers
		{"Set:k:" + strings.Repeat("v", 60*kilo) + "\nPing:" + token + "\n", token, (*budget).forInput},
	} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			const count = 50
			b := n.limit(16<<20, 1<<20)

			clients := n.DialMany(t, count, func(_ int, o *protocol.Client) { go o.SendSome(c.burst) })
			world.Pass(slowAfter / 2)
			is.Between(t, "bytes of bursts", n.inputs(), 1, c.most(b)+int64(count)*17*kilo)

			for _, o := range clients {
				for range strings.Count(c.burst, "Ping") {
					o.Want(":PONG " + c.token)
				}
			}

			for range 3 { // a client that goes on asks for little
				clients[0].Ask("Ping:"+strings.Repeat(token, 15), ":PONG "+strings.Repeat(token, 15))
				world.Pass(quietAfter)
			}
			is.Between(t, "bytes of bursts in the end", b.inputs.Load(), 0, 14*kilo)
		})
	}
}

// Ensure that long lines in a row give back their memory when they end, or use the same buffers.
func TestMemoryLimitOfLinesInARow(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		const count = 60
		b := n.limit(64<<20, 1<<20)

		line := []byte("Set:k:" + strings.Repeat("p", 600*kilo) + "\nSet:k:" + strings.Repeat("q", 5*kilo))
		clients := n.DialMany(t, count, func(_ int, o *protocol.Client) {
			o.Conn.(*world.Conn).SetWriteBuffer(2 << 20) // so that both lines come at once
			go o.Conn.Write(line)
		})

		synctest.Wait()
		is.Between(t, "bytes of input", n.inputs(), 0, b.forInput()+count*17*kilo)

		closeClients(clients)
		world.Pass(lookTime)

		// From here on the bursts of others have their share. (A connection itself takes 100 kB for
		// a line. With the race detector a sync.Pool loses some of what it is given.)
		clients = n.DialMany(t, count/2, func(_ int, o *protocol.Client) { o.Ask("Ack", ":OK 0") })
		b.inputs.Add(b.forBursts())
		line = []byte("Remove:k:" + strings.Repeat("p", 100*kilo) + "\n")
		took := allocated(func() {
			for _, o := range clients {
				go o.Conn.Write(line)
				o.Want(":OK 0")
			}
		})
		is.Between(t, "bytes for a line", int(took)/len(clients), 0, len(line)*12/storetest.Fewer(8, 8))

		closeClients(clients)
	})
}

// Ensure that buffers of long lines that have ended are given up if nobody uses them for a while,
// though the clients that made them stay busy, or have half-closed behind a Take that waits; and
// if others have taken their places.
func TestMemoryLimitOfEndedLines(t *testing.T) {
	for _, end := range []string{"", "Take:none:3600\nSet:k:" + strings.Repeat("v", 5*kilo)} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			b := n.limit(64<<20, 1<<20)

			// All lines have begun before the first one ends, so no other line gets its buffer.
			clients := n.DialMany(t, 24, func(_ int, o *protocol.Client) {
				o.Ask("Ack", ":OK 0")
				go o.SendSome("Remove:k:" + strings.Repeat("p", 250*kilo))
			})
			world.Pass(quietAfter / 2)
			is.Between(t, "bytes of lines that have begun", b.inputs.Load(), b.forBursts(), b.forInput())
			for _, o := range clients {
				if o.SendSome("\n" + end); end != "" {
					o.Conn.CloseWrite()
				} else {
					o.Want(":OK 0")
				}
			}
			world.Pass(lookTime)
			is.Between(t, "buffers of lines that have ended", len(b.ended), 1, maxEnded)

			busy := clients
			if end != "" {
				busy = []*protocol.Client{n.Dial(t)}
			}
			for range 2 * len(clients) {
				for _, o := range busy {
					o.Ask("Ping:"+strings.Repeat("p", kilo), ":PONG "+strings.Repeat("p", kilo))
				}
				world.Pass(quietAfter)
			}
			is.Equal(t, "bytes of input that are counted", b.inputs.Load(), 0)
			closeClients(append(clients, busy...))
			world.Pass(quietAfter)
		})
	}

	synctest.Test(t, func(t *testing.T) {
		b := &New(kvstore.NewMemory()).budget
		b.ended = make(chan endedLine) // with no place at all
		b.inputs.Store(kilo)
		go func() { b.ended <- endedLine{counted: kilo, at: time.Now()} }()
		synctest.Wait()
		b.giveUpEnded(quietAfter)
		is.Equal(t, "bytes of input that are counted", b.inputs.Load(), 0)
	})

	// Nobody keeps a new one when its client becomes quiet, nor one that is too small for a line.
	s := New(kvstore.NewMemory())
	c, ended := unwritten(s), endedLine{buf: make([]byte, kilo), counted: kilo, at: time.Now()}
	s.budget.limitTo(64<<20, 0)
	s.budget.inputs.Store(s.budget.forInput() + 2*kilo)
	s.budget.ended <- ended
	c.shrinkInput()
	is.Equal(t, "bytes of input that are counted", s.budget.inputs.Load(), s.budget.forInput()+kilo)
	s.budget.ended <- ended
	is.Equal(t, "a longer line gets memory", c.acquireForLine(burstSize), false)
	is.Equal(t, "bytes of input that are counted", s.budget.inputs.Load(), s.budget.forInput())
}

// Ensure that a line which gets a slot when the memory has gone meanwhile gives it back.
func TestMemoryLimitThatCameNearer(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		b := n.limit(64<<20, 1<<20)
		b.inputs.Add(b.forInput())
		b.anyLine.slots <- struct{}{}
		a := n.DialAck(t)
		go a.SendSome("Set:k:" + strings.Repeat("v", 60*kilo))
		synctest.Wait()

		b.waitingLines.Add(b.limit)
		<-b.anyLine.slots
		synctest.Wait()
		is.Equal(t, "slots that are taken", len(b.anyLine.slots), 0)

		b.waitingLines.Add(-b.limit)
		a.Ask("", ":OK 0")
	})
}

// Ensure that a line does not wait long for the buffer of one that has ended: if that is too small
// it gets a slot. While the lines whose replies wait have their limit, it gets neither.
func TestMemoryLimitOfALineBehindAShorterOne(t *testing.T) {
	for _, tooMany := range []bool{false, true} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			b := n.limit(64<<20, 1<<20)
			b.inputs.Add(b.forBursts())
			a, o := n.DialAck(t), n.DialAck(t)
			a.Ask("Remove:k:"+strings.Repeat("p", 100*kilo), ":OK 0")
			synctest.Wait()
			is.Equal(t, "buffers of lines that have ended", len(b.ended), 1)

			others, size := b.forInput()-b.inputs.Load(), 300*kilo
			if b.inputs.Add(others); tooMany {
				b.waitingLines.Add(b.forQueues())
				size = 50 * kilo
			}
			go o.SendSome("Put:k:" + strings.Repeat("p", size) + "\n")
			world.Pass(lookTime * 5 / 4)
			is.Equal(t, "it waits", b.anyLine.waiting.Load() > 0, tooMany)

			if tooMany {
				b.waitingLines.Add(-b.forQueues())
			}
			o.Want(":OK 1")
			b.inputs.Add(-others - b.forBursts())
		})
	}
}

// Ensure that lines that come before replies that nobody reads have a limit, also if they free, and
// are given up if others need their memory.
func TestMemoryLimitOfMuteLines(t *testing.T) {
	long := strings.Repeat("p", 60*kilo)
	for _, lines := range []string{strings.Repeat("Ping:"+long+"\n", 10),
		"Ack\nRemove:k:" + long + strings.Repeat("\nGet:big", 5) + "\n"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.maxLine, n.server.maxMessage = 1<<20, maxMessage
			n.server.budget.limitTo(16<<20, 0)
			n.fill("big", strings.Repeat("v", 100*kilo), 9)

			clients := n.DialMany(t, 150, func(_ int, o *protocol.Client) { go o.SendSome(lines) })
			for range 60 {
				world.Pass(slowAfter / 3)
				n.wantLinesBounded(t, len(clients))
			}

			a := n.DialAck(t)
			is.Within(t, 0, slowAfter, func() { a.Ask("Set:k:"+strings.Repeat("v", 20*kilo), ":OK 0") })
			closeClients(clients)
		})
	}
}

// Ensure that long lines have a limit while a Commit lasts, too, though no reply waits then.
func TestMemoryLimitOfLinesInACommit(t *testing.T) {
	for _, line := range []string{"Set:k:", "Remove:k:"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			store := protocol.GatedStore{Memory: kvstore.NewMemory(), Gate: make(chan error)}
			n.server.db, n.server.maxLine = kvstore.StoreOf(store), 1<<20
			n.server.budget.limitTo(16<<20, 0)

			clients := n.DialMany(t, 150, func(int, *protocol.Client) {})
			n.Dial(t).Post("Put:k:v\n") // its Commit lasts
			for _, o := range clients {
				go o.SendSome(line + strings.Repeat("v", 60*kilo) + "\n")
			}

			world.Pass(lineTime / 2)
			n.wantLinesBounded(t, len(clients))

			close(store.Gate)
			closeClients(clients)
		})
	}
}

// Ensure that long lines of clients whose Keys waits for its turn keep no line that frees waiting.
func TestMemoryLimitOfLinesBesideKeys(t *testing.T) {
	long := strings.Repeat("v", 60*kilo)
	for _, lines := range []string{"Keys:" + long + "\n", "Remove:k:" + long + "\nKeys\n"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.limit(16<<20, 1<<20)
			for range maxSnapshots { // others read theirs
				n.server.snapshots.slots <- struct{}{}
			}

			clients := n.DialMany(t, 150, func(_ int, o *protocol.Client) { go o.SendSome(lines) })
			a := n.DialAck(t)
			world.Pass(slowAfter)
			n.wantLinesBounded(t, len(clients))

			// The line that frees does not wait for the others' Keys.
			a.Conn.SetReadDeadline(time.Now().Add(slowAfter))
			a.Ask("Delete:"+strings.Repeat("k", 900*kilo), ":OK 0")

			refused := 0
			for _, o := range clients {
				if o.Conn.(*world.Conn).Unread() > 0 {
					refused += strings.Count(o.Read(), tooLongNow)
				}
			}
			is.Between(t, "Keys that are refused", refused, 1, len(clients))
			for range maxSnapshots {
				<-n.server.snapshots.slots
			}
			closeClients(clients)
		})
	}
}

// Ensure that a Keys with a long line waits for others' Keys while lines have no more than their
// share.
func TestMemoryLimitOfALineBesideKeys(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.limit(16<<20, 1<<20)
		n.server.budget.inputs.Add(n.server.budget.forBursts())
		for range maxSnapshots {
			n.server.snapshots.slots <- struct{}{}
		}

		a := n.DialAck(t)
		a.Send("Keys:" + strings.Repeat("v", 60*kilo) + "\n")
		world.Pass(slowAfter)
		a.WantNothing()
		<-n.server.snapshots.slots
		a.Want(":OK 0")
	})
}

// wantLinesBounded expects so many clients with lines of at most burstSize to take no more memory
// than the budget's table says.
func (n *fakeNet) wantLinesBounded(t *testing.T, clients int) {
	b := &n.server.budget
	free := int64(clients*(grantedInput+2*quietSize) + 2*2*burstSize) // and two lines that have a slot
	is.Between(t, "bytes of input", n.inputs(), 0,
		b.forInput()+b.forQueues()+int64(n.server.maxLine)+free)
}

// Ensure that a single line, however long, keeps no line that frees waiting.
func TestMemoryLimitBesideALongLine(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		b := n.limit(16<<20, 8<<20)
		b.inputs.Add(b.forInput())
		long, a := n.Dial(t), n.DialAck(t)
		long.Post("Put:k:" + strings.Repeat("v", 5<<20))
		is.Within(t, 0, lookTime, func() { a.Ask("Delete:"+strings.Repeat("k", 900*kilo), ":OK 0") })
		b.inputs.Add(-b.forInput())
		long.Close()
	})
}

// Ensure that mute clients with short lines, however many, take no memory from long lines.
func TestMemoryLimitOfLinesBesideShortOnes(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		b := n.limit(16<<20, 1<<20)
		burst := strings.Repeat("Ping:pppppppppppppppppppp\n", 6000)
		mute := n.DialMany(t, 400, func(_ int, o *protocol.Client) { go o.SendSome(burst) })
		world.Pass(10 * time.Second)
		is.Between(t, "bytes that count as input", b.inputs.Load(), b.forBursts()/2, b.forInput()*3/4)
		closeClients(mute)
	})
}

// Ensure that bursts, however many, leave memory for long lines.
func TestMemoryLimitOfLinesBesideBursts(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		b := n.limit(64<<20, 1<<20)
		b.inputs.Add(b.forBursts())

		slow, other := n.Dial(t), n.DialAck(t)
		line := "Set:k:" + strings.Repeat("v", 60*kilo)
		go slow.SendSome(line)
		synctest.Wait()
		is.Within(t, 0, lookTime, func() { other.Ask(line, ":OK 0") })
		b.inputs.Add(-b.forBursts())
		slow.Close()
	})
}

// Ensure that while others wait for memory a line that hardly comes is refused, but not one that
// pauses for a tick, nor one that frees and goes on, unless others that free wait.
func TestMemoryLimitOfSlowLines(t *testing.T) {
	const skipped = ":ERROR line 2: too long for the memory that is left, skipped"
	for _, c := range []struct {
		line, rest string
		times      int // how often rest comes, each half a tick later
		others     string
		want       string
	}{
		{"Put:k:", "v", 8, "Put:k:", skipped},
		{"Put:k:", "", 3, "Put:k:", ":OK 1"},
		{"Remove:k:", "v", 8, "Put:k:", ":OK 0"},
		{"Remove:k:", "", 8, "Put:k:", skipped},
		{"Remove:k:", "v", 8, "Remove:k:", skipped},
		{"Remove:k:", strings.Repeat("v", steadyRate), 3, "Remove:k:", ":OK 0"},
	} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.limit(64<<20, 1<<20)

			a, long := n.DialAck(t), strings.Repeat("v", 100*kilo)
			a.Send(c.line + long)
			world.Pass(quietAfter)

			// From here on lines wait for memory.
			n.server.budget.inputs.Add(n.server.budget.forInput())
			others := n.DialMany(t, 6, func(_ int, o *protocol.Client) { go o.SendSome(c.others + long) })
			for range c.times {
				a.Send(c.rest)
				world.Pass(quietAfter / 2)
			}

			a.Ask("", c.want)
			n.server.budget.inputs.Add(-n.server.budget.forInput())
			a.HangUp()
			closeClients(others)
		})
	}
}

// Ensure that a line which had to wait for memory has two ticks to come, as any other, even if it
// hardly came before.
func TestMemoryLimitOfALineThatHasWaited(t *testing.T) {
	for _, before := range []int{0, 30 * kilo} { // bytes that come two ticks earlier
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.limit(64<<20, 1<<20)
			first, a, other := n.DialAck(t), n.DialAck(t), n.Dial(t)
			a.Send("Put:k:" + strings.Repeat("v", before))
			first.Send("Put:k:")
			other.Send("Put:k:")
			world.Pass(quietAfter * 9 / 4)

			// There is memory for one line: that of a has to wait for the first.
			n.server.budget.inputs.Add(n.server.budget.forInput())
			for _, c := range []*protocol.Client{first, a} {
				go c.SendSome(strings.Repeat("v", 5*kilo))
				world.Pass(lookTime * 3 / 2) // it has its slot
			}

			world.Pass(quietAfter)
			first.Ask("", ":OK 1") // from here on the line of a may have the memory

			world.Pass(lookTime)
			go other.SendSome(strings.Repeat("v", 5*kilo))
			world.Pass(quietAfter * 3 / 2)
			a.Ask("", ":OK 1")

			n.server.budget.inputs.Add(-n.server.budget.forInput())
			closeClients([]*protocol.Client{first, a, other})
		})
	}
}

// Ensure that of two replies only the one that is not in messages yet keeps values, and that a Dump
// keeps all.
func TestMemoryLimitOfFormattedValues(t *testing.T) {
	for request, keeps := range map[string]int64{"Ping\nGet:big\nGet:big\n": 900 * kilo, "Dump\n": 1800 * kilo} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.maxMessage = maxMessage
			n.fill("big", strings.Repeat("v", kilo), 900)
			n.fill("other", strings.Repeat("v", kilo), 900)
			mute := n.Dial(t)
			mute.Send(request)
			synctest.Wait()
			is.Between(t, "bytes that are pinned", n.server.budget.pinned.Load(), keeps, keeps*5/4)
			mute.Close()
			synctest.Wait()
			is.Equal(t, "bytes that are pinned in the end", n.server.budget.pinned.Load(), 0)
		})
	}
}

// Ensure that what lines take is not counted too low while the error of a long line waits for room.
func TestMemoryLimitBesideAnError(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.maxMessage = maxMessage
		b := n.limit(64<<20, 200*kilo)
		b.inputs.Add(b.forBursts()) // so that the error line gets its memory as a line

		mute := n.dialMute(t)
		go mute.SendSome("Put:k:" + strings.Repeat("v", 300*kilo) + "\n")
		for range 4 {
			world.Pass(quietAfter / 2)
			is.Between(t, "bytes of lines", b.inputs.Load(), b.forBursts(), b.forBursts()+burstSize)
		}

		mute.Close()
		synctest.Wait()
		is.Equal(t, "bytes of lines in the end", b.inputs.Load(), b.forBursts())
		b.inputs.Add(-b.forBursts())
	})
}

// Ensure that how fast a client reads is judged by the bytes that its connection has taken.
func TestMemoryLimitOfDrips(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		c := newClient(2, ours, n.server)

		for _, taken := range []int{steadyRate, 0} {
			for range dripTime / time.Second {
				c.paced.Write(make([]byte, taken))
				c.outbox.noteWait(time.Second)
			}
			is.Equal(t, fmt.Sprint("a client that takes ", taken, " bytes a second drips"),
				c.outbox.drips, taken == 0)
		}
		q := &Query{values: make([]string, 9)}
		c.outbox.countAsWaiting(q)()
		giveBack := c.outbox.countAsWaiting(q)
		is.Equal(t, "bytes of a list that waits again", n.server.budget.queued.Load(), 9*stringSize)
		giveBack()
		is.Equal(t, "it drips from the first moment of its next chain", c.outbox.drips, false)
		ours.Close()
	})
}

// Ensure that a client that hardly reads is cut off, before Ack as well, while lines whose replies
// wait keep all others waiting, but not otherwise.
func TestMemoryLimitOfLinesBeforeDrips(t *testing.T) {
	for others, stays := range map[int64]int{0: 1, 1 << 30: 0} { // bytes of others' lines
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.limit(64<<20, 1<<20).waitingLines.Add(others)
			n.fill("k", strings.Repeat("v", 5*kilo), 1)
			a := n.Dial(t)
			go a.SendSome("Put:l:" + strings.Repeat("v", 90*kilo) + strings.Repeat("\nGet:k", 250) + "\n")
			for range 4 * dripTime / lookTime {
				world.Pass(lookTime)
				a.Conn.Read(make([]byte, 5*kilo))
			}
			is.Equal(t, fmt.Sprint("clients beside ", others, " bytes"), n.server.CountActive(), stays)
			a.Close()
		})
	}
}

// Ensure that a line which ends with its connection, or is skipped, keeps no other waiting, though
// its client reads nothing.
func TestMemoryLimitOfALineWithoutEnd(t *testing.T) {
	for _, send := range []func(c *protocol.Client){
		func(c *protocol.Client) { c.SendAll("Put:k:" + strings.Repeat("v", 200*kilo)) },
		func(c *protocol.Client) { c.SendSome("Put:k:" + strings.Repeat("v", 2<<20)) },
	} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.maxLine, n.server.maxMessage = 1<<20, maxMessage
			n.server.budget.limitTo(64<<20, 0)

			// The line of mute has the only memory that is left for a line.
			mute := n.dialMute(t)
			n.server.budget.inputs.Add(n.server.budget.forInput())
			go send(mute)
			world.Pass(lookTime)

			a := n.DialAck(t)
			is.Within(t, 0, 2*lookTime, func() {
				a.Send("Put:k:" + strings.Repeat("v", 20*kilo) + "\n")
				a.Want(":OK 1")
			})

			n.server.budget.inputs.Add(-n.server.budget.forInput())
			a.HangUp()
			mute.Close()
		})
	}
}

// Ensure that what a client's lines take counts once, while its last replies wait to be read.
func TestMemoryLimitBehindAQuit(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.maxLine = 1 << 20
		mute, lines := n.Dial(t), &n.server.budget.inputs
		go mute.SendSome("Ping:" + strings.Repeat("p", 500*kilo) + "\nQuit\n")
		world.Pass(slowAfter / 2)
		is.Between(t, "bytes of lines whose replies wait", lines.Load(), 1, burstSize+kilo)
		mute.Close()
		synctest.Wait()
		is.Equal(t, "bytes of lines in the end", lines.Load(), 0)
	})
}

// Ensure that all queues together stay below their limit: clients that read nothing lose replies,
// or with Ack their connection, and others lose nothing.
func TestMaxQueues(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		value := strings.Repeat("v", 7*kilo)
		n.fill("k", value, 1)
		const limit = 1 << 20
		n.server.budget.maxQueues = limit

		slow := n.DialMany(t, 10, func(i int, c *protocol.Client) { // each could queue 3.5 MB
			c.Ask([]string{"Ack", "Keys:none"}[i%2], ":OK 0")
			go c.SendSome(strings.Repeat("Get:k\n", 600))
		})

		honest := n.Dial(t)
		for range 40 {
			world.Pass(seenSlow / 10)
			honest.Send(strings.Repeat("Get:k\n", 100) + "Ping\n")
			is.Equal(t, "replies of a client that reads", honest.Count("k:"), 100)

			// Beyond the limit each client may have a Write under way, and two messages.
			if queued := honest.Stat("queued_bytes"); queued >
				limit+(len(slow)+1)*(maxWrite+2*testMaxMessage) {
				t.Fatalf("%d bytes are queued, want about %d", queued, limit)
			}
		}

		for i, c := range slow {
			if i%2 != 0 {
				c.Send("Ping\n")
				is.Between(t, "replies of a slow reader", c.Count("k:"), 1, 599)
			}
			c.Close()
		}

		synctest.Wait()
		honest.WantStat("queued_bytes", 0)
		is.Between(t, "clients that were cut, in the log", strings.Count(n.log.Take(), "(-max-queues)"), 1, 5)
	})
}

// Ensure that replies that wait behind a Ping keep to the limit of all queues as well: they are
// dropped if that is allowed, and each of them is counted, however long that lasts.
func TestMaxQueuesBehindAPing(t *testing.T) {
	for i, behind := range []string{"Stats\n", "Take:small\n", "Update:list:v:v\nGet:list\n",
		"Update:list:v:v\nGet:list\n", "Update:list:v:v\nGet:list\n"} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			const limit, values, times = 1 << 20, 20 * kilo, 120
			n.server.budget.maxQueues = limit
			n.fill("list", "v", values)
			n.fill("small", strings.Repeat("v", kilo), 1)

			mute, other := n.Dial(t), n.Dial(t)
			mute.Ask("Keys:none", ":OK 0") // that is over
			go mute.Send(strings.Repeat("Get:small\n", 3*maxBufferSize))
			world.Pass(2 * seenSlow)
			mute.Send("Ping\n" + strings.Repeat(behind, times) + "Ping\n")

			// All queues are full for long enough to notice that a client is slow.
			n.server.budget.queued.Add(limit)
			world.Pass(2*seenSlow + time.Duration(i)*slowAfter)
			n.server.budget.queued.Add(-limit)

			is.Between(t, "bytes that are queued", other.Stat("queued_bytes"), 0, limit)
			is.Equal(t, behind+": it is cut off", other.Stat("clients") == 1, false)
			if small, lines := mute.Count("small:"), mute.Count(""); strings.Contains(behind, "Get") {
				is.Equal(t, "Gets that are answered, or counted as dropped",
					small+lines/values+other.Stat("replies_dropped_total"), 3*maxBufferSize+times)
			}
		})
	}
}

// Ensure that clients that read nothing can fill only their own share of the memory, and that
// nobody's writes are refused because of them.
func TestMaxQueuesHaveTheirShare(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.budget.limit, n.server.budget.reserve = 4<<20, 0
		n.fill("big", strings.Repeat("v", 120*kilo), 1)

		writer := n.DialAck(t)
		mute := n.DialMany(t, 5, func(i int, c *protocol.Client) {
			go c.SendSome(strings.Repeat("Ack\n", i%2) + strings.Repeat("Get:big\n", 700))
		})

		for range 50 {
			world.Pass(seenSlow / 10)
			writer.Ask("Put:k:"+strings.Repeat("v", kilo), ":OK 1")
		}
		is.Between(t, "bytes that are queued", writer.Stat("queued_bytes"), 0, 1<<20)

		// However much they fill, it does not count as data.
		b := &n.server.budget
		b.queued.Add(b.limit)
		writer.Ask("Put:k:v", ":OK 1")
		is.Between(t, "bytes of a list", b.forList(), 1, b.forQueues()/4)
		b.queued.Add(-b.limit)
		closeClients(mute)
	})

	var none budget // without both limits
	is.Equal(t, "without limits there is room", !none.isAtLimit() && none.mayTakeLines(), true)
	is.Equal(t, "bytes of a list", none.forList(), maxList)
}

// Ensure that lists held by a waiting chain or a Keys count like messages; that all of it is given
// back; and that a client that is turned away takes nothing.
func TestMaxQueuesCountLists(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		const values, keys = 20 * kilo, 20 * kilo
		n.fill("list", "v", values)
		n.fillKeys("key", keys, strings.Repeat("v", 100))
		n.server.maxClients = 3

		watch, a, b := n.Dial(t), n.Dial(t), n.Dial(t)
		synctest.Wait()
		c := n.Dial(t)
		c.Want(":ERROR line 0: server is full (3 clients)")
		c.Close()

		go a.SendSome("Ack\n" + strings.Repeat("Update:list:v:v\nGet:list\n", 20))
		world.Pass(lookTime) // not yet slow, so hardly anything is queued
		is.Between(t, "bytes of a chain that keeps 20 lists", watch.Stat("queued_bytes"), 5*values*stringSize,
			math.MaxInt)
		a.Close()
		synctest.Wait()

		go b.SendSome("Dump\n")
		world.Pass(lookTime)
		is.Between(t, "bytes of a Dump", watch.Stat("queued_bytes"), keys*stringSize, math.MaxInt)

		// It is cut off if it reads nothing and the memory for queues is full.
		n.server.budget.queued.Add(defaultMaxQueues)
		world.Pass(2 * seenSlow)
		n.server.budget.queued.Add(-defaultMaxQueues)
		watch.WantStat("clients", 1)
		b.Close()
		watch.WantStat("queued_bytes", 0)
	})
}

func TestMemoryOfALastRequest(t *testing.T) { protocol.MemoryOfALastRequest(t, serveOn) }

func TestMemoryOfQuietClients(t *testing.T) {
	protocol.MemoryOfQuietClients(t, serveEmpty, quietAfter, 80, maxChain, 2*burstSize/len("Get:k\n"))
}

func TestMemoryOfAnUnfinishedLine(t *testing.T) {
	protocol.MemoryOfAnUnfinishedLine(t, serveEmpty, quietSize, burstSize/4, lineTime/2)
}

func TestMemoryOfABusyClient(t *testing.T) { protocol.MemoryOfABusyClient(t, serveEmpty, maxChain) }

// Ensure that a client has no more memory for bursts than the bytes that it has sent in the last
// second or two, and none for requests. Long lines get larger buffers, but not the largest.
func TestMemoryOfATrickle(t *testing.T) {
	for size, buffer := range map[int]int64{kilo: burstSize, 70 * kilo: 4 * burstSize} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.server.maxLine = 1 << 20
			a := n.Dial(t)
			a.Conn.(*world.Conn).SetWriteBuffer(8 << 20) // so that there is always a whole Read
			a.Ask(strings.Repeat("Put:k:"+strings.Repeat("v", size)+"\n", 100)+"Ping", ":PONG")
			synctest.Wait()
			is.Between(t, "bytes that a burst is read into", n.inputs(), buffer, 2*buffer+int64(maxChain*querySize))

			for range 8 {
				a.Send("P") // a line that does not end
				world.Pass(quietAfter / 2)
			}
			is.Between(t, "bytes for a client that sends a byte now and then", n.inputs(), 0, 2*quietSize)
			a.Close()
		})
	}
}

func TestMemoryOfAnEndlessLine(t *testing.T) { protocol.MemoryOfAnEndlessLine(t, serveEmpty) }

// Ensure that somebody who asks for more than there is never makes others be refused, and that
// nothing is counted twice or not at all.
func TestMemoryIsAddedAtOnce(t *testing.T) {
	var sum atomic.Int64
	var all sync.WaitGroup
	for _, bytes := range []int64{1, 1, 10} {
		all.Go(func() {
			for range 500 * kilo {
				if isAdded := addUpTo(&sum, bytes, 9); isAdded != (bytes < 9) {
					t.Errorf("%d bytes of 9 are added: %v", bytes, isAdded)
					return
				} else if isAdded {
					sum.Add(-bytes)
				}
			}
		})
	}
	all.Wait()
	is.Equal(t, "the sum in the end", sum.Load(), 0)
}

// ---- server.go: listening

// Ensure that localhost means both its addresses, and that the refusal of a port in use says how to
// get a free one.
func TestListenOnLocalhost(t *testing.T) {
	t.Parallel()
	s := New(kvstore.NewMemory())
	startTCP(t, s)
	_, port, _ := net.SplitHostPort(s.listener.Addr().String())
	hosts := []string{"127.0.0.1"}
	if len(s.listeners) == 2 {
		hosts = append(hosts, "::1")
	} else if other, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		other.Close()
		t.Error("this machine has ::1, and localhost does not mean it")
	}

	for _, host := range hosts {
		a := protocol.DialTCP(t, net.JoinHostPort(host, port))
		a.Ask("Ping:"+host, ":PONG "+host)
	}

	binary.Prints(t, "", "cannot listen on localhost:"+port+": ", false, "-addr", port)
	_, err := listen("localhost")
	is.Equal(t, "an address without a port is refused", err != nil, true)
	binary.Prints(t, "", "Stop what listens there, or choose another port or path.", false, "-addr", port)

	// A port that is free at only one of the addresses is refused, too.
	for _, host := range hosts {
		again := func() error {
			taken, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
			is.OK(t, err)
			_, port, _ := net.SplitHostPort(taken.Addr().String())
			listeners, err := listen("localhost:" + port)
			is.Equal(t, "localhost, with the port taken at "+host+", is refused", isAny(err, inUse...), true)
			closeAll(append(listeners, taken))

			listeners, err = listen("localhost:" + port)
			closeAll(listeners)
			return err
		}

		// Nothing of the refused attempt is left. (Somebody else may get the port in between.)
		err := again()
		for tries := 0; err != nil && tries < 9; tries++ {
			err = again()
		}
		is.OK(t, err)
	}
}

func TestListenOnSeveralAddresses(t *testing.T) {
	command.ListenOnSeveralAddresses(t, binary, serveTCP)
}

func TestListenNoticesVanishedClients(t *testing.T) {
	listeners, err := listen("127.0.0.1:0")
	is.OK(t, err)
	defer closeAll(listeners)
	protocol.VanishedClientsAreNoticed(t, listeners[0])
}

func TestListenOnAUnixSocket(t *testing.T) { command.ListenOnAUnixSocket(t, binary) }
func TestListenForWatchers(t *testing.T)   { command.ListenForWatchers(t, binary) }

// ---- server.go: watching

func TestStats(t *testing.T) { protocol.Stats(t, serveOn, memoryPerClient) }

// Ensure that /metrics has every counter of Stats, with the same value, and more; that names are
// unique; that each metric has a help text; and that a look at the files counts as no Commit.
func TestWatchHasTheCountersOfStats(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.server.logged, n.server.status = new(logCounts), new(storage.Status)
		db := storeIn(t, storetest.New(), n.server.status)
		defer db.Close()
		defer n.server.Close()
		n.server.db = db

		a := n.Dial(t)
		a.Ask("Put:key:value\nGet:key", "key:value")
		world.Pass(3 * fileCheckTime)

		_, body := getPage(n.server.watchHandler(""), "/metrics")
		checkMetrics(t, body)
		is.In(t, "/metrics behind looks at the files", body, "_commit_seconds_count 2\n", "_batch_chains_count 2\n")

		a.Send("Stats\n")
		for _, line := range a.ReadList() {
			name, value, _ := strings.Cut(strings.TrimPrefix(line, ": "), " ")
			want := "\nkvserver_" + name + " " + value + "\n"
			switch name {
			case "version":
				want = "\nkvserver_info{version=\"test\"} 1\n"
			case "stats_requests_total": // this Stats is the first
				want = "\nkvserver_" + name + " 0\n"
			case "process_bytes", "memory_bytes": // they change by themselves
				want = "\nkvserver_" + name + " "
			}

			is.In(t, "/metrics beside Stats", body, want)
		}
	})
}

// Ensure that the numbers, health and profiles are served over HTTP, and that they end with the
// server.
func TestWatch(t *testing.T) {
	t.Parallel()
	s, addr := watched(t)
	get := func(path string) (int, string) {
		answer, err := http.Get("http://" + addr + path)
		is.OK(t, err)
		defer answer.Body.Close()
		body, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, answer.Header.Get("Content-Type") + "\n" + string(body)
	}

	a := protocol.DialTCP(t, s.listener.Addr().String())
	a.Ask("Put:k:v\nPing", ":PONG")

	for path, want := range map[string]string{"/healthz": "ok\n", "/": "/metrics\n",
		"/debug/pprof/goroutine?debug=1": "workLoop", "/metrics?": "text/plain; version=0.0.4",
		// A request over HTTP does not count as a request.
		"/metrics": "kvserver_stats_requests_total 0\n"} {
		if code, body := get(path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d, without %q:\n%s", path, code, want, body)
		}
	}

	a.HangUp()
	s.Close()
	for _, path := range []string{"/healthz", "/metrics"} {
		code, _ := get(path)
		is.Equal(t, path+" after Close", code, 503)
	}
}

// watched starts a server with -http, and returns the address of that.
func watched(t *testing.T) (s *keyValueServer, addr string) {
	s = New(kvstore.NewMemory())
	startTCP(t, s)
	listeners, err := listen("localhost:0")
	is.OK(t, err)
	web := s.watch(listeners, "metrics.example")
	t.Cleanup(func() { web.Close() })
	return s, listeners[0].Addr().String()
}

// checkMetrics wants the text format of Prometheus, with a help text for each metric, and no
// complaint of Prometheus's own tool, where it is installed.
func checkMetrics(t *testing.T, body string) {
	t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(body), "\n") {
		if !regexp.MustCompile(`^(# HELP kvserver_[a-z_]+ [A-Z0-9].*\.|` +
			`# TYPE kvserver_[a-z_]+ (gauge|counter|histogram)|` +
			`kvserver_[a-z_]+(\{(version|le)="[^"]*"\})? [0-9.e+-]+)$`).MatchString(line) {
			t.Errorf("/metrics: %q is not of its format", line)
		}
	}

	// Before the values of a metric stand two lines about it, once.
	seen := map[string]bool{}
	about := regexp.MustCompile(`(?m)^# HELP (\S+) .*\n# TYPE (\S+) (.*)\n(\w+)`)
	for _, m := range about.FindAllStringSubmatch(body, -1) {
		if m[1] != m[2] || !strings.HasPrefix(m[4], m[1]) || seen[m[1]] ||
			m[3] != "histogram" && strings.HasSuffix(m[1], "_total") != (m[3] == "counter") {
			t.Errorf("/metrics: %q is wrong, or there twice", m[0])
		}
		seen[m[1]] = true
	}
	is.Equal(t, "metrics with their two lines", len(seen), strings.Count(body, "# TYPE "))

	if promtool := command.Tool(t, "promtool"); promtool != "" {
		cmd := exec.Command(promtool, "check", "metrics")
		cmd.Stdin = strings.NewReader(body)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v, %s", err, out)
		}
	}
}

// Ensure that /healthz and /metrics report in time that the store does not answer, and leave
// nothing behind.
func TestWatchAStalledStore(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		store := protocol.GatedStore{Memory: kvstore.NewMemory(), Gate: make(chan error)}
		n.server.db = kvstore.StoreOf(store)
		handler := n.server.watchHandler("")
		a := n.Dial(t)
		a.Post("Put:k:v\n")

		is.Within(t, watchTime, watchTime, func() { wantPage(t, handler, "/healthz", 503) })
		is.Within(t, watchTime, watchTime, func() { wantPage(t, handler, "/metrics", 503) })
		is.Within(t, 0, 0, func() { wantPage(t, handler, "/livez", 200) })

		time.AfterFunc(watchTime/2, func() { store.Gate <- errors.New("disk on fire") })
		is.Within(t, watchTime/2, watchTime/2, func() { wantPage(t, handler, "/healthz", 503) })
	})

	wantPage(t, New(kvstore.NewMemory()).watchHandler(""), "/healthz", 503) // before Start
}

// Ensure that an operator sees how the data is opened, or what the server waits for, and then that
// it serves.
func TestWatchBeforeTheData(t *testing.T) {
	t.Parallel()
	log := newLog(io.Discard, false, false)
	s := New(nil)
	s.log, s.logged, s.status = log.Logger, &log.counts, new(storage.Status)
	handler := s.watchHandler("")

	wantPage(t, handler, "/healthz", 503, "opening the data\n")
	wantPage(t, handler, "/livez", 200, "alive\n")
	wantPage(t, handler, "/live", 404)
	if text := wantPage(t, handler, "/metrics", 200, "\nkvserver_active 0\n"); strings.Contains(text, "_keys") {
		t.Errorf("before the data is open /metrics answers %q", text)
	}

	s.db = storeIn(t, storetest.New(), s.status)
	startTCP(t, s)
	wantPage(t, handler, "/healthz", 200, "ok\n")
	a := protocol.DialTCP(t, s.listener.Addr().String())
	a.Ask("Put:k:v\nPing", ":PONG")

	s.log.Warn("the test is slow")
	s.log.Error("the test has failed")
	text := wantPage(t, handler, "/metrics", 200)
	checkMetrics(t, text)
	for _, want := range []string{"active 1\n", "takeovers_total 0\n", "compactions_total 0\n",
		"commit_seconds_count ", "batch_chains_bucket{le=\"1\"} ", "fsync_seconds_count ",
		"log_errors_total 1\n", "log_lines_lost_total 0\n", "queued_limit_bytes 1073741824\n",
		"clients_refused_total 0\n", "last_error_timestamp_seconds ", "go_goroutines ",
		"go_heap_bytes ", "go_memory_bytes ", "go_gc_cycles_total "} {
		is.In(t, "/metrics", text, "\nkvserver_"+want)
	}
}

// Ensure that times are told in seconds.
func TestWatchTellsSeconds(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		s := n.server
		s.status, s.logged = new(storage.Status), new(logCounts)
		s.log = slog.New(slog.NewTextHandler(&n.log, &slog.HandlerOptions{ReplaceAttr: s.logged.note}))
		s.db = &protocol.SlowStore{Memory: kvstore.NewMemory(), Takes: 3 * time.Second}
		s.status.Set("")

		n.DialAck(t).Ask("Put:k:v", ":OK 1")
		s.status.Confirm(time.Now())
		world.Pass(57 * time.Second)
		s.log.Error("the test has failed")
		wantPage(t, s.watchHandler(""), "/metrics", 200, "\nkvserver_uptime_seconds 60\n",
			"\nkvserver_commit_seconds_sum 3\n", "\nkvserver_lock_age_seconds 57\n",
			fmt.Sprintf("\nkvserver_last_error_timestamp_seconds %d\n", time.Now().Unix()))
	})
}

// Ensure that the log warns of a -http that anybody may reach, and of no other.
func TestWatchWarns(t *testing.T) {
	for addr, warnings := range map[string]int{"127.0.0.1:0": 0, "0.0.0.0:0": 1} {
		n := newFakeNet()
		web, err := n.server.watchAt(addr)
		is.OK(t, err)
		web.Close()
		is.Equal(t, "warnings of "+addr, strings.Count(n.log.Take(), "anyone who can reach"), warnings)
	}
}

// Ensure that the HTTP side has limits like the front: few connections, one short profile at a
// time, and no answer for a page that used another host name.
func TestWatchIsLimited(t *testing.T) {
	t.Parallel()
	s, addr := watched(t)
	const idle = 3 * maxWatchers
	for range idle {
		protocol.DialTCP(t, addr)
	}

	get := func(host, path string) (int, string) {
		t.Helper()
		a := protocol.DialTCP(t, addr)
		a.Send("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")

		answer, err := http.ReadResponse(a.R, nil)
		is.OK(t, err)
		body, _ := io.ReadAll(answer.Body)
		if a.R.Buffered() > 0 || a.Conn.CloseWrite() != nil {
			t.Errorf("%s: more than an answer", path)
		}
		return answer.StatusCode, string(body)
	}

	code, _ := get("localhost", "/healthz")
	is.Equal(t, "beside idle connections", code, 200)

	for host, want := range map[string]int{"evil.example": 403, "evil.example:80": 403,
		"localhost:80": 200, "LOCALHOST": 200, "127.0.0.1": 200, "[::1]:80": 200, "[::1]": 200,
		"metrics.example:1": 200, "192.0.2.1": 200} {
		if code, body := get(host, "/debug/pprof/symbol"); code != want && code != 503 {
			t.Errorf("Host: %s gets %d, %q, want %d", host, code, body, want)
		}
		if code, _ := get(host, "/metrics"); code != want && code != 503 { // a busy machine
			t.Errorf("Host: %s gets %d, want %d", host, code, want)
		}
	}

	endless := protocol.DialTCP(t, addr)
	endless.SendSome("GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " +
		strings.Repeat("x", 2*guestMost) + "\r\n\r\n")
	answer, _ := io.ReadAll(endless.R)
	is.Equal(t, "a request that is too long is answered", strings.Contains(string(answer), "alive"), false)

	for _, path := range []string{"/debug/pprof/profile", "/debug/pprof/trace", "/debug/pprof/heap"} {
		wantPage(t, s.watchHandler(""), path+"?seconds=61", 400)
	}
}

// Ensure that one connection too many takes the place of the oldest that has sent nothing, or
// otherwise of the oldest, but not of one that was taken over.
func TestWatchFewConnections(t *testing.T) {
	n := newFakeNet()
	few := &fewConns{Listener: n, most: 4}
	var guests []*guest
	var clients []*world.Conn

	come := func() {
		ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
		go n.Connect(theirs)
		conn, err := few.Accept()
		is.OK(t, err)
		guests, clients = append(guests, conn.(*guest)), append(clients, ours)
	}
	speak := func(i int) {
		clients[i].Write([]byte("x"))
		guests[i].Read(make([]byte, 1))
	}

	wantGone := func(want ...int) {
		t.Helper()
		var gone []int
		for i, g := range guests {
			if g.hasLeft.Load() {
				gone = append(gone, i)
			}
		}
		is.Equal(t, "guests that have gone", fmt.Sprint(gone), fmt.Sprint(want))
	}

	for range few.most {
		come()
	}
	guests[3].Close()
	come() // it has the place of one that had gone
	wantGone(3)
	speak(0)
	come() // of the oldest that has said nothing
	wantGone(1, 3)
	for _, i := range []int{2, 4, 5} {
		speak(i)
	}
	come() // of the oldest, because all have said something
	wantGone(0, 1, 3)

	last := guests[6]
	is.Equal(t, "it goes on without a place, once", last.leave() && last.Close() == nil && !last.leave(), true)
	_, err := last.Conn.Write([]byte("x"))
	is.OK(t, err) // it is open still
}

// Ensure that only one profile is taken at a time, with a pause between two, and that one which is
// refused leaves the next its turn.
func TestWatchOneProfileAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		handler := oneAtATime(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-time.After(time.Second / 2)
		}))
		wantPage(t, handler, "/?seconds=61", 400)

		go getPage(handler, "/")
		synctest.Wait()
		wantPage(t, handler, "/", 503)

		world.Pass(time.Second - 1)
		wantPage(t, handler, "/", 503) // too soon after the last one
		world.Pass(1)
		wantPage(t, handler, "/", 200)
		world.Pass(time.Second)
	})
}

// Ensure that a profile is only for GET, and does not read a request's body.
func TestWatchProfilesTakeNothing(t *testing.T) {
	handler := New(kvstore.NewMemory()).watchHandler("localhost")
	for method, want := range map[string]int{"GET": http.StatusOK, "POST": http.StatusMethodNotAllowed} {
		sent := &io.LimitedReader{R: strings.NewReader(strings.Repeat("a=b&", 1000)), N: 4000}
		r := httptest.NewRequest(method, "http://localhost/debug/pprof/cmdline?debug=1", sent)
		r.Header.Set("Content-Type", "multipart/form-data; boundary=x")

		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if method == "GET" && w.Code == http.StatusNotFound { // this profile is not served
			w.Code = http.StatusOK
		}

		if w.Code != want || sent.N < 4000 {
			t.Errorf("%s: %d, want %d; %d bytes were taken in", method, w.Code, want, 4000-sent.N)
		}
	}
}

// ---- client.go: input, bytes to lines

func TestInputAtEverySplitPoint(t *testing.T) { protocol.InputAtEverySplitPoint(t, serveEmpty) }
func TestInputLimitAtEverySplitPoint(t *testing.T) {
	protocol.InputLimitAtEverySplitPoint(t, serveEmpty)
}

func TestSlowLine(t *testing.T)                { protocol.SlowLine(t, serveEmpty) }
func TestSlowLineAfterSkippedOne(t *testing.T) { protocol.SlowLineAfterSkippedOne(t, serveEmpty) }
func TestSlowLineIsAnsweredOnce(t *testing.T)  { protocol.SlowLineIsAnsweredOnce(t, serveEmpty) }
func TestSlowLineEndsInTime(t *testing.T)      { protocol.SlowLineEndsInTime(t, serveEmpty) }
func TestSlowLineBehindReplies(t *testing.T)   { protocol.SlowLineBehindReplies(t, serveEmpty) }

// Ensure that a client that does not read its replies keeps no long line of others from its memory.
func TestInputBehindReplies(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.limit(64<<20, 1<<20)
		n.server.budget.inputs.Add(n.server.budget.forInput()) // only one line at a time is let in
		n.fill("big", strings.Repeat("v", 1200), 4000)         // more than the queue holds

		mute, a := n.Dial(t), n.Dial(t)
		long := strings.Repeat("v", 100*kilo)
		mute.Ask(strings.Repeat("Get:none\n", 8*kilo)+"Ping", ":PONG") // so that it is read in large pieces

		go mute.SendSome("Get:big\nPut:k:" + long)
		synctest.Wait()
		is.Within(t, 0, quietAfter, func() { a.Ask("Put:k:"+long+"\nPing", ":PONG") })

		n.server.budget.inputs.Add(-n.server.budget.forInput())
		mute.Close()
	})
}

// ---- client.go: Keys and Dump

func TestDumpIsOneMoment(t *testing.T) { protocol.DumpIsOneMoment(t, serveEmpty) }

// Ensure that the lists of many Keys and Dumps of many keys keep to the memory for queues, that all
// are answered in full, and that one that is not read does not delay the others.
func TestDumpListsAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		const askers, limit = 12, 1 << 18
		keys := storetest.Fewer(12*kilo, 2) // each list needs several parts
		n.server.budget.maxQueues, n.server.budget.fewKeys = limit, 100

		// The keys are put in no order, and must come in order.
		wantKeys, wantDump := new(strings.Builder), new(strings.Builder)
		for i := range keys {
			key := fmt.Sprintf("key%07d%s", i*7919%keys, strings.Repeat("k", 100))
			n.fill(key, "v", 1)
			key = fmt.Sprintf("key%07d%s", i, strings.Repeat("k", 100))
			fmt.Fprintf(wantKeys, ": %s\n", key)
			fmt.Fprintf(wantDump, ": Put:%s:v\n", key)
		}

		mute := n.Dial(t)
		mute.Send("Keys\n")

		var all sync.WaitGroup
		for i := range askers {
			request, want := "Keys\n", wantKeys
			if i%2 == 0 {
				request, want = "Dump:k\n", wantDump
			}

			c := n.Dial(t)
			all.Go(func() {
				c.SendAll(request)
				got := new(strings.Builder)
				for err := error(nil); err == nil; _, err = io.CopyN(got, c.R, 100*kilo) {
					<-time.After(lookTime)
				}

				if want := want.String() + fmt.Sprintf(":OK %d\n", keys); got.String() != want {
					t.Errorf("%q: %d bytes, want %d", request, got.Len(), len(want))
				}
				c.Close()
			})
		}

		ended := make(chan struct{})
		go func() {
			all.Wait()
			close(ended)
		}()

		watch := n.Dial(t)
		for began := time.Now(); !isClosed(ended); world.Pass(lookTime) {
			is.Between(t, "bytes of lists", n.server.budget.keyLists.Load(), 0, limit/listsShare)

			// Replies that have begun may take a quarter more.
			is.Between(t, "bytes that are queued", watch.Stat("queued_bytes"), 0,
				limit*5/4+(maxSnapshots+1)*(2*testMaxMessage+8*kilo))
			if time.Since(began) > time.Minute {
				t.Fatal("they are not answered")
			}
		}

		watch.HangUp()
		mute.Close()
	})
}

// Ensure that a Keys that is not read holds no snapshot.
func TestDumpGivesSnapshotsBack(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.fillKeys(strings.Repeat("k", 500), 8000, "v") // 4 MB
		db := &protocol.SnapshotStore{Store: n.server.db}
		n.server.db = db
		a := n.Dial(t)
		a.Post("Keys\n")
		runtime.GC()
		is.Equal(t, "the snapshot of a Keys that is not read, in memory", db.Last.Value(), nil)
		is.Equal(t, "snapshots of a Keys that is not read", len(n.server.snapshots.slots), 0)
		a.Close()
	})
}

// Ensure that clients that take nothing of their Dumps, or too little, do not keep all places for
// long while another client waits for one, and that they may keep them otherwise.
func TestDumpGivesItsPlaceToOthers(t *testing.T) {
	for _, drip := range []int{0, 10 * kilo} { // bytes that are read in a tenth of a second
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.fillKeys("k", 1600, strings.Repeat("v", 20*kilo)) // 32 MB
			mayEnd := make(chan struct{})
			slow := n.DialMany(t, maxSnapshots, func(_ int, c *protocol.Client) {
				c.Conn.Write([]byte("Dump\n"))
				go func() {
					for !isClosed(mayEnd) {
						io.CopyN(io.Discard, c.Conn, int64(drip))
						<-time.After(lookTime)
					}
				}()
			})

			world.Pass(3 * dripTime)
			is.Equal(t, "places that are taken while nobody waits", len(n.server.snapshots.slots), maxSnapshots)

			a := n.DialAck(t)
			is.Within(t, 0, 6*dripTime, func() { a.Ask("Keys:none", ":OK 0") })

			close(mayEnd)
			world.Pass(lookTime)
			a.HangUp()
			closeClients(slow)
		})
	}
}

func TestDumpOfAStoreThatCannotList(t *testing.T) { protocol.DumpOfAStoreThatCannotList(t, serveOn) }

// Ensure that a Dump, sent back line by line, restores every value, whatever bytes it holds.
func TestDumpRestores(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		want := map[string][]string{}
		random := rand.New(rand.NewPCG(1, 2))
		for range 3000 {
			b := make([]byte, random.IntN(6))
			for i := range b {
				b[i] = "\r\x00a:\xff "[random.IntN(6)]
			}

			// A key has no colon, but a value may have one.
			key := strings.ReplaceAll("k"+string(b), ":", ";")
			want[key] = append(want[key], string(b))
			n.server.db.Put(key, string(b))
		}

		end := time.Now().Add(90 * time.Second).UnixMilli()
		n.server.db.Expire("k\r", end)
		dump, _, _, _ := converseWith(t, n, "", "Dump")

		other := newFakeNet()
		defer other.server.Close()
		if out, errs, good, err := converseWith(t, other, dump); out != "" || errs != "" || !good ||
			err != nil {
			t.Errorf("restoring prints %q and %q: %v", out, errs, err)
		}

		other.server.Close()
		if got := maps.Collect(other.server.db.(*kvstore.Memory).All()); !maps.EqualFunc(got, want,
			slices.Equal[[]string]) {
			t.Errorf("%d keys are restored of %d, or with other values", len(got), len(want))
		}
		if at, _ := other.server.db.Deadline("k\r"); at != end || other.server.db.Expiring() != 1 {
			t.Errorf("a key goes at %d, want %d", at, end)
		}
	})
}

// Ensure that sorting many keys lets other clients have a machine's only core at times.
func TestDumpSortTakesTurns(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		s := New(kvstore.NewMemory())
		c := newClient(1, new(world.Conn), s)
		list, keys := &listing{Query: &Query{client: c}}, make([]string, 3*sortSlice)
		for i := range keys {
			keys[i] = strconv.Itoa(i * 7919 % len(keys))
		}

		s.cores.slots <- struct{}{} // until both wait, the sort first
		ended := make(chan string, 2)
		go func() {
			c.outbox.core.acquire(nil)
			list.sort(keys)
			c.outbox.core.release()
			ended <- "the sort"
		}()
		synctest.Wait()

		go func() {
			s.cores.slots <- struct{}{}
			ended <- "the other"
			<-s.cores.slots
		}()
		synctest.Wait()

		<-s.cores.slots
		is.Equal(t, "over first", <-ended, "the other")
		if <-ended; !slices.IsSorted(keys) {
			t.Error("the keys are not sorted")
		}

		// Half of them is about half, even if the least is in the middle.
		half, _ := list.firstHalf(slices.Concat(keys[len(keys)/2:], keys[:len(keys)/2]))
		is.Between(t, "keys of the first half", len(half), len(keys)/3, len(keys)*2/3)
	})
}

// ---- client.go: outbox, replies to messages

// Ensure that a reply of several messages that had room is counted at once, even if others have
// filled all queues just then; but not a long reply, and not more than a quarter beyond the limit.
func TestOutboxClaim(t *testing.T) {
	const limit = 16 * maxMessage
	for _, c := range []struct {
		queued   int64
		messages int
		counted  bool
	}{
		{0, 1, false}, {0, 2, true}, {0, maxShared, true}, {0, maxShared + 1, false},
		{limit, 1, false}, {limit, 2, true}, {limit, 4, true}, {limit, 5, false},
	} {
		s := New(kvstore.NewMemory())
		s.budget.maxQueues = limit
		o := &newClient(1, new(world.Conn), s).outbox
		o.piece = maxMessage
		s.budget.queued.Store(c.queued)

		want := c.queued
		if c.counted {
			want += int64(c.messages) * maxMessage
		}
		if o.claim(int64(c.messages * maxMessage)); s.budget.queued.Load() != want {
			t.Errorf("where %d bytes are queued, with a reply of %d messages %d are counted, want %d",
				c.queued, c.messages, s.budget.queued.Load(), want)
		}

		o.uncount(&Query{})
		is.Equal(t, "bytes that are counted afterwards", s.budget.queued.Load(), c.queued)
	}
}

// Ensure that workLoop does not wait if the queues reach their limit while it answers: a reply that
// it has begun is queued.
func TestOutboxNeverWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(kvstore.NewMemory())
		s.budget.maxQueues = 1
		c := unwritten(s)
		c.buffer <- nil // one message waits already
		s.budget.queued.Store(1)

		q := &Query{queryType: ping}
		size := c.outbox.measure(q)
		c.outbox.reply(q, size, true) // as answer does if it found the queues below their limit
		is.Equal(t, "messages that are queued", len(c.buffer), 2)
	})
}

// Ensure that room is told as soon as there is, not after the Write of what was taken out.
func TestOutboxIsToldOfRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := unwritten(New(kvstore.NewMemory()))
		_, c.paced.Conn = world.Pipe(world.StreamSize, world.StreamSize)
		go c.writeToClient()
		c.buffer <- make([]byte, 2*world.StreamSize)
		is.Equal(t, "there is room", <-c.progress, true)
		c.paced.Close()
		close(c.buffer)
	})
}

// Ensure that the messages of a long reply are small while all queues are at their limit, because
// each client that reads nothing keeps two of them; but not if only the reply itself is too much.
func TestOutboxMessagesAreSmallAtTheLimit(t *testing.T) {
	const limit = 180 * kilo
	for _, n := range []struct{ queued, least, most int }{{limit, 1, chunkSize}, {0, chunkSize + 1, largeSize}} {
		synctest.Test(t, func(t *testing.T) {
			s := New(kvstore.NewMemory())
			s.budget.maxQueues = limit
			s.budget.queued.Store(int64(n.queued))
			c, done := unwritten(s), make(chan struct{})
			go func() {
				values := slices.Repeat([]string{strings.Repeat("v", kilo)}, 200)
				c.outbox.replyAll(&Query{queryType: get, key: "k", values: values, bytes: kvstore.SizeOf(values)})
				close(done)
			}()

			for synctest.Wait(); len(c.buffer) > 0; synctest.Wait() {
				is.Between(t, "bytes of a message", cap(<-c.buffer), n.least, n.most)
				c.tellRoom()
			}
			<-done
		})
	}
}

// Ensure that what a Write takes along counts with the memory that it is put into, and gets a large
// message only while there is memory for that.
func TestOutboxCountsWhatAWriteTakes(t *testing.T) {
	for _, queues := range []int64{0, 4 * largeSize, largeSize} {
		s := New(kvstore.NewMemory())
		s.budget.maxQueues = queues
		c := unwritten(s)
		one, other := make([]byte, 9*kilo), make([]byte, 9*kilo)
		s.budget.queued.Store(int64(cap(one) + cap(other)))
		c.buffer <- other
		msg, size := c.coalesce(one)
		is.Equal(t, "bytes that count", s.budget.queued.Load(), size)
		is.Between(t, "bytes that are taken", int64(cap(msg)), 18*kilo, size*5/4)
	}
}

// Ensure that a reply of several messages, once begun, is queued to its end even if the queues
// reach their limit meanwhile, so that its client's later writes take effect.
func TestOutboxBegunReplyEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.fill("k", strings.Repeat("v", 7*kilo), 4)
		n.server.budget.maxQueues = 1 << 20
		a, b, other := n.Dial(t), n.Dial(t), n.Dial(t)

		go a.SendSome(strings.Repeat("Get:k\n", 300) + "Put:mark:v\n")
		world.Pass(time.Minute)
		go b.SendSome(strings.Repeat("Get:k\n", 300) + "Put:mark:w\n")
		world.Pass(time.Minute)

		other.Ask("Get:mark\nPing", "mark:v", "mark:w", ":PONG")
		is.Between(t, "bytes that are queued", other.Stat("queued_bytes"), 0, 5<<18)

		a.Close()
		b.Close()
		synctest.Wait()
		other.WantStat("queued_bytes", 0)
	})
}

// Ensure that a chain that waits for its slow reader keeps no memory of the store alive.
func TestOutboxKeepsOnlyItsLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := kvstore.NewMemory()
		db.Put("k", strings.Repeat("v", 100))
		c := unwritten(New(db))
		// The queue is so full that the chain has to wait.
		for range maxShared {
			c.buffer <- nil
		}

		c.in.buf = make([]byte, burstSize)
		chain, _ := c.parse(c.in.wholeLines(copy(c.in.buf, strings.Repeat("Get:k\n", 3))))

		shared := func(q *Query) bool {
			return unsafe.StringData(q.values[0]) == unsafe.StringData(db.View(nil, "k")[0])
		}
		for q := chain; q != nil; q = q.next {
			if q.run(db, time.Now); !shared(q) {
				t.Error("a list is copied before that is needed")
			}
		}

		c.answer(chain)
		synctest.Wait()
		for q := chain; q != nil; q = q.next {
			if shared(q) || q.args[0] != "" {
				t.Error("a list that waits shares the store's memory")
			}
		}

		// Once the queue is empty, the chain goes on.
		for range maxShared {
			<-c.buffer
		}
		c.tellRoom()
		<-c.done
		is.Equal(t, "the message", string(<-c.buffer), strings.Repeat("k:"+strings.Repeat("v", 100)+"\n", 3))
	})
}

// Ensure that the size of a long reply is known without a walk through its list.
func TestOutboxMeasuresNoLongReply(t *testing.T) {
	db := kvstore.NewMemory()
	for range 1000 {
		db.Put("k", "value")
	}
	q := &Query{queryType: get, key: "k"}
	q.run(db, time.Now)
	clear(q.values) // a walk would find them empty
	is.Between(t, "bytes of the reply", q.replySize(false), int64(1000*len("k:value\n")), math.MaxInt64)
	q.bytes += math.MaxInt32 // then 32 bits are not enough
	is.Between(t, "bytes of a huge reply", q.replySize(false), math.MaxInt32+8000, math.MaxInt64)
}

// Ensure that the messages of a long reply are used again.
func TestOutboxUsesMessagesAgain(t *testing.T) {
	c := unwritten(New(kvstore.NewMemory()))
	go func() {
		for msg := range c.buffer {
			recycle(msg)
			c.tellRoom()
		}
	}()
	defer close(c.buffer)

	values := slices.Repeat([]string{strings.Repeat("v", 1000)}, 2000) // 2 MB
	fewest := uint64(math.MaxUint64)
	for range 30 { // the race detector makes sync.Pool forget at times
		fewest = min(fewest, allocated(func() {
			for len(c.buffer) > 0 {
				runtime.Gosched()
			}
			c.outbox.replyAll(&Query{queryType: get, key: "k", values: values, bytes: kvstore.SizeOf(values)})
		}))
	}

	is.Between(t, "bytes that a reply of 2 MB allocates", fewest, 0, 1<<20)
}

// Ensure that no reply is longer than the size that is measured before it is formatted.
func TestOutboxMeasuresAtLeastTheReply(t *testing.T) {
	for kind := range queryType(queryTypes) {
		for _, n := range []int{0, 9, 10, math.MaxInt} {
			for _, values := range [][]string{nil, {"", "v", "w\r"}} {
				q := &Query{queryType: kind, key: "key", args: [2]string{"value"}, line: n, n: n,
					values: values, bytes: kvstore.SizeOf(values)}
				var lines []byte
				for _, v := range values {
					lines = q.appendLine(lines, v)
				}

				for _, acked := range []bool{false, true} {
					reply := q.appendEnd(slices.Clone(lines), acked, n)
					is.Between(t, fmt.Sprintf("bytes of %q", reply), len(reply), 0, int(q.replySize(acked)))
				}
			}
		}
	}
}

// Ensure that a chain costs one allocation, whatever it holds, and an Update two more, which the
// store keeps.
func TestOutboxAllocations(t *testing.T) {
	for _, c := range []struct {
		name, burst string
		most        float64
	}{
		{"one Get", "Get:k1\n", 1},
		{"a chain of Gets", strings.Repeat("Get:k1\nget:k2\nGet:none\n", 60), 1},
		{"one Update", "Update:k1:v:v\n", 1 + 2},
		{"a chain of Updates", strings.Repeat("Update:k1:v:v\n", 100), 1 + 200},
		{"Gets with Ack and Pings", "Ack\nGet:k1\nPing:1\nGet:k2\n", 1},
		{"the longest chain after Ack", "Ack\n" + strings.Repeat("Get:key000000001\n", maxChain-1), 1},
	} {
		db := kvstore.NewMemory()
		db.Put("key000000001", "vvvvvvvvvvvvvvvv")
		db.Put("k1", "v")
		db.Put("k2", "v")
		db.Put("k2", "w")

		client := unwritten(New(db))
		client.in.buf = make([]byte, burstSize)

		once := func() {
			chain, _ := client.parse(client.in.wholeLines(copy(client.in.buf, c.burst)))
			for q := chain; q != nil; q = q.next {
				q.run(db, time.Now)
			}
			client.answer(chain)
			<-client.done
			for len(client.buffer) > 0 {
				recycle(<-client.buffer)
			}
		}

		fewest := testing.AllocsPerRun(1, once)
		for range 30 { // the race detector makes sync.Pool forget at times
			fewest = min(fewest, testing.AllocsPerRun(1, once))
		}
		is.Between(t, "allocations of "+c.name, fewest, 0, c.most)
	}
}

// ---- client.go: slow readers and steady ones

// seenSlow is the time in which a client that reads nothing is noticed to be slow.
const seenSlow = slowAfter + 2*lookTime

func TestSlowReaderDelaysOnlyItself(t *testing.T) {
	onTheWay := maxShared*testMaxMessage + maxWrite + testMaxMessage + 2*world.StreamSize
	protocol.SlowReaderDelaysOnlyItself(t, serveEmpty, onTheWay)
}

func TestSlowReaderRecovers(t *testing.T) { protocol.SlowReaderRecovers(t, serveEmpty) }

// paced returns a connection, its reader, and a channel that reports whether it takes bytes.
func paced() (conn *pacedConn, reader *world.Conn, told chan bool) {
	reader, theirs := world.Pipe(world.StreamSize, world.StreamSize)
	told = make(chan bool, 1)
	return &pacedConn{Conn: theirs, server: New(kvstore.NewMemory()), progress: told}, reader, told
}

// Ensure that a connection that stops taking bytes is noticed to be slow in the same time always,
// also just after it has recovered, and after a long pause.
func TestSlowReaderIsSeenInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, reader, told := paced()
		message, unread := make([]byte, 2*world.StreamSize), 0
		for round := range 4 {
			start := time.Now()
			written := make(chan error)
			go func() {
				_, err := conn.Write(message)
				written <- err
			}()

			is.Equal(t, "a reader that reads nothing is told to be taking", <-told, false)

			// The more its socket may hold unread, the longer a reader may pause.
			most := seenSlow + time.Duration(unread/8)*time.Second/steadyRate
			if round > 0 { // it is known to read
				most += slowAfter
			}
			is.Between(t, "time until it is seen that nothing is read", time.Since(start), slowAfter, most)

			is.Equal(t, "a second later it is told to", <-told, false)
			go io.ReadFull(reader, message)
			is.Equal(t, "a reader that reads again is told to", <-told, true)
			is.OK(t, <-written)

			if unread += 2 * len(message); round == 2 {
				world.Pass(time.Hour)
				unread = 0
			}
		}
	})
}

// Ensure that a reader at steadyRate does not count as slow, though its socket holds much and it
// pauses.
func TestSteadyReaderMayPause(t *testing.T) {
	for pause := time.Second; pause <= 3*time.Second; pause += time.Second {
		synctest.Test(t, func(t *testing.T) {
			conn, reader, told := paced()
			conn.Conn.(*world.Conn).SetWriteBuffer(6 << 20)
			go conn.Write(make([]byte, 2*socketMost))
			for left := 2 * socketMost; left > 0; left -= int(steadyRate * pause.Seconds()) {
				world.Pass(pause)
				io.CopyN(io.Discard, reader, min(int64(left), int64(steadyRate*pause.Seconds())))
			}
			is.Equal(t, fmt.Sprint("times that it was slow, with pauses of ", pause), len(told), 0)
		})
	}
}

// Ensure that a client does not count as slow too early if the first tick of a Write ends at a
// deadline that the Write before has set.
func TestSlowReaderIsNotSeenTooEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, _, told := paced()
		conn.Write(make([]byte, world.StreamSize))
		world.Pass(lookTime / 2)

		start := time.Now()
		go conn.Write([]byte{0})
		is.Equal(t, "it takes bytes", <-told, false)
		is.Between(t, "time until that is told", time.Since(start), slowAfter, math.MaxInt64)
		conn.Close()
		synctest.Wait()
	})
}

// Ensure that a reply waits, is dropped, or costs its client the connection exactly as the outbox's
// rules say.
func TestSlowReaderFate(t *testing.T) {
	const all = maxBufferSize
	for _, c := range []struct {
		queued, messages      int
		slow, mayDrop, mayCut bool
		bytes                 int64 // in queues; negative: in chains that wait
		want                  fate
	}{
		{0, all + 1, true, false, true, 1000, isQueued},
		{maxShared - 1, 1, false, true, false, 0, isQueued},
		{maxShared, 1, false, true, false, 0, waits},
		{all - 1, 1, true, true, false, 0, isQueued},
		{all, 1, true, true, false, 0, isDropped},
		{all - 1, 2, true, true, false, 0, isDropped},
		{all, 1, true, false, false, 0, waits},
		{all, 1, true, false, true, 0, waits},
		{all, 1, true, false, true, -1000, isCutOff},
		{1, 1, true, true, false, 1000, isDropped},
		{1, 1, true, false, true, 1000, isCutOff},
		{1, 1, true, false, false, 1000, waits},
		{1, 1, false, false, true, 1000, waits},
		{all, 1, false, false, true, -1000, waits},
	} {
		s := New(kvstore.NewMemory())
		s.budget.maxQueues = 1000
		client := unwritten(s)
		for range c.queued {
			client.buffer <- nil
		}
		s.budget.queued.Store(max(0, c.bytes))
		s.budget.waitingLines.Store(max(0, -c.bytes))
		client.outbox.slow = c.slow

		got, why := client.outbox.decide(c.messages, c.mayDrop, c.mayCut)
		is.Equal(t, fmt.Sprintf("%+v (%q)", c, why), got, c.want)
	}

	s := New(kvstore.NewMemory())
	o := &unwritten(s).outbox
	for range maxShared {
		o.client.buffer <- nil
	}
	check := func(what string, mayCut bool, want fate) {
		t.Helper()
		got, why := o.decide(1, false, mayCut)
		is.Equal(t, fmt.Sprintf("%s (%q)", what, why), got, want)
	}

	// Others' long lines get no memory because of what clients that drip keep.
	s.budget.limitTo(64<<20, 1000)
	s.budget.waitingLines.Store(1000)
	check("it does not drip", true, waits)
	o.drips = true
	check("it drips", true, isCutOff)
	s.budget.queued.Store(s.budget.waitingLines.Swap(0))
	check("it drips, but lines get memory", true, waits)

	// Writes need the memory of removed values.
	s.budget.pinned.Store(1 << 30)
	s.budget.collected(s.budget.forData() * 2)
	check("it keeps no values", false, waits)
	o.pinned = 1
	check("it keeps values", false, isCutOff)

	// Others wait for a snapshot.
	o.pinned, o.listing = 0, &listing{place: slot{of: &s.snapshots}}
	s.snapshots.waiting.Store(1)
	check("its Keys needs no snapshot any more", false, waits)
	o.listing.place.taken = true
	check("its Keys has a snapshot", false, isCutOff)
}

// Ensure that a client that has taken bytes after a pause is not slow in a pause of 1.7 s, which a
// kernel may make between two reads, and that one that has taken none is.
func TestSlowReaderAfterAPause(t *testing.T) {
	for _, reads := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			conn, reader, told := paced()
			toldSlow := func() bool { return len(told) > 0 && !<-told }

			go conn.Write(make([]byte, 4*world.StreamSize))
			if reads {
				world.Pass(slowAfter - lookTime)
				io.ReadFull(reader, make([]byte, world.StreamSize))
			}

			world.Pass(1700 * time.Millisecond)
			slow := toldSlow()
			is.Equal(t, fmt.Sprint("reads: ", reads, ", slow in a pause of 1.7 s"), slow, !reads)

			world.Pass(3 * slowAfter)
			is.Equal(t, "slow in the end", toldSlow() || slow, true)

			conn.Close()
			synctest.Wait()
		})
	}
}

func TestSlowReaderOfProject0(t *testing.T)        { protocol.SlowReaderOfProject0(t, serveEmpty) }
func TestSlowReaderIsToldAtTheEnd(t *testing.T)    { protocol.SlowReaderIsToldAtTheEnd(t, serveEmpty) }
func TestSlowReaderIsCountedAtOnce(t *testing.T)   { protocol.SlowReaderIsCountedAtOnce(t, serveEmpty) }
func TestSlowReaderWithAck(t *testing.T)           { protocol.SlowReaderWithAck(t, serveEmpty) }
func TestSteadyReaderOnRealSocket(t *testing.T)    { protocol.SteadyReaderOnRealSocket(t, serveTCP(t)) }
func TestSteadyReaderOfAPausedServer(t *testing.T) { protocol.SteadyReaderOfAPausedServer(t, binary) }

// ---- client.go: the ends of a connection

// Ensure that a client gets its time after Quit even if the server stands still meanwhile.
func TestEndByQuitBesideLateTicks(t *testing.T) {
	inBubble(t, func(t *testing.T, n *fakeNet) {
		n.wrap = func(conn net.Conn) net.Conn {
			conn.(*world.Conn).Late = 2 * drainTime
			return conn
		}

		n.fill("k", strings.Repeat("v", kilo), 40)
		a := n.Dial(t)
		a.Send("Get:k\nQuit\n")
		world.Pass(4 * drainTime)
		a.SendSome("Ping\n") // on a connection that is closed, this would destroy the answer
		is.Equal(t, "lines that came", strings.Count(a.ReadAll(), "k:"), 40)
		a.Close()
	})
}

func TestEndByQuit(t *testing.T)      { protocol.EndByQuit(t, serveEmpty) }
func TestEndByHalfClose(t *testing.T) { protocol.EndByHalfClose(t, serveTCP(t)) }

func TestEndAnswersNothingMore(t *testing.T) {
	protocol.EndAnswersNothingMore(t, serveWith(func(s *keyValueServer) { s.maxLine = 20 }))
}

// Ensure that no reply is formatted once a Write has failed.
func TestEndFormatsNothingMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, _ := world.Pipe(world.StreamSize, world.StreamSize)
		c := newClient(1, conn, New(kvstore.NewMemory()))
		c.buffer = make(chan []byte, maxBufferSize)
		conn.Close()
		c.buffer <- []byte("too late")
		go c.writeToClient()
		synctest.Wait()

		long := &Query{queryType: get, key: "k", values: []string{strings.Repeat("v", 10*maxMessage)}}
		c.outbox.replyAll(long)
		is.Equal(t, "values that were not formatted", len(long.values), 1)
		close(c.buffer)
	})
}

// Ensure that a client that takes no byte is disconnected, but not before its time, and that one
// that takes a little is not, also under TLS.
func TestWriteTimeout(t *testing.T) {
	for _, config := range []*tls.Config{nil, serverConfig(t)} {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			n.fill("big", strings.Repeat("v", 1200), 1000)
			n.server.writeTimeout = time.Minute
			n.server.tls = config

			a, b := n.dialTLS(t), n.dialTLS(t)
			b.Ask("Ack", ":OK 0")
			a.Send("Get:big\n")
			b.Send("Get:big\n")

			world.Pass(time.Minute - 1)
			io.CopyN(io.Discard, b.R, 4*maxWrite)
			is.Equal(t, "clients just before the timeout", n.server.CountActive(), 2)

			world.Pass(1)
			io.CopyN(io.Discard, b.R, 10_000)
			world.Pass(time.Minute) // a may have taken a part of the unfinished Write
			is.Equal(t, "clients after the timeout", n.server.CountActive(), 1)
			is.In(t, "the log", n.log.Take(), "it took nothing for 1m0s (-write-timeout)")

			for range 10 { // less than one Write in a minute
				io.CopyN(io.Discard, b.R, 40_000)
				world.Pass(time.Minute - 1)
			}
			is.Equal(t, "clients when one accepts 40 kB a minute", n.server.CountActive(), 1)

			a.Close()
			b.Close()
		})
	}

	// A Write that went on after a pause has its time anew, and is ended as exactly as any.
	synctest.Test(t, func(t *testing.T) {
		conn, reader, told := paced()
		conn.server.writeTimeout = slowAfter * 3 / 2
		ended := make(chan error)
		go func() {
			_, err := conn.Write(make([]byte, 4*world.StreamSize))
			ended <- err
		}()
		is.Equal(t, "it takes bytes", <-told, false)
		io.CopyN(io.Discard, reader, world.StreamSize/2)
		is.Equal(t, "it takes bytes again", <-told, true)
		is.Within(t, slowAfter*3/2, slowAfter*3/2, func() { <-ended })
	})
}

// ---- query.go: the protocol

func TestConversations(t *testing.T) { protocol.Conversations(t, serveEmpty, helpLines) }

// Ensure that each request is in Help, in the README's table and in the conversations, has a
// counter in Stats, and is recognized with a typing error; and that each word of other programs is
// in the conversations.
func TestEveryRequest(t *testing.T) {
	var said strings.Builder
	for _, c := range protocol.All(helpLines) {
		said.WriteString("\n" + c.Send)
	}

	asked, stats := strings.ToLower(said.String()), fmt.Sprint(New(kvstore.NewMemory()).stats())
	for what := put; what <= quit; what++ {
		v := verbs[what]
		if v.name == "" || v.does == "" || v.form == "" {
			t.Fatalf("request %d has no line in verbs", what)
		}

		for where, has := range map[string]bool{
			"Help":               strings.Contains(strings.Join(helpLines, "\n"), v.form),
			"the README's table": strings.Contains(readme, "| `"+v.name),
			"conversations":      strings.Contains(asked, "\n"+strings.ToLower(v.name)),
			"Stats":              strings.Contains(stats, strings.ToLower(v.name)+"_requests_total "),
			"the hints":          strings.Contains(didYouMean(v.name+"x"), "did you mean "+v.name),
		} {
			if !has {
				t.Errorf("%s is not in %s", v.name, where)
			}
		}
	}

	for word := range dialects {
		is.In(t, "the conversations", asked, "\n"+word+" ")
	}
}

// Ensure that the hint for a line that is no request costs no more than the part of the line that
// it shows.
func TestHintsAreCheap(t *testing.T) {
	for _, piece := range []string{"x", "get a ", " ", "set:", ":\t"} {
		line := strings.Repeat(piece, 1<<20/len(piece))
		var q Query
		bytes := allocated(func() { q.parse(line) })
		is.Between(t, "bytes for "+q.value(), bytes, 0, 8<<10)
	}
}

func FuzzConversation(f *testing.F) {
	protocol.FuzzConversation(f, serveEmpty, helpLines, otherProtocol)
}

// otherProtocol returns what a client is answered whose first line is refused because it is of
// another protocol, "" if it is not, and whether its connection ends.
func otherProtocol(line string) (answer string, ends bool) {
	switch {
	case isHTTP(line):
		return badRequest, true
	case isRESP(line):
		return badRESP, true
	}
	return "", len(line) > testMaxLine && begun(line) == malformed
}

// ---- the whole server, simulated

// Ensure that the server keeps its promises whatever happens to it: see storetest/world.
func TestSimulation(t *testing.T) {
	t.Parallel()
	world.Run(t, world.Program{
		Log: func(w io.Writer, lines int) (log *slog.Logger, flush func()) {
			logs, done := &queuedLog{lines: make(chan logLine, lines)}, make(chan struct{})
			go func() {
				logs.writeLog(w, slog.New(slog.NewTextHandler(w, nil)))
				close(done)
			}()
			return slog.New(slog.NewTextHandler(logs, nil)), func() {
				close(logs.lines)
				<-done
			}
		},

		Start: func(l net.Listener, db kvstore.KVStore, with world.Settings) (world.Server, error) {
			s := New(db)
			s.log, s.tls, s.writeTimeout = with.Log, with.TLS, with.WriteTimeout
			s.maxLine, s.maxMessage, s.maxClients = with.MaxLine, with.MaxMessage, with.MaxClients
			s.budget.maxQueues, s.budget.limit = with.MaxQueues, with.MaxMemory
			s.handshakes = with.Handshakes
			s.budget.fewKeys, s.partKeys = with.FewKeys, with.FewKeys
			s.snapshots.slots = make(chan struct{}, with.Snapshots)

			s.budget.other.Store(with.Other - with.Pinned)
			s.budget.removed.Store(with.Pinned)
			s.budget.pinned.Store(with.Pinned)

			return simulated{s, with.Pinned}, s.serve(l)
		},
		TLS: serverConfig(t),
	})
}

// simulated is the server of a world.
type simulated struct {
	*keyValueServer
	pinned int64 // bytes, as if by others
}

func (s simulated) Lost() (replies int) { return int(s.lostReplies.Load()) }

func (s simulated) Queued() (bytes int64) { return s.budget.queued.Load() }

func (s simulated) Look() { getPage(s.watchHandler(""), "/healthz") }

func (s simulated) Left() (what []string) {
	for name, n := range map[string]int64{
		"bytes are still queued":  s.budget.queued.Load(),
		"bytes of lists are kept": s.budget.keyLists.Load(),
		"bytes are still pinned":  s.budget.pinned.Load() - s.pinned,
		"bytes of input are kept": s.budget.inputs.Load() + s.budget.granted.Load() + s.budget.waitingLines.Load(),
		"slots are taken": int64(len(s.cores.slots) + len(s.snapshots.slots) +
			len(s.budget.anyLine.slots) + len(s.budget.freeing.slots)),
		"clients have not left": int64(s.welcomed - s.departed),
		"queues of Takes stay":  int64(len(s.takes.of)),
		"waits are counted": s.cores.waiting.Load() + s.snapshots.waiting.Load() +
			s.budget.anyLine.waiting.Load() + s.budget.freeing.waiting.Load(),
	} {
		if n != 0 {
			what = append(what, fmt.Sprint(n, " ", name))
		}
	}
	return what
}

// ---- helpers

// TestMain lets the test binary be the server: a test that needs a process of its own starts this
// binary again.
func TestMain(m *testing.M) {
	if os.Getenv("KVSERVER_TEST_MAIN") != "" {
		main()
		return
	}

	// Parallel tests mostly wait for time to pass, so more of them run than there are cores. Tests
	// that measure memory collect garbage themselves.
	flag.Parse()
	flag.Set("test.parallel", "6")
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}

const testMaxLine = protocol.MaxLine

// testMaxMessage makes a client's whole queue 4 MiB instead of 64.
const testMaxMessage = 8 << 10

const kilo = 1000

// inBubble runs test in fake time with an empty server on a fake network. Clients that are left at
// the end hang up, and must have read all that they were sent.
func inBubble(t *testing.T, test func(t *testing.T, n *fakeNet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		defer n.server.Close()
		test(t, n)
		n.HangUp()
	})
}

// serveEmpty starts an empty server for a test of package protocol.
func serveEmpty(t *testing.T) *protocol.Net { return serveOn(t, kvstore.NewMemory()) }

// serveOn starts a server on a store for a test of package protocol.
func serveOn(t *testing.T, db kvstore.Store) *protocol.Net {
	n := newFakeNet()
	n.server.db = db
	n.start(t)
	t.Cleanup(n.server.Close)
	return n.Net
}

// serveWith returns a start of an empty server, after set has changed it, for a test of package
// protocol.
func serveWith(set func(s *keyValueServer)) protocol.Start {
	return func(t *testing.T) *protocol.Net {
		n := newFakeNet()
		set(n.server)
		t.Cleanup(n.server.Close)
		return n.Net
	}
}

// serveFull is serveOn for a server whose memory is full.
func serveFull(t *testing.T, db kvstore.Store) *protocol.Net {
	return serveWith(func(s *keyValueServer) {
		s.db = db
		s.budget.limitTo(1<<30, 0)
		s.budget.other.Store(s.budget.forData())
	})(t)
}

// wantTodo wants err to be a problem, and these words in what to do about it.
func wantTodo(t testing.TB, err error, words string) {
	t.Helper()
	if todo := storage.Advice(err); !strings.Contains(todo, words) {
		t.Errorf("%v: to do is %q, want %q in it", err, todo, words)
	}
}

// fakeNet is the network of one server: a listener, and dial to reach it.
type fakeNet struct {
	*world.Listener
	*protocol.Net
	server *keyValueServer
	log    command.Screen // of the server

	wrap func(net.Conn) net.Conn // makes the server's side of a connection
	// called by the server's connections when a read deadline in the future is set
	beforeDeadline func()
}

// fill puts value under key so many times, before the server starts.
func (n *fakeNet) fill(key, value string, times int) {
	for range times {
		n.server.db.Put(key, value)
	}
}

// fillKeys puts value under so many keys, prefix and a number each.
func (n *fakeNet) fillKeys(prefix string, keys int, value string) {
	for i := range keys {
		n.fill(fmt.Sprint(prefix, i), value, 1)
	}
}

// limit sets -max-memory and -max-line, and returns the budget.
func (n *fakeNet) limit(memory int64, line int) *budget {
	n.server.maxLine = line
	n.server.budget.limitTo(memory, 0)
	return &n.server.budget
}

// inputs returns how many bytes all clients' inputs take, while all of them wait.
func (n *fakeNet) inputs() (held int64) {
	for _, c := range n.server.clients {
		held += int64(len(c.in.buf) + len(c.in.lent) + cap(c.in.queries)*querySize)
		c.paced.Conn.(*world.Conn).Unread() // orders what c does then after this
	}
	n.server.budget.inputs.Add(0)
	return held
}

// start starts the server unless it has been started.
func (n *fakeNet) start(t testing.TB) {
	if err := n.server.serve(n); err != nil && err != errStarted {
		t.Fatal(err)
	}
}

// dialTLS connects, over TLS if the server speaks that.
func (n *fakeNet) dialTLS(t *testing.T) *protocol.Client {
	c := n.Dial(t)
	if n.server.tls != nil {
		c.OverTLS()
	}
	return c
}

// dialMute connects a client in Ack mode that reads nothing, and for whose replies there is no
// room.
func (n *fakeNet) dialMute(t *testing.T) *protocol.Client {
	n.fill("big", strings.Repeat("v", kilo), 900)
	c := n.DialAck(t)
	for _, request := range []string{"Get:big\n", "Ping\n", "Ping\n"} {
		c.Send(request)
		world.Pass(lookTime)
	}
	return c
}

// connect connects to the server, which it starts if necessary.
func (n *fakeNet) connect(t testing.TB) world.HalfConn {
	n.start(t)
	ours, theirs := world.Pipe(world.StreamSize, world.StreamSize)
	theirs.BeforeDeadline = n.beforeDeadline
	if n.wrap != nil {
		n.Connect(n.wrap(theirs))
	} else {
		n.Connect(theirs)
	}
	return ours
}

func closeClients(clients []*protocol.Client) {
	for _, c := range clients {
		c.Close()
	}
}

func newFakeNet() *fakeNet {
	n := &fakeNet{Listener: world.NewListener(), server: New(kvstore.NewMemory())}
	n.Net = protocol.NewNet(n.connect)
	n.server.maxLine, n.server.maxMessage, n.server.version = testMaxLine, testMaxMessage, "test"
	n.server.log = slog.New(slog.NewTextHandler(&n.log, nil))
	return n
}

// serveTCP serves an empty store on a real port until the test ends.
func serveTCP(t testing.TB) (addr string) {
	t.Helper()
	return startTCP(t, New(kvstore.NewMemory()))
}

// startTCP starts s on a real port until the test ends.
func startTCP(t testing.TB, s *keyValueServer) (addr string) {
	t.Helper()
	is.OK(t, s.Start(0))
	t.Cleanup(s.Close)
	return s.listener.Addr().String()
}

// serverConfig returns the TLS configuration of a server.
func serverConfig(t *testing.T) *tls.Config {
	dir := command.Certificates(t, "server")
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key"))
	is.OK(t, err)
	return &tls.Config{Certificates: []tls.Certificate{pair}}
}

// getPage asks handler for a page.
func getPage(handler http.Handler, path string) (code int, body string) {
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest("GET", "http://localhost"+path, nil))
	return answer.Code, answer.Body.String()
}

// wantPage asks handler for a page, and wants it to have this code and these words.
func wantPage(t *testing.T, handler http.Handler, path string, wantCode int, words ...string) (body string) {
	t.Helper()
	code, body := getPage(handler, path)
	is.Equal(t, path, code, wantCode)
	is.In(t, path, body, words...)
	return body
}

// unwritten returns a client of s whose messages nobody writes.
func unwritten(s *keyValueServer) *Client {
	c := newClient(1, new(world.Conn), s)
	c.buffer = make(chan []byte, maxBufferSize)
	return c
}

// allocated returns how many bytes do allocates, with all that runs beside it.
func allocated(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// binary returns a command that runs the server as a process of its own.
var binary protocol.Program = func(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "KVSERVER_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// inProcess is kvserver -c in this process.
var inProcess = command.Talker{
	Talk: func(c command.Talk) (good bool, through int, err error) {
		t := newTalker(config{requests: c.Requests, ping: c.Ping, stop: c.Stop, timeout: c.Timeout},
			c.Errs)
		t.conn, t.in, t.out, t.isTyped = c.Conn, c.In, c.Out, c.IsTyped
		good, err = talk(t)
		return good, t.answered, err
	},
	Dial: func(addr string) (net.Conn, error) {
		t := newTalker(config{addr: addr}, io.Discard)
		err := t.dial()
		return t.conn, err
	},
	Gone: errGone, NoPlace: errNoPlace, Output: errOutput, Quiet: errQuiet, Silent: errSilent,
	Stopped: errStopped, Stranger: errStranger, Unanswered: errUnanswered, Unasked: errUnasked, UTF16: errUTF16,
}

// converseWith runs kvserver -c against the server.
func converseWith(t *testing.T, n *fakeNet, in string,
	requests ...string) (out, errs string, good bool, err error) {
	t.Helper()
	var o, e strings.Builder
	c := n.Dial(t)
	good, err = talk(&talker{conn: c.Conn, config: config{requests: requests},
		in: strings.NewReader(in), out: command.Closing(&o), errs: &e})
	c.Close()
	return o.String(), e.String(), good, err
}

// talk has the conversation from its beginning.
func talk(t *talker) (good bool, err error) {
	if err = t.greet(); err != nil {
		return false, err
	}
	err = t.converse()
	if err == errTold {
		return false, nil
	}
	return err == nil, err
}
