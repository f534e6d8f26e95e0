package world

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// process is the server from its start to its end, whatever ends it.
type process struct {
	*world
	listener *Listener
	server   Server
	settings Settings
	dir      *storetest.Dir
	closing  chan struct{} // closed when Close is called
	gone     chan struct{} // closed when the process has ended
	killed   chan struct{} // closed when it was killed
	wires    sync.WaitGroup
	tidying  chan struct{} // held while removed files are not back yet, and from the end on
	mute     bool          // many clients do not read, and there is room for all that they write
	heavy    time.Duration // how long a Remove from a long list takes; 0: there is no such list
	late     time.Duration // the deadlines of its connections pass this much too late

	mu      sync.Mutex // guards the fields below
	calls   int        // number of I/O calls so far
	plan    plan
	after   *storetest.Dir // what it left when it was killed; nil: it was not
	power   bool           // it was killed by a power failure
	failed  bool           // the disk has failed
	since   time.Time      // when the disk failed
	moved   time.Time      // when its directory was moved; zero: never
	stalled time.Duration  // how long the disk and the process have hung in all
	conns   []*Conn        // the server's sides of its connections
	taken   map[*Conn]int  // bytes that it had read from each when Close was called
	paused  chan struct{}  // closed when the process goes on; nil: it runs
	told    int            // number of dropped replies that clients know of
	unknown int            // number of clients that ended without knowing
}

// plan is what will happen to the I/O calls of a process. killAt, failAt and stallAt are numbers of
// calls; 0: never.
type plan struct {
	killAt, failAt, stallAt int
	kind                    string // killAt waits for a call of this kind; "": any
	behind                  int    // the kill comes so many calls after that one
	power                   bool   // the kill is a power failure
	failure                 error
	stall                   time.Duration // how long the call stallAt takes
	sync                    time.Duration // how long each Sync takes
}

// draw plans a process's life.
func (p *process) draw(r *rand.Rand) {
	// With -fsync never a power failure may lose everything, and nothing would be left to judge.
	p.plan.power = p.fsync != durable.FsyncNever && Chance(r, 2)

	// Low numbers hit the start, and higher ones the work after it.
	at := func() int { return 1 + r.IntN(pick(r, 30, 300, 3000)) }

	if Chance(r, 2) {
		p.plan.killAt, p.plan.kind = at(), pick(r, "", "sync")
	}

	// A few calls after a rename a file has its new name, but nothing uses it yet.
	if Chance(r, 4) {
		p.plan.killAt, p.plan.kind, p.plan.behind = 1+r.IntN(100), "rename", 1+r.IntN(6)
	}

	// An error, or a long call.
	if Chance(r, 4) {
		p.plan.failAt, p.plan.failure = at(), pick[error](r, syscall.EIO, syscall.ENOSPC,
			syscall.EMFILE)
	}
	if Chance(r, 4) {
		p.plan.stallAt, p.plan.stall = at(), Between(r, time.Millisecond, 4*time.Second)
	}

	// With a slow disk, batches wait for clients that are about to send their next request.
	if Chance(r, 3) {
		p.plan.sync = Between(r, time.Millisecond, 20*time.Millisecond)
	}
}

// before decides what happens to an I/O call of the process.
func (p *process) before(c storetest.Call) error {
	p.gate()

	// What was planned for this call.
	p.mu.Lock()
	p.calls++
	plan, n := p.plan, p.calls
	fails := plan.failAt > 0 && n >= plan.failAt && c.MayFail(plan.failure)
	if fails {
		p.plan.failAt, p.failed, p.since = 0, true, time.Now()
	}

	// The kill may come some calls after the one that it waited for.
	kills := plan.killAt > 0 && n >= plan.killAt && (plan.kind == "" || plan.kind == c.What)
	if kills && plan.behind > 0 {
		p.plan.killAt, p.plan.kind, p.plan.behind = n+plan.behind, "", 0
		kills = false
	}

	// The stall counts before it begins, so that goroutines that wait meanwhile allow for it.
	if n == plan.stallAt {
		p.stalled += plan.stall
	}
	p.mu.Unlock()

	// First the call takes its time; then it may be the last one.
	if n == plan.stallAt {
		p.tell("%s %s takes %v", c.What, c.Name, plan.stall)
		wait(plan.stall)
	} else if c.What == "sync" {
		wait(plan.sync)
	}
	if kills {
		p.kill(plan.power, fmt.Sprintf("before call %d, %s %s", n, c.What, c.Name))
	}

	// A call of a dead process has no effect.
	if isClosed(p.killed) {
		return errors.New("the process was killed")
	}

	if fails {
		p.tell("%s %s fails: %v", c.What, c.Name, plan.failure)
		return &os.PathError{Op: c.What, Path: c.Name, Err: plan.failure}
	}
	return nil
}

