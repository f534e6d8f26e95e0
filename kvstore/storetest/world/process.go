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

// process is the server from its start to its end, however that comes.
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
	tidying  chan struct{} // taken by what removes files until they are back, and by the end
	mute     bool          // many of its clients do not read, and all that they write has room
	heavy    time.Duration // what a Remove from a long list takes; 0: there is none
	late     time.Duration // by which its connections' deadlines pass too late

	mu      sync.Mutex // guards what is below
	calls   int        // I/O calls
	plan    plan
	after   *storetest.Dir // what it left, when it was killed
	power   bool           // by a power failure
	failed  bool           // the disk has
	since   time.Time      // then
	moved   time.Time      // its directory was; zero: it was not
	stalled time.Duration  // of the disk and the process, in all
	conns   []*Conn        // the server's sides
	taken   map[*Conn]int  // bytes that it had read from each when Close was called
	paused  chan struct{}  // closed when the process goes on; nil: it runs
	told    int            // replies that clients know were dropped
	unknown int            // clients that ended without knowing
}

// plan is what will happen to the I/O calls of a process; 0: nothing.
type plan struct {
	killAt, failAt, stallAt int
	kind                    string // of call that killAt waits for; "": any
	behind                  int    // so many calls behind that one it comes
	power                   bool   // killAt is a power failure
	failure                 error
	stall                   time.Duration
	sync                    time.Duration // that each takes
}

// draw plans a process's life.
func (p *process) draw(r *rand.Rand) {
	// With -fsync never a power failure may cost everything, and nothing would be left to judge.
	p.plan.power = p.fsync != durable.FsyncNever && Chance(r, 2)

	// Low numbers hit a start, and higher ones the work behind it.
	at := func() int { return 1 + r.IntN(Pick(r, 30, 300, 3000)) }

	if Chance(r, 2) {
		p.plan.killAt, p.plan.kind = at(), Pick(r, "", "sync")
	}

	// A few calls behind a rename a file has its new name, and nothing uses it yet.
	if Chance(r, 4) {
		p.plan.killAt, p.plan.kind, p.plan.behind = 1+r.IntN(100), "rename", 1+r.IntN(6)
	}

	// An error, or a long call.
	if Chance(r, 4) {
		p.plan.failAt, p.plan.failure = at(), Pick[error](r, syscall.EIO, syscall.ENOSPC,
			syscall.EMFILE)
	}
	if Chance(r, 4) {
		p.plan.stallAt, p.plan.stall = at(), Between(r, time.Millisecond, 4*time.Second)
	}

	// A slow disk has batches wait for those who come back.
	if Chance(r, 3) {
		p.plan.sync = Between(r, time.Millisecond, 20*time.Millisecond)
	}
}

// before is what happens to an I/O call of the process.
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

	// The end may come some calls behind the one that was waited for.
	kills := plan.killAt > 0 && n >= plan.killAt && (plan.kind == "" || plan.kind == c.What)
	if kills && plan.behind > 0 {
		p.plan.killAt, p.plan.kind, p.plan.behind = n+plan.behind, "", 0
		kills = false
	}

	// The stall counts before it comes, so that those who wait meanwhile allow for it.
	if n == plan.stallAt {
		p.stalled += plan.stall
	}
	p.mu.Unlock()

	// First it takes its time, and may be the last.
	if n == plan.stallAt {
		p.tell("%s %s takes %v", c.What, c.Name, plan.stall)
		Wait(plan.stall)
	} else if c.What == "sync" {
		Wait(plan.sync)
	}
	if kills {
		p.kill(plan.power, fmt.Sprintf("before call %d, %s %s", n, c.What, c.Name))
	}

	// What a dead process still asks for has no effect.
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

// kill ends the process in the middle of things, and the machine with it if power.
// What its goroutines do from then on reaches nobody.
func (p *process) kill(power bool, when string) {
	p.mu.Lock()
	defer p.mu.Unlock()

	// A process dies once: what it left then is not touched any more.
	if p.after != nil {
		return
	}

	close(p.killed)

	// Connections end before the copy is made, so that nothing is answered that is not in it.
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

// expose notes what a power failure may cost from now on. The caller has mu.
func (p *process) expose() {
	// Once the disk has failed nothing more may have been synced.
	end := time.Now()
	if p.failed {
		end = p.since
	}

	// A process before this one may have left more to the kernel: then its time stands.
	if p.exposed.IsZero() {
		p.exposed = end.Add(-2*p.fsync - p.stalled - time.Millisecond)
	}
}

// slack is how long the disk and the process itself have stood still, or may.
func (p *process) slack() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stalled + p.plan.stall + 3*p.late // of ticks in a row
}

