package etcd

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvserver/kvstore/storetest"
	worlds "kvserver/kvstore/storetest/world"
)

// mixed is eight clients that ask the server that serves about lists, with every verb, and what
// they are answered. All ask about one list for a short time, then about the next one.
type mixed struct {
	t     *testing.T
	addrs []string
	clock atomic.Int64

	mu      sync.Mutex
	drawn   int                               // how many requests there were so far
	asked   map[string][]*storetest.Operation // the requests about each list that is not checked yet
	checked int                               // how many requests were checked
}

// perList is how many requests are about one list.
const perList = 100

// list is the key of the list that is asked about now. The caller has mu.
func (m *mixed) list() string { return fmt.Sprint("mixed", m.drawn/perList) }

func (m *mixed) tick() int64 { return m.clock.Add(1) }

// run runs the clients until ctx is done.
func (m *mixed) run(ctx context.Context) {
	var all sync.WaitGroup
	for id := range 8 {
		random := rand.New(rand.NewPCG(uint64(id), 0))
		all.Go(func() {
			for ctx.Err() == nil {
				for _, addr := range m.addrs {
					if conn, err := net.Dial("tcp", addr); err == nil {
						m.ask(ctx, conn, random)
					}
					<-time.After(10 * time.Millisecond) // for seconds there may be no server
				}
			}
		})
	}
	all.Wait()
}

// ask sends requests over one connection, until that breaks or ctx is done.
func (m *mixed) ask(ctx context.Context, conn net.Conn, random *rand.Rand) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	fmt.Fprintln(conn, "Ack")
	_, err := r.ReadString('\n')

	for (err == nil || err == worlds.ErrRefused) && ctx.Err() == nil {
		// It is in the history from now on: it may be run, and never answered.
		m.mu.Lock()
		m.drawn++
		key := m.list()
		o := storetest.Operation{Request: worlds.DrawRequest(random, fmt.Sprint(m.drawn))}
		noted := o
		noted.Invoked = m.tick()
		m.asked[key] = append(m.asked[key], &noted)
		m.mu.Unlock()

		conn.SetDeadline(time.Now().Add(40 * time.Second))
		err = worlds.Ask(conn, r, key, &o, m.tick)
		if err == nil {
			m.mu.Lock()
			noted = o
			m.mu.Unlock()
		}
		<-time.After(10 * time.Millisecond)
	}
}

// check fails the test unless one order of requests explains all that was answered about each list
// so far, and what the list holds now. It checks each list once.
func (m *mixed) check(addr string) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		m.t.Error(err)
		return
	}
	defer conn.Close()

	r := bufio.NewReader(conn)
	fmt.Fprintln(conn, "Ack")
	if _, err := r.ReadString('\n'); err != nil {
		m.t.Error(err)
		return
	}

	// The last list is still being asked about.
	m.mu.Lock()
	lists := m.asked
	last := m.list()
	m.asked = map[string][]*storetest.Operation{last: lists[last]}
	delete(lists, last)
	m.mu.Unlock()

	for key, asked := range lists {
		var history []storetest.Operation
		m.mu.Lock()
		for _, o := range asked {
			history = append(history, *o)
		}
		m.mu.Unlock()

		final := storetest.Operation{Request: storetest.Request{Verb: "Get"}}
		if err := worlds.Ask(conn, r, key, &final, m.tick); err != nil {
			m.t.Error(err)
			return
		}

		if err := storetest.CheckLinearizable(history, final.Got); err != nil {
			slices.SortFunc(history, func(a, b storetest.Operation) int {
				return int(a.Invoked - b.Invoked)
			})
			m.t.Errorf("%s ends as %q: %v; %+v", key, final.Got, err, history)
		}
		m.checked += len(history)
	}
}
