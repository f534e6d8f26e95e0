package etcd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"kvserver/kvstore/storetest"
)

// etcdCluster is three members of etcd on this machine, and two servers with one prefix.
type etcdCluster struct {
	t       *testing.T
	dir     string
	binary  string // of kvserver
	ports   [3]int // of the members, for clients
	peers   [3]int // of the members, for each other
	members [3]*exec.Cmd
	addrs   [2]string // of the servers, for clients
	https   [2]string // of the servers, for -http

	mu      sync.Mutex
	servers [2]*exec.Cmd
	acked   []string      // values whose write was answered, in order
	reads   int           // how many reads were answered
	at      time.Time     // of the last answer to a write
	longest time.Duration // the longest time between two of these
}

func (c *etcdCluster) client(i int) string { return fmt.Sprintf("127.0.0.1:%d", c.ports[i]) }
func (c *etcdCluster) peer(i int) string   { return fmt.Sprintf("http://127.0.0.1:%d", c.peers[i]) }

// freePort returns a port that was free a moment ago.
func freePort(t *testing.T) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

// data is what the servers have as -data.
func (c *etcdCluster) data() string {
	return fmt.Sprintf("etcd://%s,%s,%s/kv", c.client(0), c.client(1), c.client(2))
}

// startMember starts a member, also one that has run before.
func (c *etcdCluster) startMember(i int) {
	var all []string
	for j := range c.members {
		all = append(all, fmt.Sprintf("m%d=%s", j, c.peer(j)))
	}

	c.members[i] = exec.Command("etcd", "--name", fmt.Sprint("m", i), "--data-dir",
		filepath.Join(c.dir, fmt.Sprint("m", i)),
		"--listen-client-urls", "http://"+c.client(i), "--advertise-client-urls", "http://"+c.client(i),
		"--listen-peer-urls", c.peer(i), "--initial-advertise-peer-urls", c.peer(i),
		"--initial-cluster", strings.Join(all, ","), "--initial-cluster-state", "new",
		"--quota-backend-bytes", fmt.Sprint(64<<20), "--snapshot-count", "1000")
	if err := c.members[i].Start(); err != nil {
		c.t.Fatal(err)
	}
}

// keepServer starts a server, and again whenever it has ended, as an init system does. One
// goroutine for each server, until ctx is done.
func (c *etcdCluster) keepServer(ctx context.Context, i int) {
	for ctx.Err() == nil {
		cmd := exec.CommandContext(ctx, c.binary, "-addr", c.addrs[i], "-data", c.data(), "-http",
			c.https[i])
		if err := cmd.Start(); err != nil {
			c.t.Error(err)
			return
		}

		c.mu.Lock()
		c.servers[i] = cmd
		c.mu.Unlock()
		cmd.Wait()
		<-time.After(100 * time.Millisecond)
	}
}

// server returns the current process of a server.
func (c *etcdCluster) server(i int) *exec.Cmd {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.servers[i]
}

// active returns which server serves. It waits until one does.
func (c *etcdCluster) active() int {
	for {
		for i, addr := range c.addrs {
			if conn, err := net.Dial("tcp", addr); err == nil {
				conn.Close()
				return i
			}
		}
		runtime.Gosched()
	}
}

// leader returns which member leads.
func (c *etcdCluster) leader() int {
	asker := &http.Client{Timeout: time.Second}
	for {
		for i := range c.members {
			var status struct {
				Leader string
				Header struct {
					Member string `json:"member_id"`
				}
			}

			answer, err := asker.Post("http://"+c.client(i)+"/v3/maintenance/status", "",
				strings.NewReader("{}"))
			if err == nil {
				json.NewDecoder(answer.Body).Decode(&status)
				answer.Body.Close()
				if status.Leader == status.Header.Member && status.Leader != "" {
					return i
				}
			}
		}
	}
}

