package etcd

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// a refused put that the network delivers a second time, later.
func TestRv3RefusedComesAgain(t *testing.T) {
	for _, pause := range []time.Duration{100 * time.Millisecond, 2 * time.Second} {
		for _, crashBefore := range []bool{false, true} {
			for _, second := range []string{"BBBB", "longer than that"} {
				t.Run(fmt.Sprint(pause, crashBefore, second), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						name := fmt.Sprint(pause, crashBefore, second)
						e, h := newFakeEtcd(), storetest.NewHistory()
						dir, w := e.dir(t, t.Context(), "first:9999")
						d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
						if err != nil {
							t.Fatal(err)
						}
						commit(t, d, h, "k", "v")
						<-time.After(2500 * time.Millisecond)
						e.setFull(true)
						d.Put("k", "AAAA")
						err = d.Commit()
						if !errors.Is(err, kvstore.ErrTakenBack) {
							t.Fatal(err)
						}
						var refused []transaction
						w.mu.Lock()
						for _, s := range w.sent {
							for _, op := range s.Success {
								if op.Put != nil && strings.Contains(string(op.Put.Key), "kv/d/") {
									refused = append(refused, s)
									break
								}
							}
						}
						last := refused[len(refused)-1]
						w.mu.Unlock()
						e.setFull(false)
						<-time.After(pause)
						h.Done = h.Told.Clone()
						if !crashBefore {
							commit(t, d, h, "k", second)
						}
						e.mu.Lock()
						a, err := e.txn(last)
						e.mu.Unlock()
						t.Logf("%s: late: %v %v key %s", name, a.Succeeded, err, last.Success[0].Put.Key)
						for k := range e.kvs {
							t.Logf("   %s", k)
						}
						w.kill()
						<-d.Lost()
						d.Close()
						after, _ := e.dir(t, t.Context(), "second:9999")
						checkKept(t, h, after, name)
					})
				})
			}
		}
	}
}
