package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Times of the lock.
const (
	beatTime = time.Second            // between two signs of life in the lock
	lockTime = 5 * time.Second        // after which a lock without one may be taken
	pollTime = 250 * time.Millisecond // between two looks at a lock that another one has
	// so long a sign of life is good for: clocks may run differently
	freshTime = lockTime - lockTime/10
	slowTime  = 2 * time.Second // that etcd may take for an answer, for two servers to work
)

// holder is what the lock says of who has it.
type holder struct {
	Addr, Process string // where it serves, or will, and who it is
	Since         time.Time
	Token         string // no two owners have the same
	Takeovers     int64  // how often somebody took the lock who was not given it
	Released      bool   // nobody has it any more
}

func (o holder) String() string {
	return fmt.Sprintf("by process %s, which serves %s since %s", o.Process,
		cmp.Or(o.Addr, "nothing"), o.Since.UTC().Format(time.RFC3339))
}

// clusterLock is the lock while it is held, until ctx is done: its cause says why.
type clusterLock struct {
	d      *directory
	owner  holder
	value  []byte // what the lock says
	ctx    context.Context
	cancel context.CancelCauseFunc

	confirmed atomic.Pointer[time.Time] // when the last sign of life was sent that arrived
	revision  atomic.Int64              // of etcd when it arrived
	missed    atomic.Int64              // how often something of ours was not in etcd
	mended    atomic.Int64              // for how many of these it is known that nothing is gone now
	// beat to Held: look again. One slot, for only the latest counts
	beaten  chan struct{}
	beating context.Context // until Close, or until the lock is lost: ended by stop
	stop    context.CancelFunc
	ended   chan struct{} // closed by beat
	silent  bool          // a sign of life has not arrived since one did; beat's
}

// isOurs is what every transaction compares.
func (l *clusterLock) isOurs() comparison { return isValue(l.d.key("lock"), l.value) }

// isOursIn tells whether what etcd has is our lock.
func (l *clusterLock) isOursIn(lock []keyValue) bool {
	return len(lock) > 0 && bytes.Equal(lock[0].Value, l.value)
}

// isGone tells whether etcd may not have what we have left there.
func (l *clusterLock) isGone() bool { return l.missed.Load() > l.mended.Load() }

// fail notes why the lock is lost, the first time. It returns what was noted.
func (l *clusterLock) fail(err error) error {
	l.cancel(err)
	return context.Cause(l.ctx)
}

// miss notes that etcd does not have what we have left there, as err says, and returns a
// storage.ErrGone.
func (l *clusterLock) miss(err error) error {
	l.missed.Add(1)
	l.look()
	return fmt.Errorf("%w: %w", storage.ErrGone, err)
}

// look has Held look again.
func (l *clusterLock) look() {
	select {
	case l.beaten <- struct{}{}:
	default:
	}
}

// judge says why a comparison has failed, by the lock that etcd has: somebody has taken it, or
// something is gone.
func (l *clusterLock) judge(lock []keyValue) error {
	if len(lock) > 0 && !l.isOursIn(lock) && lock[0].Revision > l.revision.Load() {
		return l.fail(ErrTakenOver)
	}
	return l.miss(errors.New("it was deleted, or an older state of etcd restored"))
}

// InUse says who has the lock, or had it and ended without a word.
func (d *directory) InUse() (owner string, inUse bool) {
	kvs, err := d.get(keyRange{Key: d.key("lock")}, 0)
	if err != nil {
		return "", false
	}
	o, revision, err := d.readLock(kvs)
	return o.String() + ", unless that has died", err == nil && revision > 0 && !o.Released
}

// readLock reads what a range of the lock holds.
func (d *directory) readLock(kvs []keyValue) (o holder, revision int64, err error) {
	if len(kvs) == 0 {
		return o, 0, nil
	}
	if err := json.Unmarshal(kvs[0].Value, &o); err != nil {
		return o, 0, fmt.Errorf("%w: %s is no lock of kvserver", storage.ErrNotOurs, d.Path("lock"))
	}
	return o, kvs[0].Revision, nil
}

