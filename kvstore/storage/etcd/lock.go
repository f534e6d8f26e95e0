package etcd

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"os"
	"sync/atomic"
	"time"
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
	// beat to Held: one has. One slot, for only the latest counts
	beaten chan struct{}
	stop   chan struct{} // closed by Close
	ended  chan struct{} // closed by beat
	silent bool          // the last one did not; beat's
	// how many members, one after the other, have refused it; beat's
	refused int
}

// step is what the key of that name says after n steps.
func (l *clusterLock) step(n int) []byte { return fmt.Appendf(nil, "%s-%d", l.owner.Token, n) }

// isOurs is what every transaction compares.
func (l *clusterLock) isOurs() comparison {
	return comparison{"VALUE", keyValue{Key: l.d.key("lock"), Value: l.value}}
}

// lost notes why the lock is lost, the first time. It returns what was noted.
func (l *clusterLock) lost(err error) error {
	l.cancel(err)
	return context.Cause(l.ctx)
}

// InUse says who has the lock, or had it and ended without a word.
func (d *directory) InUse() (owner string, inUse bool) {
	o, revision, err := d.owner()
	return o.String() + ", unless that has died", err == nil && revision > 0 && !o.Released
}

// owner is who has the lock, and the revision of its last sign of life; 0: nobody had it.
func (d *directory) owner() (o holder, revision int64, err error) {
	kvs, err := d.get(keyRange{Key: d.key("lock")})
	if err != nil || len(kvs) == 0 {
		return o, 0, err
	}
	if err := json.Unmarshal(kvs[0].Value, &o); err != nil {
		return o, 0, fmt.Errorf("%w: %s is no lock of kvserver", storage.ErrNotOurs, d.Path("lock"))
	}
	return o, kvs[0].Revision, nil
}

// Lock waits for the lock, if others are told where the store is served: whoever has it is
// robbed of it once it has shown no sign of life for lockTime, by our clock.
func (d *directory) Lock(ctx context.Context) (storage.Lock, error) {
	l := d.newLock()
	var seen int64
	var since time.Time // when seen was seen first
	told, refused := "", 0
	for ; ; wait(ctx, pollTime) {
		if ctx.Err() != nil {
			l.release() // what take has sent may have arrived
			return nil, ctx.Err()
		}
		o, revision, err := d.owner()
		isWaiting := d.opts.Addr != ""
		switch {
		case err != nil && (!isWaiting || !errors.Is(err, ErrUnreachable)):
			return nil, err
		case err != nil:
			d.log.Warn("standing by, and etcd does not answer", "error", err)
			continue
		case seen != 0 && revision != seen && !isWaiting && !o.Released:
			return nil, fmt.Errorf("%w: %s %s", storage.ErrLocked, d.name, o)
		case revision != seen || since.IsZero():
			seen, since = revision, time.Now()
		}
		if revision == 0 || o.Released || o.Token == l.owner.Token || time.Since(since) >= lockTime {
			taken, err := l.take(ctx, o, revision)
			if taken {
				break
			}
			if isFinal(err) {
				refused++
			}
			switch {
			case refused >= len(d.client.members), err != nil && !isWaiting:
				return nil, named(err)
			case err != nil && ctx.Err() == nil:
				d.log.Warn("cannot take the data over, trying again", "error", err)
			}
			continue
		}
		if isWaiting && told != o.Token {
			told = o.Token
			d.opts.Status.Set("standby: the data is in use " + o.String())
			d.log.Info("standing by: another server has the data", "addr", o.Addr,
				"process", o.Process, "since", o.Since)
		}
	}
	d.lock = l
	d.opts.Status.Set("opening the data")
	d.client.preferLeader(ctx)
	d.opts.Status.TakeOver(l.owner.Takeovers)
	go l.beat()
	if err := d.sweep(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// newLock returns a lock that is not taken yet.
func (d *directory) newLock() *clusterLock {
	host, _ := os.Hostname()
	owner := holder{Addr: d.opts.Addr, Process: fmt.Sprintf("%d on %s", os.Getpid(), host),
		Token: rand.Text()}
	return &clusterLock{d: d, owner: owner, beaten: make(chan struct{}, 1), stop: make(chan struct{}),
		ended: make(chan struct{})}
}

// take takes the lock that o has, or had, unless that has shown a sign of life since
// revision. After an error that is not known: the next look tells.
func (l *clusterLock) take(ctx context.Context, o holder, revision int64) (taken bool, err error) {
	l.owner.Since, l.owner.Takeovers = time.Now(), o.Takeovers
	if revision > 0 && !o.Released && o.Token != l.owner.Token {
		l.owner.Takeovers++
	}
	l.value, _ = json.Marshal(l.owner)
	key := l.d.key("lock")
	answer, err := l.d.client.post(ctx, "kv/txn", transaction{
		Compare: []comparison{{"MOD", keyValue{Key: key, Revision: revision}}},
		Success: []operation{putKey(key, l.value), putKey(l.d.key("step"), l.step(0))},
	})
	if err != nil || !answer.Succeeded {
		return false, err
	}
	l.confirm(l.owner.Since)
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	return true, nil
}

// confirm notes that a sign of life has arrived that was sent then.
func (l *clusterLock) confirm(sent time.Time) {
	l.confirmed.Store(&sent)
	l.d.opts.Status.Confirm(sent)
	select {
	case l.beaten <- struct{}{}:
	default:
	}
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
	for l.age() >= freshTime {
		select {
		case <-l.beaten:
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		}
	}
	return context.Cause(l.ctx)
}

// Look is Held: that knows by itself.
func (l *clusterLock) Look() error { return l.Held() }

// beat shows signs of life until the lock is lost or given back. One goroutine for a lock.
func (l *clusterLock) beat() {
	defer close(l.ended)
	for pause := beatTime; ; {
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
			return
		case <-l.stop:
			return
		}
		pause = l.show()
	}
}

// show shows one sign of life, and returns the time until the next.
func (l *clusterLock) show() time.Duration {
	ctx, cancel := context.WithTimeout(l.ctx, beatTime)
	defer cancel()
	sent := time.Now()
	answer, err := l.d.client.post(ctx, "kv/txn", transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), l.value)},
	})
	switch {
	case err == nil && answer.Succeeded:
		l.refused = 0
		l.confirm(sent)
		if l.silent { // there may be another leader
			l.silent = false
			l.d.client.preferLeader(l.ctx)
		}
		return beatTime
	case err == nil:
		l.lost(ErrTakenOver)
	case isFinal(err):
		if l.refused++; l.refused >= len(l.d.client.members) {
			l.lost(named(err))
		}
	case sent.Sub(*l.confirmed.Load()) >= patienceTime: // by the clock that nobody sets
		l.lost(fmt.Errorf("%w for %v: %w", ErrUnreachable, patienceTime, err))
	case !l.silent:
		l.silent = true
		l.d.log.Warn("etcd does not answer, trying again", "error", err, "until", patienceTime)
	}
	return pauseTime
}

// Close gives the lock back, if it is not lost: then another one can have it at once.
func (l *clusterLock) Close() error {
	close(l.stop)
	<-l.ended
	if l.ctx.Err() == nil {
		l.release()
	}
	l.lost(errors.New("the lock was given back"))
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
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	l.d.client.call(ctx, "kv/txn", transaction{
		Compare: []comparison{l.isOurs()},
		Success: []operation{putKey(l.d.key("lock"), value)},
	})
}