// gate waits while the process stands still.
func (p *process) gate() {
	p.mu.Lock()
	paused := p.paused
	p.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

// kill ends the process in the middle of its work, and with power the machine as well. Nothing that
// its goroutines do afterwards has an effect.
func (p *process) kill(power bool, when string) {
	p.mu.Lock()
	defer p.mu.Unlock()

	// A process dies once, and what it left then must stay unchanged.
	if p.after != nil {
		return
	}

	close(p.killed)

	// Connections are closed before the copy is made, so that no answer is newer than the copy.
	for _, c := range p.conns {
		c.Close()
	}

	p.power = power
	if power {
		p.after = p.dir.Crash(rand.New(rand.NewPCG(p.seed, uint64(p.calls))))
	} else {
		p.after = p.dir.Kill()
	}

	p.tell("%s %s", map[bool]string{false: "kill -9", true: "power failure"}[power], when)

	p.expose()
	if power {
		p.forget()
	}
}

// expose notes what a power failure may lose from now on. The caller has locked mu.
func (p *process) expose() {
	// Nothing may have been synced since the disk failed.
	end := time.Now()
	if p.failed {
		end = p.since
	}

	// If an earlier process has left data to the kernel already, its time stays.
	if p.exposed.IsZero() {
		p.exposed = end.Add(-2*p.fsync - p.stalled - time.Millisecond)
	}
}

// slack returns how long the disk and the process itself have hung, or may hang.
func (p *process) slack() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stalled + p.plan.stall + 3*p.late // deadlines of ticks in a row
}

// isDisturbed reports whether the process has died, or cannot keep promises that need a sound disk.
func (p *process) isDisturbed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed || p.after != nil
}

// isVain reports whether an answer that comes now may be lost, because it was on its way when the
// machine failed.
func (p *process) isVain() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.after != nil && p.power && p.fsync != durable.FsyncAlways
}

// live is the life of a process, and the judgement of it. If dies is true, it ends during its
// start.
func (w *world) live(dies bool) {
	r := w.random
	rotten, mend := w.rot()
	p := &process{world: w, dir: w.dir, closing: make(chan struct{}), gone: make(chan struct{}),
		killed: make(chan struct{}), tidying: make(chan struct{}, 1), taken: map[*Conn]int{}}

	p.draw(r)
	p.drawRoom(r)
	if Chance(r, 5) {
		p.late = Between(r, 0, 2*time.Second)
	}

	// A store that is rotten gets no other fault, so that only the rot explains a refusal.
	switch {
	case rotten:
		p.plan = plan{}
	case dies:
		p.plan.killAt = pick(r, 0, 0, 1+r.IntN(40))
	}

	// Its log is read slowly, or its reader has gone.
	log, flush := w.program.Log(&slowLog{p, pick(r, 0, 0, time.Second, time.Minute), Chance(r, 5)},
		pick(r, 1, 10, 1000))
	defer flush()

	// The start may be refused, or may be killed.
	w.dir.Before = p.before
	wasQuiet := w.quiet
	w.quiet = false

	db, err := durable.Open(context.Background(), p.dir, durable.Options{Fsync: w.fsync, Log: log})

	// A client that has seen recovered data relies on it, even if the process dies at once.
	if err == nil && dies {
		p.look(db)
		p.kill(p.plan.power, "once it has started")
	}

	if err != nil || isClosed(p.killed) {
		p.startFailed(db, err, rotten, mend)

		// A start that refuses the store has written nothing to it.
		w.quiet = wasQuiet && rotten
		return
	}

	// From here on all data from before is on disk.
	w.exposed = time.Time{}
	if p.start(db, log) {
		p.serve(db)
	}
}