// sight is what somebody who waits for the lock has seen of it.
type sight struct {
	holder
	revision int64     // of its last sign of life; 0: there is no lock
	step     int64     // the revision of the key step; 0: it is not there
	isEmpty  bool      // there is no file
	isNew    bool      // nor is anything else, and never was
	since    time.Time // when it was so first; zero: it must be seen first
	answered time.Time // when etcd has answered last
	began    time.Time // when the wait began
	told     string    // for what the log knows that we wait
}

// look looks at the lock. It asks in a way that a full etcd refuses: nobody can take the lock
// then, nor show signs of life in it, so that time does not count.
func (w *sight) look(ctx context.Context, d *directory) error {
	key := d.key("lock")
	one := func(prefix string) operation {
		return operation{Range: &keyRange{Key: d.key(prefix), End: d.all(prefix).End, Limit: 1,
			KeysOnly: true}}
	}

	// The comparison never holds, so nothing is written, but etcd treats it as a write.
	answer, err := d.client.try(ctx, "kv/txn", transaction{
		Compare: []comparison{isRevision(key, -1)},
		Success: []operation{putKey(key, nil)},
		Failure: []operation{readKey(key), readKey(d.key("step")), one("n/"), one("")},
	})
	if errors.Is(err, syscall.ENOSPC) {
		// While etcd is full its holder cannot show a sign of life: the wait begins anew.
		w.since = time.Time{}
	}
	if err != nil {
		return err
	}

	o, revision, err := d.readLock(answer.read(0).KVs)
	step, now := int64(0), time.Now()
	for _, kv := range answer.read(1).KVs {
		step = kv.Revision
	}

	// Count from when we saw this sign of life first, so that only our own clock matters. Where
	// there is no lock, somebody may have had it since the look before, and has changed the step.
	if w.since.IsZero() || revision != w.revision || step != w.step {
		w.since = now
	}

	// The store is new only if no look has found anything: else somebody had the lock.
	w.isNew = len(answer.read(3).KVs) == 0 && (w.isNew || w.answered.IsZero())
	w.isEmpty = len(answer.read(2).KVs) == 0
	w.holder, w.revision, w.step, w.answered = o, revision, step, now
	return err
}

// replace puts l in the place of the lock that was seen, if that is there still: of several servers
// only one does so. Another cluster, which has no lock either, has not the step.
func (w *sight) replace(ctx context.Context, l *clusterLock) (done bool, err error) {
	sent, key := time.Now(), l.d.key("lock")
	answer, err := l.d.client.try(ctx, "kv/txn", transaction{
		Compare: []comparison{isRevision(key, w.revision), isRevision(l.d.key("step"), w.step)},
		Success: []operation{putKey(key, l.value)},
	})
	if done = err == nil && answer.Succeeded; done {
		l.confirm(sent, answer)
	}
	return done, err
}

// isFree tells whether somebody who is called token may take the lock: it was given back, or
// never was there, or there was no sign of life for lockTime, by our clock. (It may be token's own
// already: it has taken the lock, and only the answer was lost.)
func (w *sight) isFree(token string) bool {
	return w.isNew || w.Released || w.Token == token || time.Since(w.since) >= lockTime
}

// Lock waits for the lock, if others are told where the store is served: whoever has it is
// robbed of it once it has shown no sign of life for lockTime.
func (d *directory) Lock(ctx context.Context) (storage.Lock, error) {
	l, w := d.newLock(), sight{began: time.Now()}
	for {
		before, isTaken := w.revision, false
		err := w.look(ctx, d)
		if err == nil && w.isFree(l.owner.Token) {
			isTaken, err = l.take(ctx, &w)
		}

		switch {
		case isTaken:
			return d.hold(l)
		case ctx.Err() != nil:
			l.release() // what take has sent may have arrived
			return nil, ctx.Err()
		}

		if err := d.standBy(&w, before, err); err != nil {
			return nil, err
		}
		wait(ctx, pollTime)
	}
}

