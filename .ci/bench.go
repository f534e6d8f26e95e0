// Bench measures the built kvserver beside redis-server and memcached, if they are installed, and
// prints one table in Markdown. All servers of a row run at the same time; each gets its load in
// turn, -rounds times. A cell has the median rate ± half of the spread, and behind it the medians
// of CPU time and latency. Every byte of every reply is checked. kvserver has two columns: their
// difference is the noise of the machine. CPU time and memory come from /proc, so it needs Linux.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// row is a kind of load: batches of gets or sets from several connections.
type row struct {
	name     string
	op       string
	conns    int
	batch    int
	size     int  // bytes of a value
	requests int  // in one round, on all connections
	durable  bool // each answer waits for the disk
}

// rows are the loads that are measured.
var rows = []row{
	{"get at 1", "get", 50, 1, 16, 60_000, false},
	{"get at 16", "get", 50, 16, 16, 600_000, false},
	{"get at 64", "get", 50, 64, 16, 1_200_000, false},
	{"get at 256", "get", 50, 256, 16, 2_000_000, false},
	{"set at 1", "set", 50, 1, 16, 60_000, false},
	{"set at 16", "set", 50, 16, 16, 600_000, false},
	{"set at 64", "set", 50, 64, 16, 1_200_000, false},
	{"set at 256", "set", 50, 256, 16, 2_000_000, false},
	{"set of 4 KiB at 16", "set", 50, 16, 4 << 10, 200_000, false},
	{"set of 64 KiB at 4", "set", 50, 4, 64 << 10, 10_000, false},
	{"1,000 connections, get at 1", "get", 1000, 1, 16, 60_000, false},
	{"1,000 connections, get at 16", "get", 1000, 16, 16, 600_000, false},
	{"set on disk at 1", "set", 50, 1, 16, 30_000, true},
	{"set on disk at 16", "set", 50, 16, 16, 200_000, true},
	{"set on disk at 64", "set", 50, 64, 16, 400_000, true},
}

// server is a kind of server and its protocol: get and set return the text of a read and of a write
// of key, got and done the text of the answer to each.
type server struct {
	name                string
	args, durable       []string // the command line, in memory and on disk; %PORT and %DIR are filled in
	hello, welcome      string   // sent once on each connection, and the answer to it
	get, got, set, done func(key, value string) string
}

var servers = []server{
	ours("kvserver"),
	ours("kvserver again"),
	{
		name: "redis-server",
		args: []string{"redis-server", "--port", "%PORT", "--dir", "%DIR", "--save", "",
			"--appendonly", "no"},
		durable: []string{"redis-server", "--port", "%PORT", "--dir", "%DIR", "--save", "",
			"--appendonly", "yes", "--appendfsync", "always"},
		get: func(key, _ string) string {
			return fmt.Sprintf("*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", len(key), key)
		},
		got: func(_, value string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(value), value) },
		set: func(key, value string) string {
			return fmt.Sprintf("*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(key), key,
				len(value), value)
		},
		done: func(_, _ string) string { return "+OK\r\n" },
	},
	{
		name: "memcached",
		args: []string{"memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", "%PORT", "-t", "2", "-m",
			"4096"},
		get: func(key, _ string) string { return "get " + key + "\r\n" },
		got: func(key, value string) string {
			return fmt.Sprintf("VALUE %s 0 %d\r\n%s\r\nEND\r\n", key, len(value), value)
		},
		set: func(key, value string) string {
			return fmt.Sprintf("set %s 0 0 %d\r\n%s\r\n", key, len(value), value)
		},
		done: func(_, _ string) string { return "STORED\r\n" },
	},
}

// ours is kvserver after Ack, so that each of its writes is answered as the others' are.
func ours(name string) server {
	return server{
		name:    name,
		args:    []string{"./kvserver", "-addr", "127.0.0.1:%PORT"},
		durable: []string{"./kvserver", "-addr", "127.0.0.1:%PORT", "-data", "%DIR"},
		hello:   "Ack\n", welcome: ":OK 0\n",
		get:  func(key, _ string) string { return "Get:" + key + "\n" },
		got:  func(key, value string) string { return key + ":" + value + "\n:OK 1\n" },
		set:  func(key, value string) string { return "Set:" + key + ":" + value + "\n" },
		done: func(_, _ string) string { return ":OK 1\n" },
	}
}

