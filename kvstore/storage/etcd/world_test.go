package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// world is some servers on one cluster, in fake time, the faults that they meet, and the judge of
// what they answer. Each server has a goroutine, and so has each of its processes; the test's own
// makes things happen.
type world struct {
	t      *testing.T
	e      *fakeEtcd
	random *rand.Rand      // draws what happens
	ctx    context.Context // done when the servers are to end
	ending sync.WaitGroup  // of the servers and their processes

	isCalm atomic.Bool // nothing happens to single requests

	mu      sync.Mutex
	began   time.Time
	log     []string                       // what happened
	faults  int                            // how many faults go on
	told    storetest.Model                // what the store holds after all that was answered
	doubts  map[*process][]storetest.Model // what it may hold instead: a batch has no answer yet
	serving *process                       // the one that has opened the store last; nil: none
	spoiled *process                       // the one whose data is taken away now; nil: none
	latest  time.Time                      // of the last answer
	isLost  bool                           // data was taken away, and then the server ended
}

// process is one process of a server.
type process struct {
	*world
	name   string
	wire   *etcdWire
	random *rand.Rand // draws what it does
	draws  *rand.Rand // draws what happens to its requests
	d      *durable.Store
	live   context.Context // done when it is to end
	end    func()
	gone   chan struct{} // closed when the server's next process may begin
	ended  bool          // no answer of it counts any more; under mu
	wrote  time.Time     // when the last batch began that wrote, and was answered; under mu
}

// worldDir is a directory whose log files have a size that suits a world.
type worldDir struct {
	*directory
	segment int64
}

func (d *worldDir) Sizes() (segment, compact int64, zeros int) {
	return d.segment, 2 * d.segment, 0
}

// note adds a line to the log. The caller has mu.
func (w *world) note(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%8.3f ", time.Since(w.began).Seconds())+
		fmt.Sprintf(format, args...))
}

// wrong fails the test, with the log, unless data was lost with a server. The caller has mu.
func (w *world) wrong(format string, args ...any) {
	w.note("WRONG: "+format, args...)
	if !w.isLost && !w.t.Failed() {
		w.t.Error(strings.Join(w.log, "\n"))
	}
}

// ---- servers

// server starts a server again and again, until all are stopped. It runs as the server's goroutine.
func (w *world) server(name string, random *rand.Rand, segment int64) {
	for n := 0; w.ctx.Err() == nil; n++ {
		dir, wire := w.e.dir(w.t, w.ctx, name+":1")
		p := &process{world: w, name: fmt.Sprint(name, n), wire: wire, gone: make(chan struct{}),
			random: rand.New(rand.NewPCG(random.Uint64(), 0)),
			draws:  rand.New(rand.NewPCG(random.Uint64(), 0))}
		wire.draw = p.draw
		p.live, p.end = context.WithCancel(w.ctx)

		log := slog.New(slog.NewTextHandler(teller{p}, nil))
		dir.client.log = log
		d, err := durable.Open(w.ctx, &worldDir{dir.directory, segment}, durable.Options{Log: log})
		if p.d = d; p.opened(err) {
			p.ending.Go(p.serve)
			<-p.gone
		}
		p.end()
		wait(w.ctx, time.Duration(random.IntN(3000))*time.Millisecond)
	}
}

// teller adds what a process logs to the world's log.
type teller struct{ *process }

func (p teller) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note("    %s: %s", p.name, strings.TrimSpace(string(line)))
	return len(line), nil
}

// draw draws what happens to a request.
func (p *process) draw() etcdFault {
	if p.draws.IntN(100) > 0 || p.isCalm.Load() {
		return ""
	}
	return []etcdFault{lostRequest, lostAnswer, doneTwice, noLeader, tooLate, slowAnswer,
		fills}[p.draws.IntN(7)]
}

// opened judges how a start has ended, and reports whether the server serves.
func (p *process) opened(err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()

	if p.spoiled != nil && p.spoiled == p.serving { // it has not written its data again yet
		p.isLost = true
	}

	if err != nil {
		p.note("%s does not serve: %v", p.name, err)
		if errors.Is(err, storage.ErrNotOurs) || errors.Is(err, durable.ErrUnfinished) ||
			errors.As(err, new(*storage.DamageError)) {
			p.wrong("the store is refused")
		}
		return false
	}

	// The store holds what was answered, and perhaps a batch that was not.
	p.note("%s serves", p.name)
	if !p.isIn(p.told) {
		for other, doubts := range p.doubts {
			if i := slices.IndexFunc(doubts, p.isIn); i >= 0 {
				p.note("it has what %s did last, too", other.name)
				p.told = doubts[i]
			}
		}
	}

	if !p.isIn(p.told) {
		keys, values, _ := p.d.Size()
		p.wrong("it has not what was told, but %d keys and %d values", keys, values)
	}

	p.serving, p.doubts = p, map[*process][]storetest.Model{}
	return true
}

