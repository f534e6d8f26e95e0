package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest/protocol"
)

// Ensure that clients whose Commits are taken back now and then get the same answers as those of a
// server in memory that was never sent what was refused, and that each request counts once.
func TestRefusedLikeNeverSent(t *testing.T) {
	first, seeds := 1, 20
	if n, err := strconv.Atoi(os.Getenv("REV3_SEEDS")); err == nil {
		seeds = n
	}
	total := 0
	for seed := first; seed < first+seeds; seed++ {
		inBubble(t, func(t *testing.T, n *fakeNet) {
			random := rand.New(rand.NewPCG(uint64(seed), 5))
			dir, gate := newFullStore()
			dir.Segment, dir.Compact = 4000, 4000
			db := storeIn(t, dir, nil)
			n.server.db = db
			if seed%2 == 0 {
				n.server.db = slowPuts{db}
			}
			twin, memory := newFakeNet(), kvstore.NewMemory()
			twin.server.db = memory
			const number = 4
			var clients, twins []*protocol.Client
			for range number {
				clients, twins = append(clients, n.DialAck(t)), append(twins, twin.DialAck(t))
			}
			request := func(i int) string {
				key, v := fmt.Sprintf("%c%d", 'a'+i, random.IntN(3)), random.IntN(4)
				forms := []string{"Put:K:V", "Put:K:V", "Set:K:V", "Get:K", "Get:K", "Delete:K", "Update:K:V:W",
					"Swap:K:V:W", "Remove:K:V", "Add:K:V", "Take:K", "Take:K:1", "Count:K", "Keys:P", "Dump:P", "Ping",
					"Lease:K:1000:V", "Expire:K:2000", "Expire:K:0", "Nonsense", "Put:K:LONG"}
				text := forms[random.IntN(len(forms))]
				return strings.NewReplacer("K", key, ":V", fmt.Sprint(":v", v), ":W", fmt.Sprint(":w", v), ":P",
					fmt.Sprintf(":%c", 'a'+i), "LONG", strings.Repeat("x", 900)).Replace(
					strings.ReplaceAll(strings.ReplaceAll(text, "Keys", "KEYS"), "KEYS", "keys"))
			}
			read := func(c *protocol.Client) (lines []string) {
				for {
					line := c.Read()
					if i := strings.LastIndexByte(line, ':'); strings.HasPrefix(line, ": Expire") {
						line = line[:i] // the time differs a little
					}
					lines = append(lines, line)
					if strings.HasPrefix(line, ":OK") || strings.HasPrefix(line, ":ERROR") ||
						strings.HasPrefix(line, ":PONG") {
						return lines
					}
				}
			}
			refused, sent := 0, 0
			for step := range 60 {
				if random.IntN(2) == 0 {
					dir.knows = random.IntN(2) == 0
					dir.fill()
				}
				held := random.IntN(2) == 0
				if held {
					<-gate
				}
				var asked [number][]string
				for i, c := range clients {
					for range random.IntN(8) {
						asked[i] = append(asked[i], request(i))
					}
					c.Send(strings.Join(append(asked[i], ""), "\n"))
					if random.IntN(2) == 0 {
						synctest.Wait()
					}
				}
				if held {
					synctest.Wait()
					if random.IntN(3) == 0 {
						dir.fill()
					}
					gate <- true
				}
				for i, c := range clients {
					for _, line := range asked[i] {
						sent++
						got := read(c)
						if strings.Contains(got[0], "the disk is full, nothing was changed") {
							refused++
							continue
						}
						twins[i].Send(line + "\n")
						want := read(twins[i])
						if strings.HasPrefix(want[0], ":ERROR") && strings.HasPrefix(got[0], ":ERROR") {
							continue // the line's number differs
						}
						if !reflect.DeepEqual(got, want) {
							t.Fatalf("seed %d, step %d, %.40q: got %.300q, want %.300q", seed, step, line, got, want)
						}
					}
				}
				dir.makeRoom()
				if random.IntN(3) == 0 {
					pass(time.Duration(random.IntN(3000)) * time.Millisecond)
				}
			}
			total += refused
			if got, want := n.server.requestsRun(), sent+number; got != want { // and each client's Ack
				t.Errorf("seed %d: %d requests count, %d were sent", seed, got, want)
			}
			again, err := durable.Open(t.Context(), dir.Kill(), durable.Options{})
			must(t, err)
			if got, want := maps.Collect(again.All()), maps.Collect(memory.All()); !reflect.DeepEqual(got, want) {
				t.Errorf("seed %d: after a kill there is\n%.600q, want\n%.600q", seed, fmt.Sprint(got), fmt.Sprint(want))
			}
			again.Close()
			t.Logf("seed %d: %d sent, %d refused, %d counted", seed, sent, refused, n.server.requestsRun())
			for _, c := range twins {
				c.Close()
			}
			twin.server.Close()
			n.server.Close()
			must(t, db.Close())
		})
		if t.Failed() {
			return
		}
	}
}
