package etcd

import (
	"log/slog"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

func TestRv3Fuzz(t *testing.T) {
	from, _ := strconv.Atoi(os.Getenv("FROM"))
	to, _ := strconv.Atoi(os.Getenv("TO"))
	taken, waits, bad := 0, 0, 0
	for seed := from; seed < to; seed++ {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(uint64(seed), 3))
				e, h, unsure := newFakeEtcd(), storetest.NewHistory(), false
				var undone []storetest.Model
				for life := range 4 {
					dir, w := e.dir(t, t.Context(), fmt.Sprintf("s%d:1", life))
					var fsync time.Duration
					goneOnce := false
					d, err := durable.Open(t.Context(), &worldDir{dir.directory, 3000}, durable.Options{Fsync: fsync, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
					if err != nil {
						t.Error("open", life, err)
						return
					}
					if unsure {
						w.kill()
						<-d.Lost()
						d.Close()
						return
					}
					if !h.Told.Equal(d) && !h.Done.Equal(d) {
						bad++
						for i, m := range undone {
							if m.Equal(d) {
								t.Errorf("it holds what was undone, %d of %d", i, len(undone))
							}
						}
						t.Errorf("seed %d life %d: it does not hold what it should, unsure %v", seed, life, unsure)
					}
					if t.Failed() {
						w.kill()
						<-d.Lost()
						d.Close()
						return
					}
					if h.Told.Equal(d) {
						h.Done = h.Told.Clone()
					} else {
						h.Told = h.Done.Clone()
					}
					w.mu.Lock()
					w.draw = func() etcdFault {
						if r.IntN(40) > 0 {
							return ""
						}
						switch r.IntN(6) {
						case 0:
							return lostAnswer
						case 1:
							return lostRequest
						case 2:
							return noLeader
						}
						e.full = true
						time.AfterFunc(time.Duration(r.IntN(3000))*time.Millisecond, func() { e.setFull(false) })
						return ""
					}
					w.before = func(int) {
						if !goneOnce && r.IntN(60) == 0 && os.Getenv("GONE") != "" {
							goneOnce = true
							e.mu.Lock()
							var own []string
							for _, k := range e.keys {
								if strings.HasPrefix(k, "kv/d/") || strings.HasPrefix(k, "kv/n/") {
									own = append(own, k)
								}
							}
							if len(own) > 0 {
								k := own[len(own)-1-r.IntN(min(len(own), 6))]
								e.remove(keyRange{Key: []byte(k)})
							}
							e.mu.Unlock()
						}
						if r.IntN(10) == 0 && os.Getenv("REPLAY") != "" {
							e.mu.Lock()
							if len(w.sent) > 0 && !e.full {
								e.txn(w.sent[max(0, len(w.sent)-1-r.IntN(12))])
							}
							e.mu.Unlock()
						}
					}
					w.mu.Unlock()
					stop := 5 + r.IntN(60)
					for n := 0; n < stop; n++ {
						for range r.IntN(4) {
							storetest.RandomStep(t, r, d, h.Done)
						}
						if r.IntN(10) == 0 {
							v := strings.Repeat(string(rune('a'+r.IntN(26))), 4000)
							d.Set("large", v)
							h.Done.Set("large", v)
						}
						began := time.Now()
						err := d.Commit()
						if time.Since(began) > time.Second {
							waits++
						}
						if errors.Is(err, kvstore.ErrTakenBack) {
							taken++
							undone = append(undone, h.Done)
							h.Done = h.Told.Clone()
						} else if err != nil {
							t.Logf("seed %d: ends: %v", seed, err)
							unsure = true
							break
						}
						h.Told = h.Done.Clone()
						if !h.Told.Equal(d) {
							t.Errorf("seed %d life %d n %d: memory is wrong", seed, life, n)
							break
						}
						if r.IntN(4) == 0 {
							<-time.After(time.Duration(r.IntN(1500)) * time.Millisecond)
						}
						if r.IntN(3) == 0 {
							d.AwaitCompaction()
						}
					}
					if os.Getenv("GONE") != "" && !unsure {
						w.mu.Lock()
						w.draw, w.before = nil, nil
						w.mu.Unlock()
						for range 3 {
							<-time.After(5 * time.Second)
							if err := d.Commit(); err != nil {
								t.Logf("seed %d: at the end %v", seed, err)
								unsure = true
							}
						}
						if !h.Told.Equal(d) {
							t.Errorf("seed %d: memory is wrong", seed)
						}
					}
					if r.IntN(3) > 0 {
						w.kill()
						<-d.Lost()
						d.Close()
					} else {
						w.mu.Lock()
						w.draw, w.before = nil, nil
						w.mu.Unlock()
						<-time.After(5 * time.Second)
						if err := d.Close(); err != nil {
							t.Logf("seed %d: close %v", seed, err)
						}
					}
					<-time.After(5 * time.Second)
					e.setFull(false)
				}
			})
		})
		_ = ok
	}
	t.Log("bad", bad, "taken", taken, "waits", waits)
}