// isDisturbed tells whether the process cannot keep promises that need a sound disk, or
// its life.
func (p *process) isDisturbed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed || p.after != nil
}

// isVain tells whether what is answered now, by bytes that were on their way when the
// machine failed, may be lost.
func (p *process) isVain() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.after != nil && p.power && p.fsync != durable.FsyncAlways
}

// live is a process's life, and the judgement of how it went. It is a short one if it dies in its
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

	// A store that is rotten gets no other fault, so that one alone explains the refusal.
	switch {
	case rotten:
		p.plan = plan{}
	case dies:
		p.plan.killAt = Pick(r, 0, 0, 1+r.IntN(40))
	}

	// Its log is read slowly, or by nobody.
	log, flush := w.program.Log(&slowLog{p, Pick(r, 0, 0, time.Second, time.Minute), Chance(r, 5)},
		Pick(r, 1, 10, 1000))
	defer flush()

	// A start may be refused, or be its end.
	w.dir.Before = p.before
	wasQuiet := w.quiet
	w.quiet = false

	db, err := durable.Open(context.Background(), p.dir, durable.Options{Fsync: w.fsync, Log: log})

	// A client that has seen what was recovered counts on it, even if the process dies at once.
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

	// From here on all that was there is on disk.
	w.exposed = time.Time{}
	if p.start(db, log) {
		p.serve(db)
	}
}

// serve is the life of a process that serves, until its end.
func (p *process) serve(db *durable.Store) {
	r := p.random
	var clients sync.WaitGroup
	some := kinds
	if p.mute {
		some = slices.DeleteFunc(slices.Clone(kinds), func(k kind) bool { return !k.little })
	}
	for range 2 + r.IntN(7) {
		p.visit(&clients, Pick(r, some...))
	}

	// These are of no use to other servers.
	if p.settings.TLS != nil {
		p.visit(&clients, kind{"says nothing", (*visitor).silence, false, true})
	}
	if p.heavy > 0 {
		p.visit(&clients, kind{"removes", (*visitor).removeMany, true, true})
	}

	clients.Go(p.operate)
	p.end(db, &clients)

	// All that belongs to the process ends before what it leaves is judged.
	clients.Wait()
	p.wires.Wait()
	p.checkLeft()
}

// drawRoom gives the disk of a store an end, in a fifth of cases.
func (p *process) drawRoom(r *rand.Rand) {
	d := p.dir

	// Before there is a store a full disk would only keep it from being made.
	if d.Room = 0; !Chance(r, 5) || d.Names["STORE"] == nil {
		return
	}

	for _, f := range d.Names {
		d.Room += len(f.Data)
	}
	d.Room += Pick(r, 0, 3*kilo, 50*kilo)
	p.tell("the disk has %d bytes", d.Room)
}

