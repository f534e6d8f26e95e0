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
	lockTime = 5 * time.Second        // without a sign of life, until the lock may be taken
	pollTime = 250 * time.Millisecond // between two looks at a lock that another process has
	// how long a sign of life is valid: a tenth less, because two clocks may run differently
	freshTime = lockTime - lockTime/10
	slowTime  = 2 * time.Second // an answer that takes longer leaves too little of lockTime
)

// holder describes the process that has the lock. It is the lock's value, in JSON.
type holder struct {
	Addr, Process string // where it serves, or will serve, and its process id and host
	Since         time.Time
	Token         string // random: no two holders have the same
	Takeovers     int64  // how often a process took the lock that had not been released
	Released      bool   // the holder has given the lock back
}

func (o holder) String() string {
	return fmt.Sprintf("by process %s, which serves %s since %s", o.Process,
		cmp.Or(o.Addr, "nothing"), o.Since.UTC().Format(time.RFC3339))
}

// clusterLock is a lock that is held, or is to be. It has two goroutines: beat shows signs of life,
// and attend looks after the cluster.
type clusterLock struct {
	d      *directory
	owner  holder
	value  []byte          // of the key lock: owner
	ctx    context.Context // done when the lock is lost or given back; its cause says why
	cancel context.CancelCauseFunc

	confirmed atomic.Pointer[time.Time] // when the last confirmed sign of life was sent
	revision  atomic.Int64              // of etcd when that sign arrived
	missed    atomic.Int64              // how often something of ours was found missing
	mended    atomic.Int64              // the value of missed when last nothing was missing
	// from confirm to Held, which then checks again; one slot, because one signal is enough
	beaten  chan struct{}
	beating context.Context // beat's context: ends at Close, or when ctx ends
	stop    context.CancelFunc
	ended   chan struct{} // closed by beat when it ends
	silent  bool          // the log has said that etcd does not answer; used by beat alone
}

// isOurs is the comparison that every change by the holder makes, except a retake.
func (l *clusterLock) isOurs() comparison { return isValue(l.d.key("lock"), l.value) }

// isOursIn reports whether lock, read from etcd, is ours.
func (l *clusterLock) isOursIn(lock []keyValue) bool {
	return len(lock) > 0 && bytes.Equal(lock[0].Value, l.value)
}

// isGone reports whether something that we have written may be missing in etcd.
func (l *clusterLock) isGone() bool { return l.missed.Load() > l.mended.Load() }

// fail ends the lock with err, unless an error has ended it before. It returns the first.
func (l *clusterLock) fail(err error) error {
	l.cancel(err)
	return context.Cause(l.ctx)
}

// miss notes that something that we have written is missing in etcd, as err says. It returns a
// storage.ErrGone.
func (l *clusterLock) miss(err error) error {
	l.missed.Add(1)
	return fmt.Errorf("%w: %w", storage.ErrGone, err)
}

// judge finds out why a comparison has failed, and notes it. lock is what etcd has now: somebody
// has taken it, or something of ours is gone. judge returns an ErrTakenOver or a storage.ErrGone.
func (l *clusterLock) judge(lock []keyValue) error {
	if len(lock) > 0 && !l.isOursIn(lock) && lock[0].Revision > l.revision.Load() {
		return l.fail(ErrTakenOver)
	}
	return l.miss(errors.New("it was deleted, or an older state of etcd restored"))
}

// InUse says who has the lock. The holder may have died without releasing it.
func (d *directory) InUse() (owner string, inUse bool) {
	kvs, err := d.get(keyRange{Key: d.key("lock")}, 0)
	if err != nil {
		return "", false
	}
	o, revision, err := d.readLock(kvs)
	return o.String() + ", unless that has died", err == nil && revision > 0 && !o.Released
}