// serve is the life of a process that has started, until its end.
func (p *process) serve(db *durable.Store) {
	r := p.random
	var clients sync.WaitGroup
	some := kinds
	if p.mute {
		some = slices.DeleteFunc(slices.Clone(kinds), func(k kind) bool { return !k.little })
	}
	for range 2 + r.IntN(7) {
		p.visit(&clients, pick(r, some...))
	}

	// These kinds only make sense for some servers.
	if p.settings.TLS != nil {
		p.visit(&clients, kind{"says nothing", (*visitor).silence, false, true})
	}
	if p.settings.Other > 0 {
		p.visit(&clients, kind{"stops reading", (*visitor).stop, true, true})
	}
	if p.heavy > 0 {
		p.visit(&clients, kind{"removes", (*visitor).removeMany, true, true})
	}

	clients.Go(p.operate)
	p.end(db, &clients)

	// All goroutines of the process end before its remains are judged.
	clients.Wait()
	p.wires.Wait()
	p.checkLeft()
}

// drawRoom limits the room on the disk, for a fifth of processes.
func (p *process) drawRoom(r *rand.Rand) {
	d := p.dir

	// Without a store a full disk would only prevent its creation.
	if d.Room = 0; !Chance(r, 5) || d.Names["STORE"] == nil {
		return
	}

	for _, f := range d.Names {
		d.Room += len(f.Data)
	}
	d.Room += pick(r, 0, 3*kilo, 50*kilo)
	p.tell("the disk has %d bytes", d.Room)
}

// start has a server serve db, and reports whether it does.
func (p *process) start(db *durable.Store, log *slog.Logger) (good bool) {
	r := p.random

	// Limits are low in some worlds, so that clients reach them.
	s := Settings{Log: log, MaxLine: maxLine, MaxMessage: pick(r, 500, 4*kilo, 8<<10),
		MaxClients: pick(r, 5, 100, 100), MaxQueues: 1 << 30, FewKeys: pick(r, 5, 1000),
		Snapshots: pick(r, 1, 4), Handshakes: pick(r, 3, 10, 1000)}
	if Chance(r, 3) {
		s.MaxQueues = int64(pick(r, 2*kilo, 100*kilo))
	}

	// The memory may become full, or clients that do not read must not fill it.
	switch r.IntN(6) {
	case 0:
		s.MaxMemory = int64(pick(r, 400*kilo, 4000*kilo))
		if Chance(r, 2) {
			// Small messages, so that replies wait though all queues together are not full.
			s.Other, s.MaxMessage = s.MaxMemory*23/32, 500
			s.Pinned = s.Other
		}
	case 1:
		// Nearly all memory for data is taken, and queues could take more than the rest.
		p.mute, s.MaxMemory = true, 8000*kilo
		s.Other = s.MaxMemory*3/4 - db.Footprint() - 900*kilo
	}

	s.WriteTimeout = pick(r, 0, 10*time.Second, 5*time.Minute)
	if s.MaxMemory == 0 && Chance(r, 6) { // so little memory has room for one handshake at a time
		s.TLS = p.program.TLS
	}

	// The first calls of Accept may fail.
	p.listener, p.settings = NewListener(), s
	p.listener.Failures = pick(r, 0, 0, 5)

	// A store may have long lists, in which a search takes a while.
	var store kvstore.KVStore = db
	if Chance(r, 5) {
		p.heavy = Between(r, time.Millisecond, 2*time.Millisecond)
		store = heavyStore{db, p.heavy}
	}

	var err error
	if p.server, err = p.program.Start(p.listener, store, s); err != nil {
		p.fail("a start: %v", err)
		db.Close()
		return false
	}

	p.tell("serves: at most %d clients, messages of %d bytes, %d bytes of queues; memory %d, "+
		"mute %v, write timeout %v, TLS %v", s.MaxClients, s.MaxMessage, s.MaxQueues, s.MaxMemory,
		p.mute, s.WriteTimeout, s.TLS != nil)
	return true
}

// heavyStore is a store in which a Remove from some keys takes a while, as from a long list.
type heavyStore struct {
	*durable.Store
	takes time.Duration
}

func (h heavyStore) Remove(key, value string) bool {
	if strings.HasPrefix(key, "heavy") {
		wait(h.takes)
	}
	return h.Store.Remove(key, value)
}

// mayRefuse reports whether there may be no room for a write.
func (p *process) mayRefuse() bool { return p.settings.MaxMemory > 0 && !p.mute || p.dir.Room > 0 }

// checkQueues wants that all queues together stay within their limit, plus a little for each
// client.
func (p *process) checkQueues() {
	most := p.settings.MaxQueues
	if m := p.settings.MaxMemory; m > 0 {
		most = min(most, m/8)
	}
	most += most/4 + 64*kilo*int64(p.server.CountActive())
	if queued := p.server.Queued(); queued > most {
		p.fail("%d bytes are queued, want at most %d", queued, most)
	}
}