// write sends one write after the other to the server that serves, and notes what was answered,
// until ctx is done.
func (c *etcdCluster) write(ctx context.Context) {
	for n := 0; ctx.Err() == nil; {
		for _, addr := range c.addrs {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				continue
			}

			r := bufio.NewReader(conn)
			fmt.Fprintln(conn, "Ack")
			_, err = r.ReadString('\n')

			for err == nil && ctx.Err() == nil {
				n++
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				fmt.Fprintf(conn, "Put:k:%d\n", n)
				var line string
				if line, err = r.ReadString('\n'); err != nil {
					break
				}

				c.mu.Lock()
				now := time.Now()
				if line == ":OK 1\n" {
					c.acked = append(c.acked, fmt.Sprint(n))
				}
				c.longest, c.at = max(c.longest, now.Sub(c.at)), now
				c.mu.Unlock()
			}

			conn.Close()
		}
	}
}

// read reads the list from the server that serves, and fails the test if a value is missing whose
// write was answered before.
func (c *etcdCluster) read(ctx context.Context) {
	for ctx.Err() == nil {
		for _, addr := range c.addrs {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				continue
			}

			r := bufio.NewReader(conn)
			for err == nil && ctx.Err() == nil {
				c.mu.Lock()
				told := slices.Clone(c.acked)
				c.mu.Unlock()

				var list []string
				if list, err = getList(conn, r); err == nil {
					c.mu.Lock()
					c.reads++
					c.mu.Unlock()
					c.check("a Get", list, told)
				}
			}

			conn.Close()
		}
	}
}

// ask sends a request to the members of etcd until one answers it.
func (c *etcdCluster) ask(at string, request, answer any) {
	body, err := json.Marshal(request)
	if err != nil {
		c.t.Fatal(err)
	}

	asker := &http.Client{Timeout: 10 * time.Second}
	for i := c.leader(); ; i = (i + 1) % len(c.members) {
		r, err := asker.Post("http://"+c.client(i)+"/v3/"+at, "", bytes.NewReader(body))
		if err != nil {
			continue
		}
		if r.StatusCode == http.StatusOK && answer != nil {
			json.NewDecoder(r.Body).Decode(answer)
		}
		r.Body.Close()
		if r.StatusCode == http.StatusOK {
			return
		}
	}
}

// delete removes the keys of etcd that begin with prefix.
func (c *etcdCluster) delete(prefix string) {
	c.ask("kv/deleterange", keyRange{Key: []byte(prefix), End: below([]byte(prefix))}, nil)
}

// killMembers kills all members, and starts them again once between has run.
func (c *etcdCluster) killMembers(between func()) {
	send("KILL", c.members[:]...)
	for _, m := range c.members {
		m.Wait()
	}
	between()
	for i := range c.members {
		c.startMember(i)
	}
}

// putBack makes all members forget the last few seconds, as after a restore of a backup.
func (c *etcdCluster) putBack() {
	copied := filepath.Join(c.dir, "copied")
	c.killMembers(func() {
		for i := range c.members {
			m := fmt.Sprint("m", i)
			err := os.CopyFS(filepath.Join(copied, m), os.DirFS(filepath.Join(c.dir, m)))
			if err != nil {
				c.t.Fatal(err)
			}
		}
	})

	// What is answered now will be forgotten.
	c.settle()
	c.killMembers(func() {
		for i := range c.members {
			m := filepath.Join(c.dir, fmt.Sprint("m", i))
			if err := errors.Join(os.RemoveAll(m),
				os.Rename(filepath.Join(copied, filepath.Base(m)), m)); err != nil {
				c.t.Fatal(err)
			}
		}
	})
}

// writeSmall makes many small commits, and fails the test if they are many pieces.
func (c *etcdCluster) writeSmall() {
	const writers, commits = 4, 2000
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			conn, err := net.Dial("tcp", c.addrs[c.active()])
			if err != nil {
				c.t.Error(err)
				return
			}
			defer conn.Close()

			r := bufio.NewReader(conn)
			for n := range commits {
				fmt.Fprintf(conn, "Set:small%d:%d\nPing\n", i, n)
				if line, err := r.ReadString('\n'); line != ":PONG\n" {
					c.t.Errorf("%q, %v", line, err)
					return
				}
			}
		})
	}
	wg.Wait()

	var answer found
	c.ask("kv/range", keyRange{Key: []byte("kv/d/"), End: []byte("kv/d0"), CountOnly: true}, &answer)
	if answer.Count > 1000 {
		c.t.Errorf("there are %d pieces", answer.Count)
	}
}

