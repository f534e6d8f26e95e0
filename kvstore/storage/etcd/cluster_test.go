package etcd

import (
	"bufio"
	"context"
	"encoding/json"
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
)

// etcdCluster is three members of etcd on this machine, and two servers on one prefix.
type etcdCluster struct {
	t       *testing.T
	dir     string
	binary  string // kvserver's
	ports   [3]int // where the members are asked
	peers   [3]int // where they ask each other
	members [3]*exec.Cmd
	servers [2]*exec.Cmd
	addrs   [2]string
	https   [2]string

	mu      sync.Mutex
	acked   []string      // values that were answered, in order
	at      time.Time     // of the last
	longest time.Duration // between two
}

func (c *etcdCluster) client(i int) string { return fmt.Sprintf("127.0.0.1:%d", c.ports[i]) }
func (c *etcdCluster) peer(i int) string   { return fmt.Sprintf("http://127.0.0.1:%d", c.peers[i]) }

// freePort is a port that was free a moment ago.
func freePort(t *testing.T) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

// data is the servers' -data.
func (c *etcdCluster) data() string {
	return fmt.Sprintf("etcd://%s,%s,%s/kv", c.client(0), c.client(1), c.client(2))
}

// startMember starts a member, anew if it has run before.
func (c *etcdCluster) startMember(i int) {
	var all []string
	for j := range c.members {
		all = append(all, fmt.Sprintf("m%d=%s", j, c.peer(j)))
	}
	c.members[i] = exec.Command("etcd", "--name", fmt.Sprint("m", i), "--data-dir",
		filepath.Join(c.dir, fmt.Sprint("m", i)),
		"--listen-client-urls", "http://"+c.client(i), "--advertise-client-urls", "http://"+c.client(i),
		"--listen-peer-urls", c.peer(i), "--initial-advertise-peer-urls", c.peer(i),
		"--initial-cluster", strings.Join(all, ","), "--initial-cluster-state", "new")
	if err := c.members[i].Start(); err != nil {
		c.t.Fatal(err)
	}
}

// startServer starts a server, or starts it again.
func (c *etcdCluster) startServer(i int) {
	c.servers[i] = exec.Command(c.binary, "-addr", c.addrs[i], "-data", c.data(), "-http", c.https[i])
	if err := c.servers[i].Start(); err != nil {
		c.t.Fatal(err)
	}
	go c.servers[i].Wait()
}

// active is the server that serves.
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

// leader is the member that leads.
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

// write puts one value after the other to whichever server serves, and notes what was
// answered, until ctx is done.
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
				if line, err = r.ReadString('\n'); err == nil && line == ":OK 1\n" {
					c.mu.Lock()
					c.acked = append(c.acked, fmt.Sprint(n))
					now := time.Now()
					c.longest, c.at = max(c.longest, now.Sub(c.at)), now
					c.mu.Unlock()
				}
			}
			conn.Close()
		}
	}
}

// read asks for the list, of whichever server answers, and wants everything in it that had
// been answered before it asked.
func (c *etcdCluster) read(ctx context.Context) (n int) {
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
					n++
					c.check("a Get", list, told)
				}
			}
			conn.Close()
		}
	}
	return n
}

// getList asks for the list of the key k.
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

// check wants all that was told in list, in order, and nothing twice.
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

// TestEtcdCluster puts two servers and a real cluster through what befalls them, and wants
// every answered write there, in order, and no old answer to a read. `make etcd` runs it;
// without etcd there is nothing to be run.
func TestEtcdCluster(t *testing.T) {
	if os.Getenv("KVSERVER_ETCD") == "" {
		return
	}
	c := &etcdCluster{t: t, dir: t.TempDir(), at: time.Now()}
	c.binary = filepath.Join(c.dir, "kvserver")
	if text, err := exec.Command("go", "build", "-o", c.binary, "kvserver").CombinedOutput(); err != nil {
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
		for _, cmd := range slices.Concat(c.members[:], c.servers[:]) {
			send("CONT", cmd)
			cmd.Process.Kill()
		}
	}()
	c.leader()
	c.startServer(0)
	c.active()
	c.startServer(1)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.write(ctx) })
	reads := 0
	wg.Go(func() { reads = c.read(ctx) })
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
		{"the server is killed", func() {
			i := c.active()
			send("KILL", c.servers[i])
			c.settle()
			c.startServer(i)
		}},
		{"the server is stopped", func() {
			i := c.active()
			send("TERM", c.servers[i])
			c.settle()
			c.startServer(i)
		}},
		{"the server stands still for 3 s", func() { pause(3*time.Second, c.servers[c.active()]) }},
		{"the server stands still for 8 s", func() {
			i := c.active()
			pause(8*time.Second, c.servers[i])
			c.settle()
			c.startServer(i)
		}},
		{"the server stands still for 20 s", func() {
			i := c.active()
			pause(20*time.Second, c.servers[i])
			c.settle()
			c.startServer(i)
		}},
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
		{"all members stand still for 15 s", func() {
			i := c.active()
			pause(15*time.Second, c.members[:]...)
			c.startServer(i) // it has ended; the one that stands by has not
		}},
		{"all members are killed and started again", func() {
			send("KILL", c.members[:]...)
			for i, m := range c.members {
				m.Wait()
				c.startMember(i)
			}
		}},
	} {
		c.mu.Lock()
		c.longest, c.at = 0, time.Now()
		c.mu.Unlock()
		event.do()
		c.settle()
		c.mu.Lock()
		t.Logf("%-45s longest time without an answer %5.2f s, %d writes so far", event.what,
			c.longest.Seconds(), len(c.acked))
		c.mu.Unlock()
	}
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
	t.Logf("%d writes were answered, and %d reads", len(c.acked), reads)
}

// send sends a signal to processes; package syscall does not know all of them everywhere.
func send(signal string, which ...*exec.Cmd) {
	for _, cmd := range which {
		exec.Command("kill", "-"+signal, strconv.Itoa(cmd.Process.Pid)).Run()
	}
}

// settle waits until writes have been answered for two seconds.
func (c *etcdCluster) settle() {
	for good := 0; good < 8; good++ {
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