// startFailed checks a start that has failed or was killed: it may fail only if the disk has.
func (p *process) startFailed(db *durable.Store, err error, rotten bool, mend func()) {
	w := p.world
	var damage *storage.DamageError

	switch {
	// A killed start may have opened the store all the same; its files must not count as left open.
	case isClosed(p.killed):
		if err == nil {
			db.Close()
		}
		w.dir = p.after

	// A check must find the damage because of which the start was refused.
	case rotten && (errors.As(err, &damage) || errors.Is(err, storage.ErrNotOurs)):
		w.tell("refused: %v", err)
		w.dir.Before = nil
		if r, err := durable.Check(w.dir); err == nil && !r.Damaged {
			w.fail("a check finds nothing: %v", r.Lines)
		}
		if _, db := w.repair(); db != nil {
			w.knownAll(db) // no value that was not sent
			db.Close()
		}
		mend()
	case p.failed:
		w.tell("does not start: %v", err)
		w.dir = p.dir.Kill()
	default:
		w.fail("a start refuses what was left: %v", err)
	}

	// However a start ends, it leaves no file open.
	if p.dir.Handles != 0 {
		w.fail("%d open files are left of a start", p.dir.Handles)
	}
}

// end lets the process live for a while, and ends it.
func (p *process) end(db *durable.Store, clients *sync.WaitGroup) {
	how := pick(p.random, "stop", "stop", "stop when quiet", "kill", "kill when quiet", "power",
		"power when quiet")

	// With -fsync never a power failure could lose everything.
	if p.fsync == durable.FsyncNever && strings.HasPrefix(how, "power") {
		how = "kill"
	}

	quiet := strings.HasSuffix(how, "quiet")
	p.awaitEnd(quiet, clients)
	quiet = quiet && !isClosed(p.killed) // or nothing may vouch for the last frames

	// Wait until files that somebody has removed are back.
	p.tidying <- struct{}{}
	switch {
	case strings.HasPrefix(how, "kill"):
		p.kill(false, "")
	case strings.HasPrefix(how, "power"):
		p.kill(true, "")
	}
	p.quiet = quiet && p.fsync != durable.FsyncNever

	// The bytes that it has read by now are those that it must answer: see checkDebts.
	p.mu.Lock()
	for _, c := range p.conns {
		p.taken[c] = c.taken()
	}
	p.mu.Unlock()

	closes := time.Now()
	close(p.closing)
	p.server.Close()

	// Close gives each client a second, counted in ten ticks, each of which may come late.
	if took := time.Since(closes); took > closeTime+p.slack()+10*p.late {
		p.fail("Close takes %v", took)
	}

	// The server is the only user of the store, so the store can be closed now.
	err := db.Close()
	close(p.gone)
	p.leave(err)
}

// awaitEnd waits for a random time; if quiet, until all clients have finished on a sound disk.
func (p *process) awaitEnd(quiet bool, clients *sync.WaitGroup) {
	r := p.random
	if quiet {
		p.mu.Lock()
		p.plan = plan{}
		p.mu.Unlock()

		clients.Wait()

		// By then two fsyncs a second apart are over, so all data is on disk.
		wait(pick(r, 3*time.Second, 3*time.Second, 3*time.Minute))
		return
	}

	select {
	case <-time.After(pick(r, Between(r, 0, 100*time.Millisecond), Between(r, 0, 3*time.Second),
		Between(r, 0, time.Minute))):
	case <-p.killed:
	case err := <-p.server.Failed():
		p.tell("the store has failed: %v", err)

		// The store may fail only if its disk has failed, or the process was killed.
		if !p.isDisturbed() {
			p.fail("and nothing had happened to it: %v", err)
		}
	}
}

// leave leaves the directory to the next process. closed is the result of the store's Close.
func (p *process) leave(closed error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan = plan{} // copies of the store may still be in progress

	if p.after != nil {
		p.world.dir = p.after
		return
	}

	p.tell("stopped: %v", closed)
	if closed != nil && !p.failed {
		p.fail("a stop: %v", closed)
	} else if p.failed {
		p.expose()
	}

	// If the disk had failed, a power failure may still take what is left to the kernel.
	p.quiet = closed == nil && !p.failed
	p.world.dir = p.dir.Kill()
	if p.failed && Chance(p.random, 2) && p.fsync != durable.FsyncNever {
		p.tell("then a power failure")
		p.after, p.power = p.dir.Crash(p.random), true
		p.world.dir = p.after
		p.forget()
	}
}
