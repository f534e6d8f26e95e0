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
	garbageLess = 64 << 10 // the same where room is scarce
	pieceExtra  = 512      // bytes that a piece takes beside its own, about
	quotaShare  = 8        // the part of what is left until the quota that a piece may have
	surveyTime  = time.Second
	scarceTime  = surveyTime / 10 // the same where room is scarce: others may take it meanwhile
)

// errFull says what makes room.
var errFull = fmt.Errorf("etcd is full: compact and defragment it, or raise its "+
	"--quota-backend-bytes, then etcdctl alarm disarm: %w", syscall.ENOSPC)

// room is what is known of a cluster's room. Any goroutine may ask.
type room struct {
	piece   atomic.Int64 // bytes of the next piece
	most    atomic.Int64 // bytes that it may have, as of the last survey
	full    atomic.Bool  // etcd refuses all that writes
	quota   atomic.Int64 // of the members; 0: not known
	spent   atomic.Int64 // bytes written so far
	limit   atomic.Int64 // of spent, as of the last survey
	others  atomic.Int64 // by how much it sank from the survey before: what others have written
	refused atomic.Bool  // somebody has asked for room since the last survey, and there was none
	garbage atomic.Int64 // bytes that etcd keeps of the past, and nobody needs
}

// RoomFor goes by what the last survey has found, and what was written since. Others may write as
// much as they did before the last survey, until the next two have ended.
func (d *directory) RoomFor(size int64, frees bool) error {
	r := &d.client.room
	margin := r.margin()

	// A quarter stays even so, for a quota that is used up stops our signs of life as well.
	if frees {
		margin /= 4
	}

	if r.full.Load() || r.quota.Load() > 0 && r.left() < size+margin+2*r.others.Load() {
		r.refused.Store(true)
		return errFull
	}
	return nil
}

// margin is how many bytes are kept for what frees.
func (r *room) margin() int64 { return min(r.quota.Load()/8, marginMost) }

// left is how many bytes may be written before there is no room.
func (r *room) left() int64 { return r.limit.Load() - r.spent.Load() }

// isScarce tells whether writes are refused, or may soon be.
func (r *room) isScarce() bool {
	return r.full.Load() || r.quota.Load() > 0 && r.left() < 3*r.margin()+2*r.others.Load()
}

// note takes down what room the members have, asked when spent was that: until the quota, and in
// their databases. A request that is larger than what is left until the quota is refused, and then
// all are, whatever is free in the database: so pieces become smaller before that. It returns whether
// that has happened.
func (r *room) note(members []response, spent int64) (isFull bool) {
	// If no member says its size, nothing is limited.
	least, most := int64(math.MaxInt64)-spent, int64(pieceMost)
	for _, m := range members {
		isFull = isFull || strings.Contains(strings.Join(m.Errors, " "), "NOSPACE")
		if m.Quota > 0 {
			r.quota.Store(m.Quota)
		}
		if m.Size > 0 {
			// A database may grow to its quota, and use what is free in it: not all of that, for it is
			// in parts.
			growth := max(0, r.quota.Load()-m.Size)
			least = min(least, growth+(m.Size-m.InUse)*3/4)
			most = min(most, growth/quotaShare)
		}
	}

	r.others.Store(max(0, r.limit.Swap(spent+least)-spent-least))
	if r.quota.Load() > 0 {
		r.most.Store(max(most, pieceLeast))
		r.piece.Store(min(r.piece.Load(), r.most.Load()))
	}
	return isFull
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
func (c *cluster) forget(ctx context.Context, isShort bool) {
	garbage := c.garbage.Load()
	if garbage < garbageLess || garbage < garbageMost && !isShort {
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
	for l.ctx.Err() == nil {
		// The quota may be another one once members have been started again.
		isShort := c.refused.Swap(false) || c.isScarce()
		if c.quota.Load() == 0 || isShort {
			c.findQuota(l.ctx)
		}
		c.survey(l.ctx)
		l.d.check()
		c.forget(l.ctx, isShort)

		// Where room is scarce, others may take the rest of it within a second.
		end := time.Now().Add(surveyTime)
		for c.isScarce() && time.Until(end) > scarceTime && l.ctx.Err() == nil {
			wait(l.ctx, scarceTime)
			c.survey(l.ctx)
		}
		wait(l.ctx, time.Until(end))
	}
}

// tookPiece makes the next piece as large as the link can do it: this one of size took so long.
func (c *cluster) tookPiece(size int, took time.Duration) {
	// A piece much smaller than the most says nothing of what the link can do.
	if most := c.piece.Load(); int64(size) >= most/2 && most < c.most.Load() && took < limit(size)*2/3 {
		c.piece.CompareAndSwap(most, min(2*most, c.most.Load()))
	}
}

// wasTooMuch makes the next piece smaller than one of size.
func (c *cluster) wasTooMuch(size int) {
	most := c.piece.Load()
	c.piece.CompareAndSwap(most, max(pieceLeast, min(most, int64(size))/2))
}