// fill fills the cluster until it refuses puts, faster than the server's surveys come, wants reads
// to be answered and writes to be refused, and makes room again. (The list that is written all the
// time has a write then that waits, and so do its readers.)
func (c *etcdCluster) fill() {
	value := make([]byte, 1<<20)

	for n := 0; ; n++ {
		rand.Read(value)
		body, _ := json.Marshal(keyValue{Key: fmt.Append(nil, "other/", n), Value: value})
		r, err := http.Post("http://"+c.client(c.leader())+"/v3/kv/put", "", bytes.NewReader(body))
		if err != nil {
			c.t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			break
		}
	}

	<-time.After(2 * beatTime) // then the server knows
	conn, err := net.Dial("tcp", c.addrs[c.active()])
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(4 * time.Second))
	for r, n := bufio.NewReader(conn), 0; n < 10; n++ {
		fmt.Fprint(conn, "Count:none\nPut:full:x\nPing\n")
		for _, want := range []string{":OK 0", ":ERROR line ", ":PONG"} {
			if line, err := r.ReadString('\n'); !strings.HasPrefix(line, want) {
				c.t.Fatalf("a full cluster: the answer is %q, %v; want %s", line, err, want)
			}
		}
		<-time.After(100 * time.Millisecond)
	}

	// Room is made as an operator makes it.
	c.delete("other/")
	var status response
	c.ask("kv/range", keyRange{Key: []byte("kv/lock")}, &status)
	c.ask("kv/compaction", map[string]any{"revision": status.Header.Revision, "physical": true}, nil)
	for i := range c.members {
		r, err := http.Post("http://"+c.client(i)+"/v3/maintenance/defragment", "",
			strings.NewReader("{}"))
		if err != nil {
			c.t.Fatal(err)
		}
		r.Body.Close()
	}

	// etcd refuses puts until its alarms are ended, however much room there is.
	var list struct {
		Alarms []map[string]string
	}
	c.ask("maintenance/alarm", struct{}{}, &list)
	for _, alarm := range list.Alarms {
		alarm["action"] = "DEACTIVATE"
		c.ask("maintenance/alarm", alarm, nil)
	}
}

// getList reads the list of key k.
func getList(conn net.Conn, r *bufio.Reader) (list []string, err error) {
	conn.SetDeadline(time.Now().Add(40 * time.Second))
	fmt.Fprint(conn, "Get:k\nPing\n")
	for {
		line, err := r.ReadString('\n')
		if line == ":PONG\n" || err != nil {
			return list, err
		}
		list = append(list, strings.TrimSpace(strings.TrimPrefix(line, "k:")))
	}
}

// check fails the test unless list has all of told, the values whose writes were answered, in
// order.
func (c *etcdCluster) check(what string, list, told []string) {
	rest := list
	for _, value := range told {
		i := slices.Index(rest, value)
		if i < 0 {
			c.t.Errorf("%s has %d values, without %s or in the wrong order: it was answered before",
				what, len(list), value)
			return
		}
		rest = rest[i+1:]
	}
}