// isIn reports whether the store holds exactly what model does.
func (p *process) isIn(model storetest.Model) bool { return model.Equal(p.d) }

// serve runs one batch after the other until one fails, or the process is to end. It runs as the
// process's goroutine. That of a killed process remains for some seconds.
func (p *process) serve() {
	for p.batch() && wait(p.live, time.Duration(p.random.IntN(600))*time.Millisecond) == nil {
	}

	p.mu.Lock()
	isKilled := p.ended
	p.ended = true
	p.mu.Unlock()
	if isKilled {
		<-p.d.Lost()
	}
	p.d.Close()
	if !isKilled {
		close(p.gone)
	}
}

// batch does some operations and a Commit, and judges the answer. It reports whether the process
// may go on.
func (p *process) batch() bool {
	p.mu.Lock()
	model, began, writes := p.told.Clone(), time.Now(), false
	p.mu.Unlock()

	var steps []func(store kvstore.Store)
	var doubts []storetest.Model // after each operation: perhaps only the first ones are in the log
	for range p.random.IntN(4) {
		key, value := fmt.Sprint("key", p.random.IntN(5)), fmt.Sprint(p.name, p.random.IntN(1000))
		if p.random.IntN(3) == 0 {
			value += strings.Repeat(" ", 7000) // a few of these are joined
		}

		kind := p.random.IntN(6)
		do := func(store kvstore.Store) {
			switch kind {
			case 0:
				store.Delete(key)
			case 1:
				store.Put(key, value)
			default:
				store.Set(key, value)
			}
		}

		writes = writes || kind > 0 // a Delete may find nothing to delete
		steps = append(steps, do)
		do(model)
		doubts = append(doubts, model.Clone())
	}

	p.mu.Lock()
	p.doubts[p] = doubts
	p.mu.Unlock()
	for _, do := range steps {
		do(p.d)
	}
	err := storetest.Commit(p.d)

	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.ended: // it was killed: nobody gets the answer
		return false
	case err != nil:
		p.note("%s: Commit: %v", p.name, err)
		return false
	case p.serving != p:
		p.wrong("%s answers, and %s serves", p.name, p.serving.name)
	case !p.isIn(model):
		p.wrong("%s answers, and has not what was told", p.name)
	}
	p.told, p.latest = model, time.Now()
	if delete(p.doubts, p); writes {
		p.wrote = began
	}
	return true
}

// ---- what happens

// stop ends the process that serves: it kills it, or asks it to stop.
func (w *world) stop(atOnce bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.serving
	if p == nil || p.ended {
		return
	}

	w.note("%s is stopped, at once: %v", p.name, atOnce)
	if atOnce {
		p.ended = true
		p.wire.kill()
		close(p.gone)
	}
	p.end()
}

// fault calls set with true, and with false some time later.
func (w *world) fault(what string, set func(is bool)) {
	long := time.Duration(1+w.random.IntN(12)) * time.Second

	change := func(by int, is bool) {
		w.mu.Lock()
		w.faults += by
		w.mu.Unlock()
		w.e.mu.Lock()
		defer w.e.mu.Unlock()
		set(is)
	}

	w.mu.Lock()
	w.note("for %v %s", long, what)
	w.mu.Unlock()
	change(1, true)
	time.AfterFunc(long, func() { change(-1, false) })
}

// spoil calls take, which takes data away, if the server that serves is well. It returns when that
// data must be there again: after some seconds, or if isSeen, which says that every write sees what
// is gone, once a write was answered.
func (w *world) spoil(what string, isSeen bool, take func()) {
	w.e.mu.Lock()
	isFull := w.e.full // also by a request, which is no fault that lasts
	w.e.mu.Unlock()
	w.mu.Lock()
	p := w.serving
	isWell := p != nil && !p.ended && w.faults == 0 && !isFull
	if isWell {
		w.note("%s under %s", what, p.name)
		w.spoiled = p
	}
	w.mu.Unlock()
	if !isWell {
		return
	}

	w.isCalm.Store(!isSeen) // otherwise a lost request could take up these seconds
	defer w.isCalm.Store(false)
	took := time.Now()
	for take(); ; {
		<-time.After(50 * time.Millisecond)

		w.mu.Lock()
		switch long := time.Since(took); {
		case p.ended:
			w.isLost = true
		case isSeen && !p.wrote.After(took) && long < time.Minute, !isSeen && long < 6*time.Second:
			w.mu.Unlock()
			continue
		case long >= time.Minute:
			w.wrong("%s does not answer", p.name)
		}
		w.spoiled = nil
		w.mu.Unlock()
		return
	}
}