// start has a server serve db, and tells whether it does.
func (p *process) start(db *durable.Store, log *slog.Logger) (good bool) {
	r := p.random

	// Limits are low now and then, so that clients meet them.
	s := Settings{Log: log, MaxLine: maxLine, MaxMessage: Pick(r, 500, 4*kilo, 8<<10),
		MaxClients: Pick(r, 5, 100, 100), MaxQueues: 1 << 30, FewKeys: Pick(r, 5, 1000),
		Snapshots: Pick(r, 1, 4), Handshakes: Pick(r, 3, 1000)}
	if Chance(r, 3) {
		s.MaxQueues = int64(Pick(r, 2*kilo, 100*kilo))
	}

	// The memory may become full, or mute clients must not make it so.
	switch r.IntN(6) {
	case 0:
		s.MaxMemory = int64(Pick(r, 400*kilo, 4000*kilo))
		s.Other = Pick(r, 0, s.MaxMemory*5/8)
	case 1:
		// Nearly all that there is for data is taken, and queues may take more than is left of it.
		p.mute, s.MaxMemory = true, 8000*kilo
		s.Other = s.MaxMemory*3/4 - db.Footprint() - 900*kilo
	}

	s.WriteTimeout = Pick(r, 0, 10*time.Second, 5*time.Minute)
	if Chance(r, 6) {
		s.TLS = p.program.TLS
	}

	// Accept may fail at first.
	p.listener, p.settings = NewListener(), s
	p.listener.Failures = Pick(r, 0, 0, 5)

	// A store may have long lists, in which a search takes its time.
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

// heavyStore is a store in which a Remove from some keys takes its time, as one from a long list does.
type heavyStore struct {
	*durable.Store
	takes time.Duration
}

func (h heavyStore) Remove(key, value string) bool {
	if strings.HasPrefix(key, "heavy") {
		Wait(h.takes)
	}
	return h.Store.Remove(key, value)
}

// mayRefuse tells whether there may be no room for a write.
func (p *process) mayRefuse() bool { return p.settings.MaxMemory > 0 && !p.mute || p.dir.Room > 0 }

// checkQueues wants that all queues together take what they may, and a little for each client.
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

// startFailed looks at a start that has failed, which it may where the disk has.
func (p *process) startFailed(db *durable.Store, err error, rotten bool, mend func()) {
	w := p.world
	var damage *storage.DamageError

	switch {
	// It may have opened the store all the same, whose files would be taken for left open.
	case isClosed(p.killed):
		if err == nil {
			db.Close()
		}
		w.dir = p.after

	// A check must find what the start has refused.
	case rotten && (errors.As(err, &damage) || errors.Is(err, storage.ErrNotOurs)):
		w.tell("refused: %v", err)
		w.dir.Before = nil
		if r, err := durable.Check(w.dir); err == nil && !r.Damaged {
			w.fail("a check finds nothing: %v", r.Lines)
		}
		if _, db := w.repair(); db != nil {
			w.knownAll(db) // it shows nothing that was not sent
			db.Close()
		}
		mend()
	case p.failed:
		w.tell("does not start: %v", err)
		w.dir = p.dir.Kill()
	default:
		w.fail("a start refuses what was left: %v", err)
	}

	// However a start ends, it keeps no file open.
	if p.dir.Handles != 0 {
		w.fail("%d open files are left of a start", p.dir.Handles)
	}
}

// end lets the process live for a while, and ends it.
func (p *process) end(db *durable.Store, clients *sync.WaitGroup) {
	how := Pick(p.random, "stop", "stop", "stop when quiet", "kill", "kill when quiet", "power",
		"power when quiet")

	// With -fsync never a power failure may cost everything there is.
	if p.fsync == durable.FsyncNever && strings.HasPrefix(how, "power") {
		how = "kill"
	}

	quiet := strings.HasSuffix(how, "quiet")
	p.awaitEnd(quiet, clients)

	// Files that somebody has removed are back by now.
	p.tidying <- struct{}{}
	switch {
	case strings.HasPrefix(how, "kill"):
		p.kill(false, "")
	case strings.HasPrefix(how, "power"):
		p.kill(true, "")
	}
	p.quiet = quiet && p.fsync != durable.FsyncNever

	// What it has read by now is answered: see checkDebts.
	p.mu.Lock()
	for _, c := range p.conns {
		p.taken[c] = c.taken()
	}
	p.mu.Unlock()

	closes := time.Now()
	close(p.closing)
	p.server.Close()

	// A client's last second is counted in ten ticks, each of which may come late.
	if took := time.Since(closes); took > closeTime+p.slack()+10*p.late {
		p.fail("Close takes %v", took)
	}

	// The server is the store's last user, so the store is closed behind it.
	err := db.Close()
	close(p.gone)
	p.leave(err)
}

// awaitEnd lets clients do what they do: all of it if quiet, and the disk is good from now on.
func (p *process) awaitEnd(quiet bool, clients *sync.WaitGroup) {
	r := p.random
	if quiet {
		p.mu.Lock()
		p.plan = plan{}
		p.mu.Unlock()

		clients.Wait()

		// Two fsyncs a second apart are over by then, so all is on disk.
		Wait(Pick(r, 3*time.Second, 3*time.Second, 3*time.Minute))
		return
	}

	select {
	case <-time.After(Pick(r, Between(r, 0, 100*time.Millisecond), Between(r, 0, 3*time.Second),
		Between(r, 0, time.Minute))):
	case <-p.killed:
	case err := <-p.server.Failed():
		p.tell("the store has failed: %v", err)

		// A store fails only where its disk has failed, or the process was killed.
		if !p.isDisturbed() {
			p.fail("and nothing had happened to it: %v", err)
		}
	}
}

// leave leaves the directory to the next process; closed is what the store's Close returned.
func (p *process) leave(closed error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan = plan{} // it may copy itself still

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

	// What a kernel still has may be lost, where the disk had failed.
	p.quiet = closed == nil && !p.failed
	p.world.dir = p.dir.Kill()
	if p.failed && Chance(p.random, 2) && p.fsync != durable.FsyncNever {
		p.tell("then a power failure")
		p.after, p.power = p.dir.Crash(p.random), true
		p.world.dir = p.after
		p.forget()
	}
}