// standBy says for what we wait, or returns why we do not. The last look ended with err, and before
// is the lock's revision at the one before it.
func (d *directory) standBy(w *sight, before int64, err error) error {
	isFull, isSilent := errors.Is(err, syscall.ENOSPC), errors.Is(err, ErrUnreachable)
	isImpatient, waited := d.opts.Addr == "", time.Since(w.began)
	silence := min(waited, time.Since(w.answered))
	stage := "the data is in use " + w.holder.String()

	switch {
	case isFull && isImpatient:
		return errFull
	case isFull:
		stage = errFull.Error()

	case isSilent && isImpatient && waited >= patienceTime, err != nil && !isSilent:
		// No waiting helps where all refuse, or the lock is no lock.
		return err
	case isSilent && silence < tellTime: // such as where a few members answer
		stage = err.Error()
	case isSilent:
		was := stage
		stage = fmt.Sprintf("etcd does not answer, for %v", silence.Round(time.Second))
		if w.Token != "" {
			stage += "; before that " + was
		}

	case isImpatient && before != 0 && before != w.revision && !w.Released:
		// A sign of life came between two looks, so the holder lives, and we need not wait.
		return fmt.Errorf("%w: %s %s", storage.ErrLocked, d.name, w.holder)
	case w.revision == 0: // but perhaps there is a holder that lives: it will take the lock anew
		stage = "there is no lock, and who had it may live still"
	}

	// The log is told once, and not how long it takes.
	d.opts.Status.Set("standby: " + stage)
	if what, _, _ := strings.Cut(stage, ","); what != w.told {
		w.told = what
		var why []any // nil: etcd has answered
		if err != nil {
			why = []any{"error", err}
		}
		d.log.Info("standing by: "+stage, why...)
	}
	return nil
}

// hold makes the lock that was taken the directory's.
func (d *directory) hold(l *clusterLock) (storage.Lock, error) {
	d.lock = l
	d.opts.Status.Set("opening the data")
	d.opts.Status.TakeOver(l.owner.Takeovers)

	// Signs of life come first, for begin may take longer than lockTime.
	go l.beat()
	if err := d.begin(); err != nil {
		l.Close()
		return nil, err
	}

	go l.attend()
	return l, nil
}

// newLock returns a lock that is not taken yet.
func (d *directory) newLock() *clusterLock {
	host, _ := os.Hostname()
	owner := holder{Addr: d.opts.Addr, Process: fmt.Sprintf("%d on %s", os.Getpid(), host),
		Token: rand.Text()}
	return &clusterLock{d: d, owner: owner, beaten: make(chan struct{}, 1),
		ended: make(chan struct{})}
}

// take takes the lock as w has seen it, unless there was a sign of life since. After an error
// it is not known whether it has: the next look tells.
func (l *clusterLock) take(ctx context.Context, w *sight) (taken bool, err error) {
	// Two stores must not begin at one address, so a new one needs most of the members.
	if w.isEmpty {
		if err := l.d.mayBegin(ctx); err != nil {
			return false, err
		}
	}

	l.owner.Since, l.owner.Takeovers = time.Now(), w.Takeovers
	if w.revision > 0 && !w.Released && w.Token != l.owner.Token {
		l.owner.Takeovers++
	}
	l.value, _ = json.Marshal(l.owner)
	if taken, err = w.replace(ctx, l); !taken {
		return false, err
	}
	if l.owner.Takeovers > w.Takeovers {
		l.d.log.Warn("the data is taken over: there was no sign of life", "for", lockTime,
			"of", w.holder.String())
	}

	// Another server waits for lockTime only, so each answer must come well before that.
	if took := time.Since(l.owner.Since); took > slowTime {
		l.d.log.Error("etcd is too slow: another server may take over at any time", "took", took,
			"limit", slowTime)
	}

	// From here on the lock ends with its own context, and not with the caller's.
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	l.beating, l.stop = context.WithCancel(l.ctx)
	return true, nil
}

// retake takes the lock anew where it is missing, or older than our last sign of life: somebody
// has deleted it, or restored an older state. While that sign is fresh nobody else has had it.
func (l *clusterLock) retake(ctx context.Context) error {
	w := sight{answered: time.Now()}
	// It may be ours still, such as where only its answer was lost.
	if err := w.look(ctx, l.d); err != nil || w.Token == l.owner.Token {
		return err
	}

	// A later revision is the lock of somebody else. And where our sign of life is old, another
	// server may have had the lock in between.
	if w.revision > l.revision.Load() || l.age() >= freshTime {
		return l.fail(ErrTakenOver)
	}

	// A server that was faster keeps it.
	done, err := w.replace(ctx, l)
	if done {
		l.d.log.Error("the lock was deleted in etcd, or an older state restored: taken anew")
	}
	return err
}