// spoilOne deletes one key with that prefix.
func (w *world) spoilOne(what, prefix string) {
	w.spoil(what, false, func() {
		kvs := w.e.list(keyRange{Key: []byte(prefix), End: below([]byte(prefix))}).KVs
		w.e.delete(string(kvs[w.random.IntN(len(kvs))].Key))
	})
}

// happen makes things happen. It ends early if data was lost with a server.
func (w *world) happen() {
	var before *fakeEtcd
	for range 9 {
		<-time.After(time.Duration(w.random.IntN(3000)) * time.Millisecond)

		wire := new(etcdWire)
		w.mu.Lock()
		if w.serving != nil {
			wire = w.serving.wire
		}
		isLost := w.isLost
		w.mu.Unlock()
		if isLost {
			return
		}

		switch w.random.IntN(14) {
		case 0:
			w.fault("a:1 is down", func(is bool) { w.e.down = map[bool]string{true: "a:1"}[is] })
		case 1:
			other := newFakeEtcd()
			other.id = "other"
			w.fault("b:1 is another cluster", func(is bool) {
				w.e.other = map[bool]map[string]*fakeEtcd{true: {"b:1": other}}[is]
			})
		case 2:
			w.fault("etcd is full", func(is bool) { w.e.full = is })
		case 3:
			w.fault("the server is cut off", func(is bool) { wire.cut = is })
		case 4:
			w.fault("the server is cut off, and the lock deleted", func(is bool) { wire.cut = is })
			w.e.delete("kv/lock")
		case 5:
			slow := time.Duration(w.random.IntN(1200)) * time.Millisecond
			w.fault(fmt.Sprint("an answer takes ", slow), func(is bool) {
				wire.slow = map[bool]time.Duration{true: slow}[is]
			})

		case 6, 7:
			w.stop(w.random.IntN(2) == 0)
		case 8:
			w.mu.Lock()
			w.note("the lock is deleted")
			w.mu.Unlock()
			w.e.delete("kv/lock")

		// Data goes from under the server.
		case 9:
			w.spoilOne("a piece is deleted", "kv/d/")
		case 10:
			w.spoilOne("a name is deleted", "kv/n/")
		case 11:
			// Not everything: the next start would take an empty prefix for a new store.
			prefixes := [][]string{{"kv/n/"}, {"kv/d/"}, {"kv/n/", "kv/d/", "kv/lock"}}[w.random.IntN(3)]
			w.spoil(fmt.Sprint(prefixes, " are deleted"), true, func() {
				for _, prefix := range prefixes {
					w.e.delete(prefix)
				}
			})
			w.stop(true)
		case 12, 13:
			before = w.restore(before)
		}
	}
}

// restore makes the cluster what it was before; nil: it returns what it is now, for later.
func (w *world) restore(before *fakeEtcd) *fakeEtcd {
	if before == nil {
		return w.e.copy()
	}
	id := []string{w.e.id, "new"}[w.random.IntN(2)]
	w.spoil("cluster "+id+" is what it was", true, func() { w.e.restore(before, id) })
	w.stop(true)
	return nil
}

// Ensure that of two or four servers, whatever happens to them and to etcd, one at a time answers,
// and what was answered stays.
func TestEtcdWorlds(t *testing.T) {
	first, seeds := storetest.Seeds(t, 10, 3)
	var lost atomic.Int64
	for seed := first; seed < first+seeds && !t.Failed(); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				if !live(t, seed) {
					lost.Add(1)
				}
			})
		})
	}

	t.Cleanup(func() {
		t.Logf("in %d of %d worlds a server has ended when something was gone", lost.Load(), seeds)
	})
}

// live runs a world, and reports whether it was judged to its end.
func live(t *testing.T, seed uint64) bool {
	ctx, stop := context.WithCancel(t.Context())
	w := &world{t: t, e: newFakeEtcd(), random: rand.New(rand.NewPCG(seed, 0)), ctx: ctx,
		began: time.Now(), told: storetest.NewModel(), doubts: map[*process][]storetest.Model{}}

	for i := range 2 + 2*(seed%2) {
		w.ending.Go(func() {
			w.server(string(rune('a'+i)), rand.New(rand.NewPCG(seed, 1+i)),
				[]int64{1500, 200 << 10}[seed/2%2])
		})
	}
	w.happen()

	// All is well again, and no request is lost any more: now somebody must serve.
	w.isCalm.Store(true)
	<-time.After(30 * time.Second)
	w.mu.Lock()
	if time.Since(w.latest) > 5*time.Second {
		w.wrong("nobody serves")
	}
	w.mu.Unlock()

	stop()
	w.ending.Wait()
	return !w.isLost
}
