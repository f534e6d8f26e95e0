package etcd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// etcd has a quota. Once its database is larger it refuses all that writes, of everybody, until
// somebody makes room and says so: also our signs of life, and the records of a Delete. So
// writes are refused before that, and the last room is kept for what frees.
const (
	marginMost  = 64 << 20 // bytes of the quota that are kept for what frees, or an eighth
	garbageMost = 8 << 20  // bytes that were replaced or removed, until etcd may forget them
	pieceExtra  = 512      // bytes that a piece takes beside its own, about
	surveyTime  = time.Second
)

// errFull says what makes room.
var errFull = fmt.Errorf("etcd is full: compact and defragment it, or raise its "+
	"--quota-backend-bytes, then etcdctl alarm disarm: %w", syscall.ENOSPC)

// room is what is known of a cluster's room. Any goroutine may ask.
type room struct {
	piece   atomic.Int64 // bytes of the next piece
	full    atomic.Bool  // etcd refuses all that writes
	quota   atomic.Int64 // of the members; 0: not known
	spent   atomic.Int64 // bytes written so far
	limit   atomic.Int64 // of spent, as of the last survey
	garbage atomic.Int64 // bytes that etcd keeps of the past, and nobody needs
}

// RoomFor goes by what the last survey has found, and what was written since.
func (d *directory) RoomFor(size int64, frees bool) error {
	r := &d.client.room
	quota := r.quota.Load()
	margin := min(quota/8, marginMost)

	// A quarter stays even so, for a quota that is used up stops our signs of life as well.
	if frees {
		margin /= 4
	}

	if r.full.Load() || quota > 0 && r.spent.Load()+size+margin > r.limit.Load() {
		return errFull
	}
	return nil
}

// note takes down what room the members have, asked when spent was that: until the quota, or
// in their databases, where what is free may not be in one piece.
func (r *room) note(members []response, spent int64) {
	// If no member says its size, nothing is limited.
	least := int64(math.MaxInt64) - spent
	for _, m := range members {
		if m.Quota > 0 {
			r.quota.Store(m.Quota)
		}
		if m.Size > 0 {
			// A database may grow to its quota, or use what is free in it: half of that, for the
			// free room is in parts.
			least = min(least, max(r.quota.Load()-m.Size, (m.Size-m.InUse)/2))
		}
	}

	r.limit.Store(spent + least)
}

// findQuota looks for the quota in a member's metrics: before 3.6 its status does not say it.
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
		if text, ok := strings.CutPrefix(lines.Text(), "etcd_server_quota_backend_bytes "); ok {
			quota, _ := strconv.ParseFloat(text, 64)
			c.quota.Store(int64(quota))
		}
	}
}

// forget has etcd forget the past, where ours has become large: the cluster may do that by
// itself, and need not.
func (c *cluster) forget(ctx context.Context) {
	garbage := c.garbage.Load()
	if garbage < garbageMost {
		return
	}

	_, err := c.try(ctx, "kv/compaction", map[string]int64{"revision": c.revision.Load()})

	// An error of etcd's own counts as well: it may have forgotten all of this before.
	if !errors.Is(err, ErrUnreachable) {
		c.garbage.Add(-garbage)
	}
}

// noteFull takes down whether etcd refuses all that writes, and says so when that changes.
func (c *cluster) noteFull(isFull bool) {
	if c.full.Swap(isFull) == isFull {
		return
	}

	if isFull {
		c.log.Error("writes are refused, and reads go on", "error", errFull)
	} else {
		c.log.Info("etcd has room again")
	}
}

// attend looks after the cluster while the lock is held: who leads, what room there is, whether
// all is there, what may be forgotten. One goroutine for a lock, which ends with it.
func (l *clusterLock) attend() {
	c := l.d.client
	c.findQuota(l.ctx)

	for l.ctx.Err() == nil {
		c.survey(l.ctx)
		l.d.check()
		c.forget(l.ctx)
		wait(l.ctx, surveyTime)
	}
}

// tookPiece makes the next piece as large as the link can do it: this one of size took so long.
func (c *cluster) tookPiece(size int, took time.Duration) {
	// A piece much smaller than the most says nothing of what the link can do.
	if most := c.piece.Load(); int64(size) >= most/2 && most < pieceMost && took < limit(size)*2/3 {
		c.piece.CompareAndSwap(most, 2*most)
	}
}

// wasTooMuch makes the next piece smaller than one of size.
func (c *cluster) wasTooMuch(size int) {
	most := c.piece.Load()
	c.piece.CompareAndSwap(most, max(pieceLeast, min(most, int64(size))/2))
}