// readLock parses the result of a range of the key lock. revision is 0 if there is no lock.
func (d *directory) readLock(kvs []keyValue) (o holder, revision int64, err error) {
	if len(kvs) == 0 {
		return o, 0, nil
	}
	if err := json.Unmarshal(kvs[0].Value, &o); err != nil {
		return o, 0, fmt.Errorf("%w: %s is no lock of kvserver", storage.ErrNotOurs, d.Path("lock"))
	}
	return o, kvs[0].Revision, nil
}

// sight is what a process that waits for the lock has seen of it.
type sight struct {
	holder
	revision int64     // of the last sign of life; 0: there is no lock
	step     int64     // the revision of the key step; 0: there is no such key
	isEmpty  bool      // there are no files
	isNew    bool      // no look has found any key of the store
	since    time.Time // when lock and step were first seen as they are; zero: not seen yet
	answered time.Time // when etcd answered last
	began    time.Time // when the wait began
	told     string    // the reason for the wait that the log was told last
}

// look reads the lock. It asks with a put that never happens, because a full etcd refuses that:
// while etcd is full the lock's holder cannot show a sign of life, so this time must not count.
func (w *sight) look(ctx context.Context, d *directory) error {
	key := d.key("lock")
	one := func(prefix string) operation {
		return operation{Range: &keyRange{Key: d.key(prefix), End: d.all(prefix).End, Limit: 1,
			KeysOnly: true}}
	}

	// The comparison never holds, so nothing is written, but etcd treats the request as a write.
	answer, err := d.client.try(ctx, "kv/txn", transaction{
		Compare: []comparison{isRevision(key, -1)},
		Success: []operation{putKey(key, nil)},
		Failure: []operation{readKey(key), readKey(d.key("step")), one("n/"), one("")},
	})
	if errors.Is(err, syscall.ENOSPC) {
		// While etcd is full the holder cannot show a sign of life: start counting again.
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

	// Count from the time at which we first saw this sign of life, so that only our own clock
	// matters. If there is no lock, a changed step says that somebody has had it since the last
	// look.
	if w.since.IsZero() || revision != w.revision || step != w.step {
		w.since = now
	}

	// The store is new only if no look has found anything.
	w.isNew = len(answer.read(3).KVs) == 0 && (w.isNew || w.answered.IsZero())
	w.isEmpty = len(answer.read(2).KVs) == 0
	if revision == 0 {
		o.Takeovers = w.Takeovers // somebody has deleted the lock, so the number is as it was
	}
	w.holder, w.revision, w.step, w.answered = o, revision, step, now
	return err
}

// replace puts l in the place of the lock that was seen, if that is still there: of several servers
// only one succeeds. The step is compared, too, because another cluster may have no lock either.
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

// isFree reports whether the process with that token may take the lock: no process has ever had it,
// or it was given back, or it is the process's own already (only the answer to take was lost), or
// its holder has shown no sign of life for lockTime by our clock.
func (w *sight) isFree(token string) bool {
	return w.isNew || w.Released || w.Token == token || time.Since(w.since) >= lockTime
}

// Lock takes the lock. If another process has it, a server (Options.Addr is not "") waits until
// that process gives it back, or shows no sign of life for lockTime. Any other process gives
// up once it has seen a sign of life.
func (d *directory) Lock(ctx context.Context) (storage.Lock, error) {
	l, w := d.newLock(), sight{began: time.Now()}
	for {
		// Until etcd has answered once, awaitAnswer says that it does not; later standBy does.
		before, isTaken, end := w.revision, false, func() bool { return true }
		if w.answered.IsZero() {
			end = d.awaitAnswer()
		}
		err := w.look(ctx, d)
		end()

		if err == nil && w.isFree(l.owner.Token) {
			isTaken, err = l.take(ctx, &w)
		}

		switch {
		case isTaken:
			return d.hold(l)
		case ctx.Err() != nil:
			l.release() // the request of take may have arrived
			return nil, ctx.Err()
		}

		if err := d.standBy(&w, before, err); err != nil {
			return nil, err
		}
		wait(ctx, pollTime)
	}
}

// standBy tells the status and the log what Lock waits for, or returns the error with which Lock
// gives up. err is of the last look or take; before is the lock's revision at the look before that.
func (d *directory) standBy(w *sight, before int64, err error) error {
	isFull, isSilent := errors.Is(err, syscall.ENOSPC), errors.Is(err, ErrUnreachable)
	isImpatient, soFar := d.opts.Addr == "", time.Since(w.began)
	silence := min(soFar, time.Since(w.answered))
	stage := "the data is in use " + w.holder.String()

	switch {
	case isFull && isImpatient:
		return errFull
	case isFull:
		stage = errFull.Error()

	case isSilent && isImpatient && soFar >= patienceTime, err != nil && !isSilent:
		// To wait does not help if all members refuse, or if the lock is not kvserver's.
		return err
	case isSilent && silence < tellTime: // for example, too few members answer for a new store
		stage = err.Error()
	case isSilent:
		was := stage
		stage = fmt.Sprintf("etcd does not answer, for %v", silence.Round(time.Second))
		if w.Token != "" {
			stage += "; before that " + was
		}

	case isImpatient && before != 0 && before != w.revision && !w.Released:
		// A sign of life came between two looks, so the holder is alive.
		return fmt.Errorf("%w: %s %s", storage.ErrLocked, d.name, w.holder)
	case w.revision == 0: // a holder that is alive will take it again
		stage = "there is no lock, and who had it may live still"
	}

	// The log is told when the reason changes. The duration, after a comma, is not compared.
	d.opts.Status.Set("standby: " + stage)
	if what, _, _ := strings.Cut(stage, ","); what != w.told {
		w.told = what
		var why []any // nil: etcd has answered
		if err != nil {
			why = []any{"error", err}
		}
		d.client.log.Info("standing by: "+stage, why...)
	}
	return nil
}

// hold makes l, which was taken, the directory's lock, and starts its goroutines.
func (d *directory) hold(l *clusterLock) (storage.Lock, error) {
	d.lock = l
	d.opts.Status.Set("opening the data")
	d.opts.Status.Takeovers.Store(l.owner.Takeovers)

	// Signs of life come first, because readAll may take longer than lockTime.
	go l.beat()
	d.client.findQuota(l.ctx)
	if err := d.readAll(); err != nil {
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

// take takes the lock, unless it has changed since w saw it. After an error the next look finds out
// whether it was taken.
func (l *clusterLock) take(ctx context.Context, w *sight) (taken bool, err error) {
	// Two stores must not begin at one address, so a new store needs a majority of the members.
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
		l.d.client.log.Warn("the data is taken over: there was no sign of life", "for", lockTime,
			"of", w.holder.String())
	}

	// Other servers wait only for lockTime, so each answer must come well before that.
	if took := time.Since(l.owner.Since); took > slowTime {
		l.d.client.log.Error("etcd is too slow: another server may take over at any time", "took", took,
			"limit", slowTime)
	}

	// From here on the lock ends with its own context, not with the caller's.
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	l.beating, l.stop = context.WithCancel(l.ctx)
	return true, nil
}

// retake takes the lock again if it is missing, or older than our last sign of life: somebody has
// deleted it, or restored an older state of etcd. While that sign is fresh nobody else can have had
// the lock.
func (l *clusterLock) retake(ctx context.Context) error {
	w := sight{answered: time.Now()}
	// The lock may still be ours, for example if only the answer to a retake was lost.
	if err := w.look(ctx, l.d); err != nil || w.Token == l.owner.Token {
		return err
	}

	// A later revision is somebody else's lock. And if our sign of life is old, another server may
	// have had the lock in between.
	if w.revision > l.revision.Load() || l.age() >= freshTime {
		return l.fail(ErrTakenOver)
	}

	// If another server was faster, it keeps the lock.
	done, err := w.replace(ctx, l)
	if done {
		l.d.client.log.Error("the lock was deleted in etcd, or an older state was restored: it was taken again")
	}
	return err
}

// confirm notes that a sign of life that was sent at sent has arrived.
func (l *clusterLock) confirm(sent time.Time, answer response) {
	l.revision.Store(answer.Header.Revision)
	l.confirmed.Store(&sent)
	l.d.opts.Status.Confirm(sent)
	select { // wake Held
	case l.beaten <- struct{}{}:
	default:
	}
}

// age is how old the last sign of life is, by the monotonic clock or the wall clock, whichever says
// more: the first stands still while a machine sleeps, and the second can be set.
func (l *clusterLock) age() time.Duration {
	sent, now := *l.confirmed.Load(), time.Now()
	return max(now.Sub(sent), now.Round(0).Sub(sent.Round(0)).Abs())
}

// Lost is closed when the lock is lost or given back.
func (l *clusterLock) Lost() <-chan struct{} { return l.ctx.Done() }

// Held returns nil if nobody else can have had the lock up to now. If the last sign of life is too
// old, it waits for the next one: if that arrives, nobody has had the lock.
func (l *clusterLock) Held() error {
	for l.age() >= freshTime && l.ctx.Err() == nil {
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

// Verify runs check, which finds out whether anything of ours is gone; Held says so then. Verify
// returns an error only if the lock is lost.
func (l *clusterLock) Verify() error {
	l.d.check()
	return context.Cause(l.ctx)
}

// beat shows a sign of life every beatTime, until the lock is lost or given back. It is one
// goroutine for each lock.
func (l *clusterLock) beat() {
	defer close(l.ended)
	for l.beating.Err() == nil {
		sent := time.Now()
		l.show(sent)
		wait(l.beating, time.Until(sent.Add(beatTime)))
	}
}

// show shows one sign of life.
func (l *clusterLock) show(sent time.Time) {
	t := transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), l.value)},
		Failure: []operation{readKey(l.d.key("lock"))},
	}

	answer, err := l.d.client.try(l.beating, "kv/txn", t)
	isFull := errors.Is(err, syscall.ENOSPC)
	if isFull {
		// While etcd is full nobody can take the lock: it is enough to see that it is ours.
		t.Success = nil
		answer, err = l.d.client.try(l.beating, "kv/txn", t)
	}

	// Silence ends the lock only if this sign was sent patienceTime or more after the last
	// confirmed one, by the monotonic clock. Another holder, or a refusal by all members, ends it
	// at once.
	switch isLate := sent.Sub(*l.confirmed.Load()) >= patienceTime; {
	case l.beating.Err() != nil: // the lock was given back or lost
	case err == nil && answer.Succeeded:
		l.d.client.noteFull(isFull)
		l.confirm(sent, answer)
		l.silent = false

	// The lock is another one, or missing: judge ends ours, or retake takes it again.
	case err == nil:
		l.judge(answer.read(0).KVs)
		if err := l.retake(l.beating); err != nil && isLate {
			l.fail(err) // before that the next sign of life tries again
		}

	// It did not arrive.
	case isLate:
		l.fail(fmt.Errorf("%w for %v: %w", ErrUnreachable, patienceTime, err))
	case errors.Is(err, ErrUnreachable):
		if !l.silent {
			l.silent = true
			l.d.client.log.Warn("etcd does not answer, trying again", "error", err, "until", patienceTime)
		}
	case errors.Is(err, ErrOther):
		l.miss(err)
	default:
		l.fail(err)
	}
}

// Close gives the lock back, so that another server can take it at once. A lost lock stays lost.
func (l *clusterLock) Close() error {
	l.stop()
	<-l.ended
	if l.ctx.Err() == nil {
		l.release()
	}
	l.fail(errors.New("the lock was given back"))
	return nil
}

// release gives the lock back, if it is ours. If that fails, other servers have to wait for
// lockTime.
func (l *clusterLock) release() {
	if l.value == nil { // take has sent nothing
		return
	}

	released := l.owner
	released.Released = true
	value, _ := json.Marshal(released)

	// This process ends, so it waits for etcd no longer than for one request. If another server has
	// the lock by now, that keeps it.
	l.d.client.try(context.Background(), "kv/txn", transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), value)},
	})
}
