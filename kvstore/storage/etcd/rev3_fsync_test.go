package etcd

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that with -fsync 1s reads go on while etcd is full, whichever request finds that out: also if
// the Commit that finds it has filled the file, so that a new one is due.
func TestEtcdReadsWhileAFullFileWaitsForRoom(t *testing.T) {
	for n := 1; n <= 8; n++ {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), &worldDir{dir.directory, 60 << 10},
				durable.Options{Fsync: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			commit(t, d, h, "k", "v")
			<-time.After(3*time.Second + beatTime/2)
			full := w.count() + n
			w.mu.Lock()
			w.before = func(number int) {
				if number == full {
					e.setFull(true)
				}
			}
			w.mu.Unlock()
			answered := make(chan string, 100)
			ended := make(chan bool)
			go func() {
				defer close(ended)
				for i := range 10 {
					if i%2 == 0 && d.Room("k", 70<<10, 0) == nil {
						value := string(mustRandom(70 << 10))
						d.Put("k", value)
						h.Done.Put("k", value)
					}
					began := time.Now()
					if err := d.Commit(); err != nil {
						t.Errorf("request %d: %v", n, err)
						return
					}
					if took := time.Since(began); took > 5*time.Second {
						answered <- fmt.Sprintf("request %d: Commit number %d takes %v", n, i, took)
					}
					<-time.After(100 * time.Millisecond)
				}
			}()
			<-time.After(time.Minute)
			e.setFull(false)
			<-ended
			select {
			case what := <-answered:
				t.Error(what)
			default:
			}
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			h.Told = h.Done.Clone()
			checkKept(t, h, after, fmt.Sprint("request ", n))
		})
	}
}