// TestEtcdCluster runs two servers on a real cluster through kills, pauses, losses and a full
// database. It wants every answered write to be there, in order, and no stale read. `make etcd`
// runs it, with etcd's binary.
func TestEtcdCluster(t *testing.T) {
	if os.Getenv("KVSERVER_ETCD") == "" {
		return
	}

	c := &etcdCluster{t: t, dir: t.TempDir(), at: time.Now()}
	c.binary = filepath.Join(c.dir, "kvserver")
	build := exec.Command("go", "build", "-o", c.binary, "kvserver")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}

	for i := range c.ports {
		c.ports[i] = freePort(t)
		c.peers[i] = freePort(t)
	}
	for i := range c.members {
		c.startMember(i)
	}
	for i := range c.servers {
		c.addrs[i] = fmt.Sprintf("127.0.0.1:%d", freePort(t))
		c.https[i] = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	}

	defer func() {
		for _, cmd := range c.members {
			send("CONT", cmd)
			cmd.Process.Kill()
		}
	}()

	// The first server serves before the second one starts, which stands by.
	c.leader()
	var servers sync.WaitGroup
	t.Cleanup(servers.Wait)
	for i := range c.servers {
		servers.Go(func() { c.keepServer(t.Context(), i) })
		c.active()
	}

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.write(ctx) })
	wg.Go(func() { c.read(ctx) })
	mixed := &mixed{t: t, addrs: c.addrs[:], asked: map[string][]*storetest.Operation{}}
	wg.Go(func() { mixed.run(ctx) })

	pause := func(long time.Duration, which ...*exec.Cmd) {
		send("STOP", which...)
		<-time.After(long)
		send("CONT", which...)
	}

	for _, event := range []struct {
		what string
		do   func()
	}{
		{"nothing", func() {}},
		{"the server is killed", func() { send("KILL", c.server(c.active())) }},
		{"the server is stopped", func() { send("TERM", c.server(c.active())) }},
		// Shorter than lockTime, longer than it, and longer than patienceTime.
		{"the server stands still for 3 s", func() { pause(3*time.Second, c.server(c.active())) }},
		{"the server stands still for 8 s", func() { pause(8*time.Second, c.server(c.active())) }},
		{"the server stands still for 12 s", func() { pause(12*time.Second, c.server(c.active())) }},

		{"a member is killed", func() {
			i := (c.leader() + 1) % 3
			send("KILL", c.members[i])
			c.settle()
			c.members[i].Wait()
			c.startMember(i)
		}},
		{"the leader is killed", func() {
			i := c.leader()
			send("KILL", c.members[i])
			c.settle()
			c.members[i].Wait()
			c.startMember(i)
		}},
		{"the leader stands still for 8 s", func() { pause(8*time.Second, c.members[c.leader()]) }},
		{"all members stand still for 3 s", func() { pause(3*time.Second, c.members[:]...) }},
		{"all members stand still for 15 s", func() { pause(15*time.Second, c.members[:]...) }},
		{"all members are killed and started again", func() { c.killMembers(func() {}) }},

		{"the lock is deleted", func() { c.delete("kv/lock") }},
		{"the names are deleted", func() { c.delete("kv/n/") }},
		{"the pieces are deleted", func() { c.delete("kv/d/") }},
		{"all is deleted", func() { c.delete("kv/") }},
		{"the members are put back by a few seconds", c.putBack},

		{"many small commits", c.writeSmall},
		{"the server is killed, after these", func() { send("KILL", c.server(c.active())) }},
		{"the cluster is full", c.fill},
	} {
		c.mu.Lock()
		c.longest, c.at = 0, time.Now()
		c.mu.Unlock()

		event.do()
		c.settle()
		mixed.check(c.addrs[c.active()])

		c.mu.Lock()
		t.Logf("%-45s longest time without an answer %5.2f s, %d writes so far", event.what,
			c.longest.Seconds(), len(c.acked))
		c.mu.Unlock()
	}

	// The one that serves says so over HTTP, and the other one for whom it stands by.
	active := c.active()
	for i, want := range map[int]string{active: "200 ok",
		1 - active: "503 standby: the data is in use by process "} {
		answer, err := http.Get("http://" + c.https[i] + "/healthz")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		if got := fmt.Sprintf("%d %s", answer.StatusCode, body); !strings.HasPrefix(got, want) {
			t.Errorf("server %d, of which %d serves, says %q, want %q", i, active, got, want)
		}
	}

	// Nothing is added to acked any more.
	cancel()
	wg.Wait()
	conn, err := net.Dial("tcp", c.addrs[active])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	list, err := getList(conn, bufio.NewReader(conn))
	if err != nil {
		t.Error(err)
	}
	c.check("at the end", list, c.acked)

	t.Logf("%d writes were answered, and %d reads; %d requests of all verbs have one order",
		len(c.acked), c.reads, mixed.checked)
}

// send sends a signal, by name, to processes: package syscall does not have every signal on every
// system.
func send(signal string, which ...*exec.Cmd) {
	for _, cmd := range which {
		exec.Command("kill", "-"+signal, strconv.Itoa(cmd.Process.Pid)).Run()
	}
}

// settle waits until writes have been answered for a whole second.
func (c *etcdCluster) settle() {
	for good := 0; good < 4; good++ {
		c.mu.Lock()
		before := len(c.acked)
		c.mu.Unlock()

		<-time.After(time.Second / 4)
		c.mu.Lock()
		if len(c.acked) == before {
			good = -1
		}
		c.mu.Unlock()
	}
}
