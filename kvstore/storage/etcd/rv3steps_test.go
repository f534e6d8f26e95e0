package etcd

import (
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

func TestRv3Steps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		end := dir.access.begin()
		e.setFull(true)
		t.Log(dir.beginSteps()) // as recover does
		e.setFull(false)
		end()
		if _, err := dir.Create("snap-9.log.tmp"); err != nil {
			t.Error(err)
		}
		<-time.After(time.Second)
		w.kill()
		<-d.Lost()
		d.Close()
	})
}
