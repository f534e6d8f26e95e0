package world

import (
	"context"
	"maps"
	"slices"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// What is promised, besides what the requests do.
const (
	closeTime  = 3500 * time.Millisecond // limit of Close, without the time that the disk takes
	lineTime   = 30 * time.Second        // a line that was begun must end by then
	listTime   = 20 * time.Second        // limit of a Keys that waits for others' snapshots
	goneTime   = time.Second             // limit of a Take whose client has gone
	expireTime = 100 * time.Millisecond  // a key is gone by then after its deadline
	steadyRate = 256 << 10               // bytes a second: who reads this fast loses nothing
)

// heard is an operation, and the fake time at which it was answered.
type heard struct {
	storetest.Operation
	at time.Time
}

// checkMoved is called when a write was answered: soon after a move of the directory none may be.
func (p *process) checkMoved() {
	p.mu.Lock()
	defer p.mu.Unlock()

	// A call that hangs in the disk may have begun before the move.
	if most := 2*time.Second + p.stalled + p.plan.stall; !p.moved.IsZero() &&
		time.Since(p.moved) > most {
		p.fail("a write is answered %v after the directory was moved", time.Since(p.moved))
	}
}

// forget notes which answered operations a power failure now may undo: if fsyncs are a period
// apart, those of the last two periods.
func (p *process) forget() {
	// With an fsync before each answer no answered operation can be lost.
	if p.fsync == durable.FsyncAlways {
		return
	}

	w := p.world
	w.mu.Lock()
	defer w.mu.Unlock()

	w.failures++
	for _, operations := range w.history {
		for i := range operations {
			if operations[i].at.After(w.exposed) {
				operations[i].Failure = w.failures
			}
		}
	}
}

// look acts as a client that only reads: what it has seen must stay, even if nobody was told of it
// before.
func (p *process) look(db *durable.Store) {
	w := p.world
	w.mu.Lock()
	keys := slices.Collect(maps.Keys(w.history))
	w.mu.Unlock()

	o := heard{Operation: storetest.Operation{Request: storetest.Request{Verb: "Get"}}}
	o.Invoked = w.tick()
	lists := map[string][]string{}
	for _, key := range keys {
		lists[key] = db.Get(key)
	}

	// Values count as seen only once a commit has returned, because a client would not see them
	// before.
	if err := db.Commit(); err != nil || p.isDisturbed() {
		return
	}
	o.Answered, o.at = w.tick(), time.Now()

	w.mu.Lock()
	defer w.mu.Unlock()
	for key, list := range lists {
		o.N, o.Got = len(list), list
		w.history[key] = append(w.history[key], o)
	}
}

// known wants that a value was sent and was not refused.
func (w *world) known(key, value string) {
	w.mu.Lock()
	sent, refused := w.sent[value], w.refused[value]
	w.mu.Unlock()

	if !sent || refused {
		w.fail("%q holds %.60q, sent %v, refused %v", key, value, sent, refused)
	}
}

// knownAll is known for every value of a store.
func (w *world) knownAll(db *durable.Store) {
	for key, list := range db.All() {
		for _, v := range list {
			w.known(key, v)
		}
	}
}

// checkLeft checks what a process that has ended leaves behind.
func (p *process) checkLeft() {
	if n := p.dir.Handles; n != 0 {
		p.fail("%d files are left open", n)
	}

	for _, c := range p.conns {
		if !c.isClosed() {
			p.fail("a connection is left open")
		}
	}

	for _, what := range p.server.Left() {
		p.fail("%s", what)
	}

	// Clients cannot know of more dropped replies than there were. They may know of fewer only if
	// one of them ended without being told.
	if lost := p.server.Lost(); lost < p.told || lost > p.told && p.unknown == 0 {
		p.fail("%d replies were dropped, and clients were told of %d", lost, p.told)
	}
}

// judge starts the store a last time, with no more faults, and checks what is there.
func (w *world) judge() {
	w.dir.Before = nil
	if r, err := durable.Check(w.dir); err != nil || r.Damaged {
		w.fail("a check of what is left: %v, %v", r.Lines, err)
	}

	db, err := durable.Open(context.Background(), w.dir, durable.Options{})
	if err != nil {
		w.fail("what is left does not open: %v", err)
		return
	}

	// Lists of which every request is known.
	for key, operations := range w.history {
		var history []storetest.Operation
		for _, o := range operations {
			history = append(history, o.Operation)
		}
		if err := storetest.CheckLinearizable(history, db.Get(key)); err != nil {
			w.fail("%s, of which %d things were asked: %v", key, len(history), err)
		}
	}

	// Keys that expire.
	for key, end := range w.ends {
		// Where a power failure may undo answered operations, a deadline may be lost as well.
		at, goes := db.Deadline(key)
		if db.Count(key) > 0 && w.fsync == durable.FsyncAlways && (!goes || at > end.UnixMilli()) {
			w.fail("%s is there, and goes %v at %d, want %d", key, goes, at, end.UnixMilli())
		}
	}

	w.knownAll(db)

	// The repair needs the store closed.
	held := db.Snapshot()
	keys, _, _ := db.Size()
	if err := db.Close(); err != nil {
		w.fail("the last stop: %v", err)
	}

	// A repair of a sound store makes an equal one. An empty store has nothing to read.
	if r, db := w.repair(); db == nil && keys > 0 || db != nil && (r.Damaged || !storetest.Same(db, held)) {
		w.fail("a repair of what is whole, %d keys: %v", keys, r.Lines)
	} else if db != nil {
		db.Close()
	}

	w.tell("in the end there are %d lists", len(w.history))
}
