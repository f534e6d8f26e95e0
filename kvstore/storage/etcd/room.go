package etcd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync/atomic"
	"syscall"
	"time"
)

// etcd has a quota. Once a member's database is larger, etcd refuses every put, of everybody, until
// an operator has made room and disarmed the alarm: also our signs of life, and the records of a
// Delete. So RoomFor refuses writes before that, then Removes, Takes and compactions, and keeps
// the last room for Deletes.
const (
	marginMost  = 64 << 20 // bytes kept for what frees room, or an eighth of the quota, if less
	garbageMost = 8 << 20  // bytes that we have replaced or removed, until etcd is to forget them
	pieceExtra  = 512      // bytes that a piece takes in the database beside its value, about
	surveyTime  = time.Second
)

// errFull says how an operator makes room.
var errFull = fmt.Errorf("etcd is full: compact and defragment it, or raise its "+
	"--quota-backend-bytes, then etcdctl alarm disarm: %w", syscall.ENOSPC)

// room is what is known of the room in a cluster's databases. Any goroutine may use it.
type room struct {
	piece   atomic.Int64 // bytes of the next piece as it is sent, at most, without joined ones
	full    atomic.Bool  // etcd refuses every put
	quota   atomic.Int64 // bytes of a member's database, at most; 0: not known
	spent   atomic.Int64 // bytes that we have written so far
	plain   atomic.Int64 // the same bytes before they were packed
	limit   atomic.Int64 // what spent may become, as of the last survey
	garbage atomic.Int64 // bytes that we have replaced or removed, and etcd still keeps
}

// RoomFor answers from the last survey, and from what was written since.
func (d *directory) RoomFor(size, toDelete int64, frees bool) error {
	r := &d.client.room
	quota := r.quota.Load()

	// Even Deletes leave a quarter of the margin: a full etcd would refuse our signs of life, too.
	// Removes and compactions leave more, for Deletes. Each Delete may be a piece of its own, which
	// takes many times its bytes. Half of the margin is enough for nearly all stores.
	margin := min(quota/8, marginMost)
	left := margin
	if frees {
		left = margin/4 + min(16*toDelete, margin/2)
	}

	// Much data, such as a snapshot, most likely shrinks as what was written before did.
	spent := r.spent.Load()
	if plain := r.plain.Load(); size > pieceMost && plain > spent {
		size = int64(float64(size) * float64(spent) / float64(plain))
	}

	if r.full.Load() || quota > 0 && spent+size+left > r.limit.Load() {
		return errFull
	}
	return nil
}

// share is most, or less in a small database.
func (r *room) share(most int64) int64 {
	if quota := r.quota.Load(); quota > 0 {
		most = min(most, quota/16)
	}
	return most
}

// note sets the limit from the members' answers to a survey that began when spent had that value.
// The member with the least room counts.
func (r *room) note(members []response, spent int64) {
	least := int64(math.MaxInt64)
	for _, m := range members {
		if m.Quota > 0 {
			r.quota.Store(m.Quota)
		}
		if m.Size > 0 {
			// A database may grow to its quota, or use the free room in it: half of that, because
			// it is in small parts.
			least = min(least, max(r.quota.Load()-m.Size, (m.Size-m.InUse)/2))
		}
	}

	// If no member has answered its size, the limit stays.
	if least < math.MaxInt64 {
		r.limit.Store(spent + least)
	}
}

// findQuota reads the quota from a member's metrics: before etcd 3.6 it is not in the status.
func (c *cluster) findQuota(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()

	r, err := http.NewRequestWithContext(ctx, "GET", c.members[c.member.Load()]+"/metrics", nil)
	if err != nil {
		return
	}

	answer, err := c.http.Do(r)
	if err != nil {
		return
	}
	defer answer.Body.Close()

	// The quota is written as a floating-point number, such as 2.147483648e+09.
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		quota := 0.0
		if n, _ := fmt.Sscanf(lines.Text(), "etcd_server_quota_backend_bytes %g", &quota); n == 1 {
			c.quota.Store(int64(quota))
		}
	}
}

// forget compacts etcd's history once it has much garbage of ours, or any while there is no room.
// The cluster may be configured to do that by itself, or may not.
func (c *cluster) forget(ctx context.Context, isFull bool) {
	garbage := c.garbage.Load()
	if garbage == 0 || garbage < c.share(garbageMost) && !isFull {
		return
	}

	_, err := c.try(ctx, "kv/compaction", map[string]int64{"revision": c.revision.Load()})

	// A refusal is as good: etcd may have compacted this revision already.
	if !errors.Is(err, ErrUnreachable) {
		c.garbage.Add(-garbage)
	}
}

// noteFull notes whether etcd refuses every put, and logs a change of that.
func (c *cluster) noteFull(isFull bool) {
	if c.full.Swap(isFull) == isFull {
		return
	}

	if isFull {
		c.log.Error("writes are refused, those under way wait, and reads go on", "error", errFull)
	} else {
		c.log.Info("etcd has room again")
	}
}

// attend looks after the cluster while the lock is held: who leads, how much room there is, whether
// all that we have written is there, and whether its history is to be compacted. It is one
// goroutine for each lock, and ends when the lock is lost or given back.
func (l *clusterLock) attend() {
	c := l.d.client
	for l.ctx.Err() == nil {
		c.survey(l.ctx)
		l.d.check()
		c.forget(l.ctx, l.d.RoomFor(0, 0, false) != nil)
		wait(l.ctx, surveyTime)
	}
}

// tookPiece doubles the size of the next piece if the link is fast enough: this piece of size bytes
// took that long.
func (c *cluster) tookPiece(size int, took time.Duration) {
	// A piece that is much smaller than the most says nothing about the link.
	if most := c.piece.Load(); int64(size) >= most/2 && took < limit(size)*2/3 {
		c.piece.CompareAndSwap(most, 2*most)
	}
}

// wasTooMuch makes the next pieces half as large as this one of size bytes, at least pieceLeast.
func (c *cluster) wasTooMuch(size int) {
	most := c.piece.Load()
	c.piece.CompareAndSwap(most, max(pieceLeast, min(most, int64(size))/2))
}