// figures are the results of one round: requests a second, microseconds of CPU for a request, and
// milliseconds within which 99 of 100 batches were answered.
type figures struct{ rate, cpu, p99 float64 }

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	rounds := flag.Int("rounds", 5, "measure each `N` times, in turn")
	only := flag.String("only", "", "only rows whose names have `TEXT`")
	flag.Parse()
	fmt.Print("| 1,000 requests a second (µs of CPU for one; ms for 99 % of batches) |")
	for _, s := range servers {
		fmt.Printf(" %s |", s.name)
	}
	fmt.Print(" kvserver's rate, of redis-server's |\n|---|", strings.Repeat("---|", len(servers)+1), "\n")
	for _, r := range rows {
		if strings.Contains(r.name, *only) {
			r.print(*rounds)
		}
	}
	if *only == "" {
		printMemory()
	}
}

// printMemory prints how many bytes of memory a key takes. It stores a million keys of 12 bytes,
// each with a value of 16 bytes.
func printMemory() {
	const keys, chunk = 1_000_000, 1000
	fmt.Print("| bytes of memory a key |")
	for _, s := range servers {
		p := s.start(row{})
		if p == nil {
			fmt.Print(" - |")
			continue
		}

		// The answers of a chunk are awaited before the next is sent.
		c := p.connect(row{}, 0)
		value := strings.Repeat("v", 16)
		for first := 0; first < keys; first += chunk {
			var send, want strings.Builder
			for k := first; k < first+chunk; k++ {
				key := fmt.Sprintf("key%09d", k)
				send.WriteString(s.set(key, value))
				want.WriteString(strings.ReplaceAll(s.done(key, value), "1", "0"))
			}
			c.round(send.String(), want.String(), make([]byte, want.Len()))
		}

		status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "status"))
		must(err)
		_, rss, _ := strings.Cut(string(status), "VmRSS:")
		kilobytes, err := strconv.Atoi(strings.Fields(rss)[0])
		must(err)
		fmt.Printf(" %d |", kilobytes*1024/keys)
		must(c.conn.Close())
		p.stop()
	}
	fmt.Println(" |")
}

// print measures a row and prints it.
func (r row) print(rounds int) {
	got := make([][]figures, len(servers))
	peers := make([]*peer, len(servers))
	for i, s := range servers {
		if peers[i] = s.start(r); peers[i] != nil {
			defer peers[i].stop()
		}
	}

	// In turn, and each round begins with another server, so that disturbances hit all alike.
	for round := range rounds {
		for n := range peers {
			i := (round + n) % len(peers)
			if p := peers[i]; p != nil {
				got[i] = append(got[i], p.load(r))
			}
		}
	}

	fmt.Printf("| %s |", r.name)
	for i := range servers {
		if got[i] == nil {
			fmt.Print(" - |")
			continue
		}
		rate := of(got[i], func(f figures) float64 { return f.rate })
		fmt.Printf(" %.0f ± %.0f (%.2f; %.2f) |", rate[rounds/2]/1000,
			(rate[rounds-1]-rate[0])/2000,
			of(got[i], func(f figures) float64 { return f.cpu })[rounds/2],
			of(got[i], func(f figures) float64 { return f.p99 })[rounds/2])
	}

	// The ratio of each round: a slow minute of the machine slows both.
	if got[2] == nil {
		fmt.Println(" - |")
		return
	}
	ratios := make([]float64, rounds)
	for i := range ratios {
		ratios[i] = got[0][i].rate / got[2][i].rate
	}
	slices.Sort(ratios)
	fmt.Printf(" %.2f (%.2f to %.2f) |\n", ratios[rounds/2], ratios[0], ratios[rounds-1])
}

// of returns one figure of each round, sorted.
func of(all []figures, one func(figures) float64) (sorted []float64) {
	for _, f := range all {
		sorted = append(sorted, one(f))
	}
	slices.Sort(sorted)
	return sorted
}

