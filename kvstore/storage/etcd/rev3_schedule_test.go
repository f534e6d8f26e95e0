package etcd

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that of a server whose requests are slow or lost, and whose cluster is full now and then, the
// next one finds what was answered, and perhaps the Commit that had no answer, and nothing refused.
func TestEtcdRefusedSchedules(t *testing.T) {
	first, seeds := 1, 20
	if n, err := strconv.Atoi(os.Getenv("REV3_SEEDS")); err == nil {
		seeds = n
	}
	if n, err := strconv.Atoi(os.Getenv("REV3_SEED")); err == nil {
		first = n
	}
	taken, heals := 0, 0
	for seed := first; seed < first+seeds; seed++ {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(uint64(seed), 3))
			e, told := newFakeEtcd(), storetest.NewModel()
			segment := []int64{1500, 60 << 10, 16 << 20}[seed%3]
			doubts := []storetest.Model{told}
			for life := range 4 {
				dir, w := e.dir(t, t.Context(), fmt.Sprintf("life%d:1", life))
				log := slog.New(slog.NewTextHandler(t.Output(), nil))
				if os.Getenv("REV3_LOG") == "" {
					log = slog.New(slog.DiscardHandler)
				}
				dir.log, dir.client.log = log, log
				d, err := durable.Open(t.Context(), &worldDir{dir.directory, segment}, durable.Options{Log: log})
				if err != nil {
					t.Errorf("seed %d, life %d: %v", seed, life, err)
					return
				}
				isGood := false
				for _, m := range doubts {
					if m.Equal(d) {
						told, isGood = m, true
					}
				}
				if !isGood {
					t.Errorf("seed %d, life %d: the store holds something else", seed, life)
					d.Close()
					return
				}
				draws := rand.New(rand.NewPCG(uint64(seed), uint64(life)))
				often := 4 + draws.IntN(30)
				kill := 30 + draws.IntN(400)
				w.mu.Lock()
				w.draw = func() etcdFault {
					if kill--; kill == 0 {
						return []etcdFault{killed, killedAfter}[draws.IntN(2)]
					}
					if draws.IntN(often) > 0 {
						return ""
					}
					return []etcdFault{delayed, delayed, delayed, lostRequest, doneTwice, tooLate, lostAnswer,
						briefSpace, briefSpace, lastSpace, noLeader}[draws.IntN(11)]
				}
				w.mu.Unlock()
				for {
					model := told.Clone()
					doubts = []storetest.Model{told}
					for range random.IntN(4) {
						key, n := fmt.Sprint("k", random.IntN(4)), random.IntN(1<<random.IntN(18))
						value := fmt.Sprint(random.Uint64()) + string(noise[:n])
						switch random.IntN(8) {
						case 0:
							d.Delete(key)
							model.Delete(key)
						case 1, 2:
							d.Put(key, value)
							model.Put(key, value)
						default:
							d.Set(key, value)
							model.Set(key, value)
						}
						doubts = append(doubts, model.Clone())
					}
					err := d.Commit()
					log.Info("Commit", "err", err)
					if errors.Is(err, kvstore.ErrTakenBack) {
						taken++
						doubts = []storetest.Model{told}
						if !told.Equal(d) {
							t.Errorf("seed %d: memory after a Commit that is taken back", seed)
						}
					} else if err != nil {
						break
					} else {
						if !model.Equal(d) {
							t.Errorf("seed %d: memory after a Commit", seed)
						}
						told, doubts = model, []storetest.Model{model}
					}
					<-time.After(time.Duration(random.IntN(1200)) * time.Millisecond)
				}
				heals += int(dir.lock.missed.Load())
				w.kill()
				<-d.Lost()
				d.Close()
				e.setFull(false)
			}
			<-time.After(time.Minute)
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d Commits were taken back, %d times something counted as gone", taken, heals)
}