// confirm notes that a sign of life has arrived that was sent then.
func (l *clusterLock) confirm(sent time.Time, answer response) {
	l.revision.Store(answer.Header.Revision)
	l.confirmed.Store(&sent)
	l.d.opts.Status.Confirm(sent)
	l.look()
}

// age is how old the last sign of life is, by the clock that says more: one of the two
// stands still while a machine sleeps, and the other can be set.
func (l *clusterLock) age() time.Duration {
	sent, now := *l.confirmed.Load(), time.Now()
	return max(now.Sub(sent), now.Round(0).Sub(sent.Round(0)).Abs())
}

// Lost is closed when the lock is lost.
func (l *clusterLock) Lost() <-chan struct{} { return l.ctx.Done() }

// Held tells whether nobody else can have had the lock up to now. Where the last sign of
// life is too old it waits for one more: if that arrives, nobody had.
func (l *clusterLock) Held() error {
	for l.age() >= freshTime && !l.isGone() && l.ctx.Err() == nil {
		select {
		case <-l.beaten:
		case <-l.ctx.Done():
		}
	}
	if l.ctx.Err() == nil && l.isGone() {
		return storage.ErrGone
	}
	return context.Cause(l.ctx)
}

// Look has etcd asked for what is gone of ours. It returns an error only if the lock is lost, and
// does not ask whose the lock is: every change does.
func (l *clusterLock) Look() error {
	l.d.check()
	return context.Cause(l.ctx)
}

// beat shows a sign of life every beatTime, until the lock is lost or given back. One goroutine for
// a lock.
func (l *clusterLock) beat() {
	defer close(l.ended)
	for l.beating.Err() == nil {
		// After one that does not arrive the next does not wait for beatTime.
		sent, pause := time.Now(), pauseTime
		if l.show(sent) {
			pause = time.Until(sent.Add(beatTime))
		}
		wait(l.beating, pause)
	}
}

// show shows one sign of life, and tells whether it has arrived.
func (l *clusterLock) show(sent time.Time) bool {
	t := transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), l.value)},
		Failure: []operation{readKey(l.d.key("lock"))},
	}

	answer, err := l.d.client.try(l.beating, "kv/txn", t)
	isFull := errors.Is(err, syscall.ENOSPC)
	if isFull {
		// Then nobody can take the lock: that it is ours is as good.
		t.Success = nil
		answer, err = l.d.client.try(l.beating, "kv/txn", t)
	}

	// We give up only when a sign has failed that was sent patienceTime after the last confirmed one,
	// by the monotonic clock.
	switch isLate := sent.Sub(*l.confirmed.Load()) >= patienceTime; {
	case l.beating.Err() != nil: // nobody wants to know any more
	case err == nil && answer.Succeeded:
		l.d.client.noteFull(isFull)
		l.confirm(sent, answer)
		l.silent = false
		return true

	// The lock is another one, or missing: judge ends it, or retake takes it anew.
	case err == nil:
		l.judge(answer.read(0).KVs)
		if err := l.retake(l.beating); err != nil && isLate {
			l.fail(err) // else the next sign of life will fail, too
		}

	// It did not arrive.
	case isLate:
		l.fail(fmt.Errorf("%w for %v: %w", ErrUnreachable, patienceTime, err))
	case errors.Is(err, ErrUnreachable):
		if !l.silent {
			l.silent = true
			l.d.log.Warn("etcd does not answer, trying again", "error", err, "until", patienceTime)
		}
	case errors.Is(err, ErrOther):
		l.miss(err)
	default:
		l.fail(err)
	}
	return false
}

// Close gives the lock back, if it is not lost: then another one can have it at once.
func (l *clusterLock) Close() error {
	l.stop()
	<-l.ended
	if l.ctx.Err() == nil {
		l.release()
	}
	l.fail(errors.New("the lock was given back"))
	return nil
}

// release gives the lock back, if it is ours. If that fails it is taken lockTime later.
func (l *clusterLock) release() {
	if l.value == nil { // take was never tried
		return
	}

	released := l.owner
	released.Released = true
	value, _ := json.Marshal(released)

	// A server that ends does not wait long for etcd. One that has taken the lock meanwhile
	// keeps it.
	l.d.client.try(context.Background(), "kv/txn", transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), value)},
	})
}