// peer is a running server.
type peer struct {
	server
	cmd  *exec.Cmd
	addr string
	dir  string
}

// start starts a server for a row. It returns nil if the server is not installed, or cannot keep
// data on disk and the row needs that.
func (s server) start(r row) *peer {
	args := s.args
	if r.durable {
		args = s.durable
	}
	if len(args) == 0 {
		return nil
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return nil
	}

	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	p := &peer{server: s, addr: free.Addr().String()}
	must(free.Close())
	p.dir, err = os.MkdirTemp(".", "bench-")
	must(err)
	_, port, _ := net.SplitHostPort(p.addr)
	fill := strings.NewReplacer("%PORT", port, "%DIR", p.dir)
	filled := make([]string, len(args)-1)
	for i, arg := range args[1:] {
		filled[i] = fill.Replace(arg)
	}
	p.cmd = exec.Command(program, filled...)
	must(p.cmd.Start())

	for {
		conn, err := net.Dial("tcp", p.addr)
		if err == nil {
			must(conn.Close())
			return p
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (p *peer) stop() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
	must(os.RemoveAll(p.dir))
}

// client is a connection, with the two batches that it sends in turn and the answers that it wants.
// Two batches of sets write different values, so each set changes its key.
type client struct {
	conn       net.Conn
	r          *bufio.Reader
	send, want [2]string
	took       []time.Duration // of each batch
}

// load puts one round of a row on the server, and returns its figures.
func (p *peer) load(r row) (f figures) {
	clients := make([]*client, r.conns)
	for i := range clients {
		clients[i] = p.connect(r, i)
	}

	cpu, began := p.cpu(), time.Now()
	batches := max(1, r.requests/(r.conns*r.batch))
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(func() {
			got := make([]byte, max(len(c.want[0]), len(c.want[1])))
			for n := range batches {
				c.round(c.send[n%2], c.want[n%2], got)
			}
		})
	}
	all.Wait()

	elapsed, requests := time.Since(began).Seconds(), float64(batches*r.conns*r.batch)
	var took []time.Duration
	for _, c := range clients {
		took = append(took, c.took...)
		must(c.conn.Close())
	}
	slices.Sort(took)
	return figures{requests / elapsed, (p.cpu() - cpu) * 1e6 / requests,
		took[len(took)*99/100].Seconds() * 1000}
}

// connect makes the connection number i, and gives each of its keys a value.
func (p *peer) connect(r row, i int) *client {
	conn, err := net.Dial("tcp", p.addr)
	must(err)
	c := &client{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	c.round(p.hello, p.welcome, make([]byte, len(p.welcome)))

	values := [2]string{strings.Repeat("a", r.size), strings.Repeat("b", r.size)}
	for j := range r.batch {
		key := fmt.Sprintf("key%04d%05d", i, j)

		// kvserver's answer says whether the key was there before: one byte may differ from done.
		_, err := io.WriteString(conn, p.set(key, values[0]))
		must(err)
		_, err = c.r.Discard(len(p.done(key, "")))
		must(err)

		for n, value := range values {
			if r.op == "get" {
				c.send[n] += p.get(key, "")
				c.want[n] += p.got(key, values[0])
			} else {
				c.send[n] += p.set(key, value)
				c.want[n] += p.done(key, value)
			}
		}
	}
	return c
}

// round sends a batch and reads the answers into got. They must be what want says.
func (c *client) round(send, want string, got []byte) {
	began := time.Now()
	_, err := io.WriteString(c.conn, send)
	must(err)
	_, err = io.ReadFull(c.r, got[:len(want)])
	must(err)
	if string(got[:len(want)]) != want {
		log.Fatalf("got %.100q, want %.100q", got, want)
	}
	c.took = append(c.took, time.Since(began))
}

// cpu returns how many seconds of CPU time the process has used.
func (p *peer) cpu() float64 {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "stat"))
	must(err)
	_, fields, _ := bytes.Cut(stat, []byte(") ")) // skip the program's name, which may have blanks
	ticks := 0.0
	for _, field := range bytes.Fields(fields)[11:13] {
		n, err := strconv.ParseFloat(string(field), 64)
		must(err)
		ticks += n
	}
	return ticks / 100
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
