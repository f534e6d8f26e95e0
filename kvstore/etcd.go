package kvstore

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// A directory in an etcd cluster, which it asks through etcd's JSON gateway. Below the
// prefix that its address gives there are these keys:
//
//	lock        who may write: an etcdOwner. Its holder writes it anew every etcdBeat
//	step        the number of the holder's last change of names
//	n/NAME      the id of the file that has this name
//	d/ID/PIECE  one write to that file; PIECE is its number, its offset and its size. If the
//	            value is smaller than that, it is compressed (DEFLATE)
//
// Every transaction of a holder compares the lock with what the holder wrote there: one
// that was robbed of it can change nothing any more, however late its requests come. And
// each may be sent again when its answer was lost: a piece has a key of its own and never
// changes, and a change of names says which step it is, so that no step is made twice.
//
// A lease of etcd's would not do: its time begins anew when the cluster gets another leader.
const (
	etcdPiece     = 1 << 20  // bytes of a piece: etcd takes requests of 1.5 MiB
	etcdFileMost  = 1 << 47  // bytes of a file
	etcdPackLeast = 512      // bytes of a piece that is compressed
	etcdPage      = 4 << 20  // bytes of the pieces that are asked for at a time
	etcdAhead     = 64 << 10 // the same at first
	etcdKeys      = 4 << 10  // keys that are
	// bytes of a log file: what is read again at a start, about
	etcdSegment = 16 << 20
	etcdBeat    = time.Second     // between two signs of life in the lock
	etcdTTL     = 5 * time.Second // after which a lock without one may be taken
	// so long a sign of life is good for: clocks may run differently
	etcdFresh    = etcdTTL - etcdTTL/10
	etcdPatience = 10 * time.Second        // without an answer, until we give up
	etcdTimeout  = 1500 * time.Millisecond // of one request
	etcdPause    = 50 * time.Millisecond   // before it is sent again
	etcdPoll     = 250 * time.Millisecond  // between two looks at a lock that another one has
)

// Errors of a store in etcd.
var (
	// ErrAddress is returned for an address that names no members, or no prefix.
	ErrAddress = errors.New("no address of data in etcd")
	// ErrUnreachable is returned when no member of the cluster has answered for etcdPatience.
	ErrUnreachable = errors.New("etcd does not answer")
	// ErrRefused is returned when etcd answers, but not to us: a wrong certificate, user or
	// password, or a right that is missing.
	ErrRefused = errors.New("etcd refuses")
	// ErrTakenOver is returned when another process has taken the lock.
	ErrTakenOver = errors.New("another server has taken the data over")
)

// ---- asking etcd

// etcdClient asks a cluster. Any goroutine may.
type etcdClient struct {
	members        []string // http://host:port
	http           *http.Client
	user, password string

	member atomic.Int32           // the one that is asked: another one after each failure
	token  atomic.Pointer[string] // of the user; nil: none yet, or none is needed
}

// What is used of etcd's messages, in the names of its API. Bytes travel as base64.
type (
	etcdKV struct {
		Key      []byte `json:"key"`
		Value    []byte `json:"value,omitempty"`
		Revision int64  `json:"mod_revision,string,omitempty"` // of the last change; 0: it is not there
	}
	etcdRange struct {
		Key      []byte `json:"key"`
		End      []byte `json:"range_end,omitempty"` // the first key that is meant no more
		Limit    int    `json:"limit,string,omitempty"`
		KeysOnly bool   `json:"keys_only,omitempty"`
	}
	etcdOp struct {
		Put    *etcdKV    `json:"request_put,omitempty"`
		Delete *etcdRange `json:"request_delete_range,omitempty"`
		Range  *etcdRange `json:"request_range,omitempty"`
	}
	etcdCompare struct {
		Target string `json:"target"` // VALUE or MOD, for equality
		etcdKV
	}
	etcdTxn struct {
		Compare []etcdCompare `json:"compare"`
		Success []etcdOp      `json:"success"`
		Failure []etcdOp      `json:"failure,omitempty"`
	}
	// etcdAnswer is the answer to any request.
	etcdAnswer struct {
		KVs       []etcdKV `json:"kvs"`
		Succeeded bool     `json:"succeeded"`
		Responses []struct {
			Range struct {
				KVs []etcdKV `json:"kvs"`
			} `json:"response_range"`
		} `json:"responses"`
		Token  string `json:"token"`
		Leader string `json:"leader"`
		Header struct {
			Member string `json:"member_id"`
		} `json:"header"`
	}
)

func etcdPut(key, value []byte) etcdOp  { return etcdOp{Put: &etcdKV{Key: key, Value: value}} }
func etcdDelete(key, end []byte) etcdOp { return etcdOp{Delete: &etcdRange{Key: key, End: end}} }

// etcdError is etcd's answer to a request that it does not do.
type etcdError struct {
	Message string `json:"message"`
	Code    int    `json:"code"` // gRPC's
}

func (e *etcdError) Error() string { return e.Message }

// Is makes a database that is full what a full disk is, and other final refusals ErrRefused.
func (e *etcdError) Is(target error) bool {
	isFull := e.Code == 8
	return target == syscall.ENOSPC && isFull || target == ErrRefused && isFinal(e) && !isFull
}

// isExpired tells whether it is the token that is bad: a JWT is too old once users change.
func (e *etcdError) isExpired() bool {
	return e.Code == 16 || strings.Contains(e.Message, "revision of auth store is old")
}

// isFinal tells whether to ask this member again is in vain.
func isFinal(err error) bool {
	if e := (*etcdError)(nil); errors.As(err, &e) {
		switch e.Code {
		// cancelled, unknown, too late, aborted, internal, no leader, expired
		case 1, 2, 4, 10, 13, 14, 16:
			return false
		case 8: // no space, or too many requests
			return strings.Contains(e.Message, "space")
		}
		return !e.isExpired()
	}
	return isUntrusted(err)
}

// named is err as people should see it.
func named(err error) error {
	if isUntrusted(err) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("etcd: %w", err)
}

// isUntrusted tells whether one side of a connection wants no part of the other.
func isUntrusted(err error) bool {
	alert, record := tls.AlertError(0), tls.RecordHeaderError{}
	certificate := (*tls.CertificateVerificationError)(nil)
	return errors.As(err, &alert) || errors.As(err, &record) || errors.As(err, &certificate) ||
		errors.Is(err, http.ErrSchemeMismatch)
}

// newEtcdClient returns a client for the members at hosts. With TLS, query may name files:
// ca, cert and key.
func newEtcdClient(hosts []string, encrypted bool, query url.Values) (*etcdClient, error) {
	c := &etcdClient{}
	c.user, c.password, _ = strings.Cut(os.Getenv("KVSERVER_ETCD_USER"), ":")
	transport := &http.Transport{MaxIdleConnsPerHost: 16,
		DialContext: (&net.Dialer{Timeout: time.Second}).DialContext}
	c.http = &http.Client{Transport: transport}
	scheme := "http://"
	if encrypted {
		scheme = "https://"
		config := &tls.Config{MinVersion: tls.VersionTLS12}
		transport.TLSClientConfig = config
		if ca := query.Get("ca"); ca != "" {
			pem, err := os.ReadFile(ca)
			if err != nil {
				return nil, fmt.Errorf("%w: cannot read its CA: %w", ErrRefused, err)
			}
			config.RootCAs = x509.NewCertPool()
			config.RootCAs.AppendCertsFromPEM(pem)
		}
		if cert := query.Get("cert"); cert != "" {
			pair, err := tls.LoadX509KeyPair(cert, cmp.Or(query.Get("key"), cert))
			if err != nil {
				return nil, fmt.Errorf("%w: cannot read our certificate for it: %w", ErrRefused,
					err)
			}
			config.Certificates = []tls.Certificate{pair}
		}
	}
	for _, host := range hosts {
		c.members = append(c.members, scheme+host)
	}
	return c, nil
}

// post sends one request to one member. After a failure the next goes to another one.
func (c *etcdClient) post(ctx context.Context, at string,
	request any) (answer etcdAnswer, err error) {
	member := c.member.Load()
	if c.user != "" && c.token.Load() == nil && at != "auth/authenticate" {
		login, err := c.post(ctx, "auth/authenticate",
			map[string]string{"name": c.user, "password": c.password})
		if err != nil {
			return answer, err
		}
		c.token.Store(&login.Token)
	}
	limit := etcdTimeout
	if at == "kv/range" { // there may be much to read
		limit *= 3
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = c.exchange(ctx, c.members[member]+"/v3/"+at, request, &answer)
	if e := (*etcdError)(nil); errors.As(err, &e) && e.isExpired() {
		c.token.Store(nil)
	} else if err != nil {
		c.member.CompareAndSwap(member, (member+1)%int32(len(c.members)))
	}
	return answer, err
}

// preferLeader asks the cluster's leader from now on, if one member says that it is: the
// others would only pass on what they are asked.
func (c *etcdClient) preferLeader(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
	defer cancel()
	for i, member := range c.members {
		var status etcdAnswer
		if c.exchange(ctx, member+"/v3/maintenance/status", struct{}{}, &status) == nil &&
			status.Leader == status.Header.Member && status.Leader != "" {
			c.member.Store(int32(i))
			return
		}
	}
}

// exchange sends a request and reads the answer.
func (c *etcdClient) exchange(ctx context.Context, url string, request any,
	answer *etcdAnswer) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, "POST", url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if token := c.token.Load(); token != nil {
		r.Header.Set("Authorization", *token)
	}
	response, err := c.http.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode == http.StatusOK:
		return json.Unmarshal(text, answer)
	}
	refusal := &etcdError{}
	if json.Unmarshal(text, refusal) != nil || refusal.Message == "" {
		refusal.Message, refusal.Code = fmt.Sprintf("%s answers %s: %.100q", url, response.Status,
			text), 14
		if response.StatusCode/100 == 4 { // somebody else answers there, or wants TLS
			refusal.Code = 12
		}
	}
	return refusal
}

// call sends a request until it is answered, every member has refused it, or ctx is done.
func (c *etcdClient) call(ctx context.Context, at string, request any) (etcdAnswer, error) {
	for refused := 0; ; {
		answer, err := c.post(ctx, at, request)
		switch {
		case err == nil:
			return answer, nil
		case !isFinal(err):
			refused = 0
		default:
			if refused++; refused == len(c.members) {
				return answer, named(err)
			}
		}
		if cause := wait(ctx, etcdPause); cause != nil {
			return answer, fmt.Errorf("%w: %w", cause, err)
		}
	}
}

// wait waits for so long, or returns why ctx is done before.
func wait(ctx context.Context, long time.Duration) error {
	select {
	case <-time.After(long):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ---- the directory

// etcdDirectory is a Directory in a cluster.
type etcdDirectory struct {
	name   string // as people call it
	prefix string
	client *etcdClient
	opts   Options
	log    *slog.Logger

	ctx  context.Context // of those calls that come before there is a lock
	lock *etcdLock       // nil before Lock; then it stays

	turn  chan struct{} // one slot, for who changes names
	step  int           // the last change; who has turn may use it
	files atomic.Int64  // created so far, for their ids
}

// openAny opens a directory of the file system, or one in an etcd cluster.
func openAny(ctx context.Context, path string, opts Options) (Directory, error) {
	if IsEtcd(path) {
		return openEtcd(ctx, path, opts)
	}
	return openDirectory(path)
}

// IsEtcd tells whether path is meant to be the address of a store in etcd.
func IsEtcd(path string) bool {
	return strings.HasPrefix(path, "etcd:") || strings.HasPrefix(path, "etcds:")
}

// openEtcd returns the directory at etcd://host:port,host:port/prefix, or at etcds:// with
// TLS and ?ca=FILE&cert=FILE&key=FILE. The environment's KVSERVER_ETCD_USER is a
// name:password. Nothing is asked yet.
func openEtcd(ctx context.Context, address string, opts Options) (*etcdDirectory, error) {
	rest, text, _ := strings.Cut(address, "?")
	scheme, rest, _ := strings.Cut(rest, "://")
	hosts, prefix, _ := strings.Cut(strings.TrimRight(rest, "/"), "/")
	query, err := url.ParseQuery(text)
	members := strings.Split(hosts, ",")
	for _, host := range members {
		if _, _, hostErr := net.SplitHostPort(host); hostErr != nil {
			err = hostErr
		}
	}
	if err != nil || prefix == "" {
		return nil, fmt.Errorf("%w: %q", ErrAddress, address)
	}
	client, err := newEtcdClient(members, scheme == "etcds", query)
	if err != nil {
		return nil, err
	}
	d := &etcdDirectory{name: scheme + "://" + hosts + "/" + prefix, prefix: prefix + "/",
		client: client, opts: opts, log: opts.Log, ctx: ctx, turn: make(chan struct{}, 1)}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.opts.Status == nil {
		d.opts.Status = new(Status)
	}
	return d, nil
}

// Sizes: what is written costs a request, whatever its size, and zeros would be kept.
func (d *etcdDirectory) Sizes() (segment, compact int64, reserve int) {
	return etcdSegment, etcdSegment, 0
}

func (d *etcdDirectory) Path(name string) string { return strings.TrimSuffix(d.name+"/"+name, "/") }

// Sync has nothing to do: every change of names is durable when it is done.
func (d *etcdDirectory) Sync() error { return nil }

// Close has nothing to do.
func (d *etcdDirectory) Close() error {
	d.client.http.CloseIdleConnections()
	return nil
}

func (d *etcdDirectory) key(name string) []byte { return []byte(d.prefix + name) }

// below is the end of the keys that begin with prefix.
func below(prefix []byte) (end []byte) {
	end = slices.Clone(prefix)
	end[len(end)-1]++
	return end
}

// call asks etcd: for etcdPatience where there is no lock, else for three times that while the
// lock is held.
func (d *etcdDirectory) call(at string, request any) (etcdAnswer, error) {
	ctx, patience := d.ctx, etcdPatience
	if d.lock != nil {
		ctx, patience = d.lock.ctx, 3*etcdPatience
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, ErrUnreachable)
	defer cancel()
	return d.client.call(ctx, at, request)
}

// get returns the keys that r means.
func (d *etcdDirectory) get(r etcdRange) ([]etcdKV, error) {
	answer, err := d.call("kv/range", r)
	return answer.KVs, err
}

// change makes ops happen, once, if the lock is ours. They change names.
func (d *etcdDirectory) change(ops ...etcdOp) error {
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	key, before, after := d.key("step"), d.lock.step(d.step), d.lock.step(d.step+1)
	answer, err := d.call("kv/txn", etcdTxn{
		Compare: []etcdCompare{d.lock.isOurs(), {"VALUE", etcdKV{Key: key, Value: before}}},
		Success: append(ops, etcdPut(key, after)),
		Failure: []etcdOp{{Range: &etcdRange{Key: key}}},
	})
	switch {
	case err != nil: // it is not known whether it was done, and so not what the next step is
		return d.lock.lost(err)
	case answer.Succeeded: // now
	case len(answer.Responses) == 1 && len(answer.Responses[0].Range.KVs) == 1 &&
		bytes.Equal(answer.Responses[0].Range.KVs[0].Value, after): // the first time
	default:
		return d.lock.lost(ErrTakenOver)
	}
	d.step++
	return nil
}

// do makes op happen, at least once, if the lock is ours.
func (d *etcdDirectory) do(op etcdOp) error {
	if d.lock == nil {
		return errors.New("written without the lock")
	}
	answer, err := d.call("kv/txn", etcdTxn{Compare: []etcdCompare{d.lock.isOurs()},
		Success: []etcdOp{op}})
	switch {
	case err != nil: // it may yet be done
		return d.lock.lost(err)
	case !answer.Succeeded:
		return d.lock.lost(ErrTakenOver)
	}
	return nil
}

// names returns the id that each name has, and which keys are none of ours. The name of a
// file in a subdirectory has a slash.
func (d *etcdDirectory) names() (names map[string]string, others []string, err error) {
	pieces := d.key("d/")
	before, err := d.get(etcdRange{Key: d.key(""), End: pieces, KeysOnly: true, Limit: etcdKeys})
	if err != nil {
		return nil, nil, err
	}
	behind, err := d.get(etcdRange{Key: below(pieces), End: below(d.key(""))})
	names = map[string]string{}
	for _, kv := range append(before, behind...) {
		key := strings.TrimPrefix(string(kv.Key), d.prefix)
		if name, isName := strings.CutPrefix(key, "n/"); isName {
			names[name] = string(kv.Value)
		} else if key != "lock" && key != "step" {
			others = append(others, key)
		}
	}
	return names, others, err
}

// List returns names of files, of subdirectories, and of keys that are none of ours.
func (d *etcdDirectory) List() ([]string, error) {
	names, list, err := d.names()
	if err != nil {
		return nil, err
	}
	for name := range names {
		name, _, _ = strings.Cut(name, "/")
		list = append(list, name)
	}
	ids, err := d.ids()
	for _, id := range ids {
		if !isID(id) {
			list = append(list, "d/"+id)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), err
}

// ids returns the ids of files that have pieces.
func (d *etcdDirectory) ids() (ids []string, err error) {
	r := etcdRange{Key: d.key("d/"), End: below(d.key("d/")), Limit: 1, KeysOnly: true}
	for {
		kvs, err := d.get(r)
		if err != nil || len(kvs) == 0 {
			return ids, err
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(string(kvs[0].Key), d.prefix+"d/"), "/")
		ids = append(ids, id)
		r.Key = below(append(kvs[0].Key[:len(d.prefix)+len("d/")+len(id)], '/'))
	}
}

// isID tells whether a file's id is one of ours: an owner's token, and a number.
func isID(id string) bool {
	token, number, _ := strings.Cut(id, "-")
	_, err := strconv.Atoi(number)
	return len(token) == len(rand.Text()) && err == nil
}

// lookUp returns the names, and the id of one.
func (d *etcdDirectory) lookUp(name string) (names map[string]string, id string, err error) {
	names, _, err = d.names()
	if id = names[name]; err == nil && id == "" {
		err = fmt.Errorf("%s: %w", d.Path(name), os.ErrNotExist)
	}
	return names, id, err
}

// Create makes a new file. The one that had the name goes.
func (d *etcdDirectory) Create(name string) (File, error) {
	names, _, err := d.names()
	if err != nil {
		return nil, err
	}
	id := fmt.Sprintf("%s-%d", d.lock.owner.Token, d.files.Add(1))
	if err := d.change(etcdPut(d.key("n/"+name), []byte(id))); err != nil {
		return nil, err
	}
	return d.file(id, name), d.forget(names, name)
}

func (d *etcdDirectory) Rename(from, to string) error {
	names, id, err := d.lookUp(from)
	if err != nil {
		return err
	}
	if err := d.change(etcdPut(d.key("n/"+to), []byte(id)),
		etcdDelete(d.key("n/"+from), nil)); err != nil {
		return err
	}
	return d.forget(names, to)
}

func (d *etcdDirectory) Remove(name string) error {
	names, _, err := d.lookUp(name)
	if err != nil {
		return err
	}
	if err := d.change(etcdDelete(d.key("n/"+name), nil)); err != nil {
		return err
	}
	return d.forget(names, name)
}

func (d *etcdDirectory) Keep(name, in string) error {
	_, id, err := d.lookUp(name)
	if err != nil {
		return err
	}
	return d.change(etcdPut(d.key("n/"+in+"/"+name), []byte(id)))
}

// forget removes the pieces of the file that had a name, unless it has another one. What it
// leaves when it fails the next Lock sweeps.
func (d *etcdDirectory) forget(names map[string]string, name string) error {
	id := names[name]
	delete(names, name)
	if id == "" || slices.Contains(slices.Collect(maps.Values(names)), id) {
		return nil
	}
	return d.removePieces(id)
}

// removePieces removes the pieces of a file, some at a time: a transaction stops the cluster
// for as long as it takes.
func (d *etcdDirectory) removePieces(id string) error {
	all := d.key("d/" + id + "/")
	for {
		kvs, err := d.get(etcdRange{Key: all, End: below(all), Limit: etcdKeys, KeysOnly: true})
		if err != nil || len(kvs) == 0 {
			return err
		}
		if err := d.do(etcdDelete(all, append(kvs[len(kvs)-1].Key, 0))); err != nil {
			return err
		}
	}
}

// sweep removes the pieces of files that have no name.
func (d *etcdDirectory) sweep() error {
	names, _, err := d.names()
	if err != nil {
		return err
	}
	ids, err := d.ids()
	for _, id := range ids {
		if err == nil && isID(id) && !slices.Contains(slices.Collect(maps.Values(names)), id) {
			err = d.removePieces(id)
		}
	}
	return err
}

// file returns the open file with that id, of which nothing is known yet.
func (d *etcdDirectory) file(id, name string) *etcdFile {
	return &etcdFile{d: d, id: id, name: name, turn: make(chan struct{}, 1)}
}

func (d *etcdDirectory) Extend(name string) (File, error) {
	f, _, err := d.Open(name)
	return f, err
}

func (d *etcdDirectory) Open(name string) (File, int64, error) {
	_, id, err := d.lookUp(name)
	if err != nil {
		return nil, 0, err
	}
	f := d.file(id, name)
	if err := f.look(); err != nil {
		return nil, 0, err
	}
	if f.found < f.known || f.known == 0 { // perhaps it was removed meanwhile
		if err := f.isThere(); err != nil {
			return nil, 0, err
		}
	}
	return f, f.size, nil
}

// ---- its files

// etcdFile is an open file: the writes that made it, one over the other. Several goroutines
// may use it.
type etcdFile struct {
	d        *etcdDirectory
	id, name string

	turn  chan struct{} // one slot, for who uses what is below: a request may take long
	size  int64         // of the file, in bytes
	count int           // of pieces: the number of the next
	buf   []byte        // written, but not sent
	at    int64         // the offset of buf

	packed bytes.Buffer  // a piece, compressed
	packer *flate.Writer // to packed; nil: not needed yet

	// For reading.
	known int        // pieces that are in spans, if none is missing
	found int        // that are
	spans []etcdSpan // what the file consists of, in order; between them are zeros
	page  []etcdKV   // the pieces that were read last
	first int        // the number of the first of them
	ahead int64      // how many bytes to ask for, at least, if reading goes straight on
}

// etcdSpan says that the bytes between two offsets of a file are a piece's, or a part of it.
type etcdSpan struct {
	from, to int64
	number   int
	start    int64 // where the piece's first byte would be
	size     int64 // of the piece
}

// key is the key of a piece.
func (f *etcdFile) key(number int, offset, size int64) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x-%012x-%06x", f.id, number, offset, size))
}

// look finds out which pieces there are behind those that are known.
func (f *etcdFile) look() error {
	all := f.d.key("d/" + f.id + "/")
	for {
		from := f.d.key(fmt.Sprintf("d/%s/%08x", f.id, f.known))
		kvs, err := f.d.get(etcdRange{Key: from, End: below(all), Limit: etcdKeys, KeysOnly: true})
		for _, kv := range kvs {
			var s etcdSpan
			fmt.Sscanf(strings.TrimPrefix(string(kv.Key), string(all)), "%x-%x-%x", &s.number,
				&s.start, &s.size)
			if s.number < f.known || s.start < 0 || s.start > etcdFileMost || s.size < 0 ||
				s.size > etcdPiece || !bytes.Equal(kv.Key, f.key(s.number, s.start, s.size)) {
				return &DamageError{File: f.d.Path(f.name),
					What: fmt.Sprintf("etcd has the key %q, which is none of ours", kv.Key)}
			}
			f.known = s.number + 1
			f.found++
			s.from, s.to = s.start, s.start+s.size
			f.lay(s)
		}
		if err != nil || len(kvs) < etcdKeys {
			f.count = max(f.count, f.known)
			return err
		}
	}
}

// isThere returns an os.ErrNotExist if the file has lost its name.
func (f *etcdFile) isThere() error {
	_, id, err := f.d.lookUp(f.name)
	if err == nil && id != f.id {
		err = fmt.Errorf("%s: %w", f.d.Path(f.name), os.ErrNotExist)
	}
	return err
}

// lay lays a piece over what there is. An empty one is where the file ends.
func (f *etcdFile) lay(s etcdSpan) {
	isEnd := s.size == 0
	i := sort.Search(len(f.spans), func(i int) bool { return f.spans[i].to > s.from })
	rest := slices.Clone(f.spans[i:])
	f.spans = f.spans[:i]
	if len(rest) > 0 && rest[0].from < s.from {
		before := rest[0]
		before.to = s.from
		f.spans = append(f.spans, before)
	}
	if isEnd {
		f.size = s.from
		return
	}
	f.spans = append(f.spans, s)
	f.size = max(f.size, s.to)
	for _, behind := range rest {
		if behind.to > s.to {
			behind.from = max(behind.from, s.to)
			f.spans = append(f.spans, behind)
		}
	}
}

func (f *etcdFile) ReadAt(b []byte, offset int64) (n int, err error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if err := f.send(1); err != nil {
		return 0, err
	}
	if f.known < f.count || offset+int64(len(b)) > f.size { // another process may have written
		if err := f.look(); err != nil {
			return 0, err
		}
	}
	for n < len(b) && offset < f.size {
		i := sort.Search(len(f.spans), func(i int) bool { return f.spans[i].to > offset })
		next := f.size
		if i < len(f.spans) {
			next = f.spans[i].from
		}
		part := b[n:]
		if next > offset {
			part = part[:min(int64(len(part)), next-offset)]
			clear(part)
		} else {
			s := f.spans[i]
			data, err := f.piece(i)
			if err != nil {
				return n, err
			}
			part = part[:copy(part, data[offset-s.start:s.to-s.start])]
		}
		n += len(part)
		offset += int64(len(part))
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// piece returns the bytes of span i's piece.
func (f *etcdFile) piece(i int) ([]byte, error) {
	s := f.spans[i]
	if k := s.number - f.first; k >= 0 && k < len(f.page) {
		return f.page[k].Value, nil
	}
	if s.number == f.first+len(f.page) {
		f.ahead = min(max(2*f.ahead, etcdAhead), etcdPage)
	} else {
		f.ahead = etcdAhead
	}
	f.first, f.page = s.number, nil
	for sum := int64(0); i < len(f.spans) && f.spans[i].number == f.first+len(f.page) &&
		len(f.page) < etcdKeys && (sum == 0 || sum+f.spans[i].size <= f.ahead); i++ {
		s = f.spans[i]
		sum += s.size
		f.page = append(f.page, etcdKV{Key: f.key(s.number, s.start, s.size),
			Value: make([]byte, s.size)})
	}
	kvs, err := f.d.get(etcdRange{Key: f.page[0].Key,
		End: append(slices.Clone(f.page[len(f.page)-1].Key), 0)})
	if err == nil && len(kvs) < len(f.page) { // it is damaged, if it is still there
		err = f.isThere()
	}
	if err != nil {
		f.page = nil
		return nil, err
	}
	k := 0
	for _, kv := range kvs {
		for k < len(f.page) && !bytes.Equal(f.page[k].Key, kv.Key) {
			k++
		}
		if k == len(f.page) {
			break
		}
		data := unpack(kv.Value, int64(len(f.page[k].Value)))
		if len(data) == len(f.page[k].Value) {
			f.page[k].Value = data
		}
	}
	return f.page[0].Value, nil
}

func (f *etcdFile) WriteAt(b []byte, offset int64) (int, error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if offset != f.at+int64(len(f.buf)) {
		if err := f.send(1); err != nil {
			return 0, err
		}
		f.at = offset
	}
	f.buf = append(f.buf, b...)
	return len(b), f.send(etcdPiece) // a whole piece need not wait for Sync
}

// send sends what is written in pieces, as long as there are least bytes.
func (f *etcdFile) send(least int) error {
	for len(f.buf) >= least {
		n := min(len(f.buf), etcdPiece)
		if err := f.put(f.at, f.buf[:n]); err != nil {
			return err
		}
		f.at += int64(n)
		f.buf = append(f.buf[:0], f.buf[n:]...)
	}
	return nil
}

// put adds a piece. If it fails the lock is lost, so no other one has its number.
func (f *etcdFile) put(offset int64, b []byte) error {
	if err := f.d.do(etcdPut(f.key(f.count, offset, int64(len(b))), f.pack(b))); err != nil {
		return err
	}
	f.count++
	f.size = max(f.size, offset+int64(len(b)))
	return nil
}

// pack returns b, or the same compressed if that is smaller: base64, and the members' copies
// and logs, make each byte dear.
func (f *etcdFile) pack(b []byte) []byte {
	if len(b) < etcdPackLeast {
		return b
	}
	if f.packer == nil {
		f.packer, _ = flate.NewWriter(&f.packed, flate.BestSpeed)
	}
	f.packed.Reset()
	f.packer.Reset(&f.packed)
	f.packer.Write(b)
	if f.packer.Close(); f.packed.Len() >= len(b) {
		return b
	}
	return f.packed.Bytes()
}

// unpack is the inverse. What is none of ours is no piece of that size.
func unpack(b []byte, size int64) []byte {
	if int64(len(b)) >= size {
		return b
	}
	unpacked, _ := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), size+1))
	return unpacked
}

func (f *etcdFile) Sync() error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	return f.send(1)
}

func (f *etcdFile) Truncate(size int64) error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	err := f.send(1)
	if err != nil || size == f.size {
		return err
	}
	if err = f.put(size, nil); err == nil {
		f.size = size
	}
	return err
}

func (f *etcdFile) Close() error { return nil }

// ---- the lock

// etcdOwner is what the lock says of who has it.
type etcdOwner struct {
	Addr, Process string // where it serves, or will, and who it is
	Since         time.Time
	Token         string // no two owners have the same
	Takeovers     int64  // how often somebody took the lock who was not given it
	Released      bool   // nobody has it any more
}

func (o etcdOwner) String() string {
	return fmt.Sprintf("by process %s, which serves %s since %s", o.Process,
		cmp.Or(o.Addr, "nothing"), o.Since.UTC().Format(time.RFC3339))
}

// etcdLock is the lock while it is held, until ctx is done: its cause says why.
type etcdLock struct {
	d      *etcdDirectory
	owner  etcdOwner
	value  []byte // what the lock says
	ctx    context.Context
	cancel context.CancelCauseFunc

	confirmed atomic.Pointer[time.Time] // when the last sign of life was sent that arrived
	// beat to Held: one has. One slot, for only the latest counts
	beaten chan struct{}
	stop   chan struct{} // closed by Close
	ended  chan struct{} // closed by beat
	silent bool          // the last one did not; beat's
	// how many members, one after the other, have refused it; beat's
	refused int
}

// step is what the key of that name says after n steps.
func (l *etcdLock) step(n int) []byte { return fmt.Appendf(nil, "%s-%d", l.owner.Token, n) }

// isOurs is what every transaction compares.
func (l *etcdLock) isOurs() etcdCompare {
	return etcdCompare{"VALUE", etcdKV{Key: l.d.key("lock"), Value: l.value}}
}

// lost notes why the lock is lost, the first time. It returns what was noted.
func (l *etcdLock) lost(err error) error {
	l.cancel(err)
	return context.Cause(l.ctx)
}

// InUse says who has the lock, or had it and ended without a word.
func (d *etcdDirectory) InUse() (owner string, inUse bool) {
	o, revision, err := d.owner()
	return o.String() + ", unless that has died", err == nil && revision > 0 && !o.Released
}

// owner is who has the lock, and the revision of its last sign of life; 0: nobody had it.
func (d *etcdDirectory) owner() (o etcdOwner, revision int64, err error) {
	kvs, err := d.get(etcdRange{Key: d.key("lock")})
	if err != nil || len(kvs) == 0 {
		return o, 0, err
	}
	if err := json.Unmarshal(kvs[0].Value, &o); err != nil {
		return o, 0, fmt.Errorf("%w: %s is no lock of kvserver", ErrNotOurs, d.Path("lock"))
	}
	return o, kvs[0].Revision, nil
}

// Lock waits for the lock, if others are told where the store is served: whoever has it is
// robbed of it once it has shown no sign of life for etcdTTL, by our clock.
func (d *etcdDirectory) Lock(ctx context.Context) (Lock, error) {
	l := d.newLock()
	var seen int64
	var since time.Time // when seen was seen first
	told, refused := "", 0
	for ; ; wait(ctx, etcdPoll) {
		if ctx.Err() != nil {
			l.release() // what take has sent may have arrived
			return nil, ctx.Err()
		}
		o, revision, err := d.owner()
		isWaiting := d.opts.Addr != ""
		switch {
		case err != nil && (!isWaiting || !errors.Is(err, ErrUnreachable)):
			return nil, err
		case err != nil:
			d.log.Warn("standing by, and etcd does not answer", "error", err)
			continue
		case seen != 0 && revision != seen && !isWaiting && !o.Released:
			return nil, fmt.Errorf("%w: %s %s", ErrLocked, d.name, o)
		case revision != seen || since.IsZero():
			seen, since = revision, time.Now()
		}
		if revision == 0 || o.Released || o.Token == l.owner.Token || time.Since(since) >= etcdTTL {
			taken, err := l.take(ctx, o, revision)
			if taken {
				break
			}
			if isFinal(err) {
				refused++
			}
			switch {
			case refused >= len(d.client.members), err != nil && !isWaiting:
				return nil, named(err)
			case err != nil && ctx.Err() == nil:
				d.log.Warn("cannot take the data over, trying again", "error", err)
			}
			continue
		}
		if isWaiting && told != o.Token {
			told = o.Token
			d.opts.Status.set("standby: the data is in use " + o.String())
			d.log.Info("standing by: another server has the data", "addr", o.Addr,
				"process", o.Process, "since", o.Since)
		}
	}
	d.lock = l
	d.opts.Status.set("opening the data")
	d.client.preferLeader(ctx)
	d.opts.Status.takeovers.Store(l.owner.Takeovers)
	go l.beat()
	if err := d.sweep(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// newLock returns a lock that is not taken yet.
func (d *etcdDirectory) newLock() *etcdLock {
	host, _ := os.Hostname()
	owner := etcdOwner{Addr: d.opts.Addr, Process: fmt.Sprintf("%d on %s", os.Getpid(), host),
		Token: rand.Text()}
	return &etcdLock{d: d, owner: owner, beaten: make(chan struct{}, 1), stop: make(chan struct{}),
		ended: make(chan struct{})}
}

// take takes the lock that o has, or had, unless that has shown a sign of life since
// revision. After an error that is not known: the next look tells.
func (l *etcdLock) take(ctx context.Context, o etcdOwner, revision int64) (taken bool, err error) {
	l.owner.Since, l.owner.Takeovers = time.Now(), o.Takeovers
	if revision > 0 && !o.Released && o.Token != l.owner.Token {
		l.owner.Takeovers++
	}
	l.value, _ = json.Marshal(l.owner)
	key := l.d.key("lock")
	answer, err := l.d.client.post(ctx, "kv/txn", etcdTxn{
		Compare: []etcdCompare{{"MOD", etcdKV{Key: key, Revision: revision}}},
		Success: []etcdOp{etcdPut(key, l.value), etcdPut(l.d.key("step"), l.step(0))},
	})
	if err != nil || !answer.Succeeded {
		return false, err
	}
	l.confirm(l.owner.Since)
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	return true, nil
}

// confirm notes that a sign of life has arrived that was sent then.
func (l *etcdLock) confirm(sent time.Time) {
	l.confirmed.Store(&sent)
	l.d.opts.Status.confirmed.Store(&sent)
	select {
	case l.beaten <- struct{}{}:
	default:
	}
}

// age is how old the last sign of life is, by the clock that says more: one of the two
// stands still while a machine sleeps, and the other can be set.
func (l *etcdLock) age() time.Duration {
	sent, now := *l.confirmed.Load(), time.Now()
	return max(now.Sub(sent), now.Round(0).Sub(sent.Round(0)).Abs())
}

// Lost is closed when the lock is lost.
func (l *etcdLock) Lost() <-chan struct{} { return l.ctx.Done() }

// Held tells whether nobody else can have had the lock up to now. Where the last sign of
// life is too old it waits for one more: if that arrives, nobody had.
func (l *etcdLock) Held() error {
	for l.age() >= etcdFresh {
		select {
		case <-l.beaten:
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		}
	}
	return context.Cause(l.ctx)
}

// beat shows signs of life until the lock is lost or given back. One goroutine for a lock.
func (l *etcdLock) beat() {
	defer close(l.ended)
	for pause := etcdBeat; ; {
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
			return
		case <-l.stop:
			return
		}
		pause = l.show()
	}
}

// show shows one sign of life, and returns the time until the next.
func (l *etcdLock) show() time.Duration {
	ctx, cancel := context.WithTimeout(l.ctx, etcdBeat)
	defer cancel()
	sent := time.Now()
	answer, err := l.d.client.post(ctx, "kv/txn", etcdTxn{
		Compare: []etcdCompare{l.isOurs()},
		Success: []etcdOp{etcdPut(l.d.key("lock"), l.value)},
	})
	switch {
	case err == nil && answer.Succeeded:
		l.refused = 0
		l.confirm(sent)
		if l.silent { // there may be another leader
			l.silent = false
			l.d.client.preferLeader(l.ctx)
		}
		return etcdBeat
	case err == nil:
		l.lost(ErrTakenOver)
	case isFinal(err):
		if l.refused++; l.refused >= len(l.d.client.members) {
			l.lost(named(err))
		}
	case sent.Sub(*l.confirmed.Load()) >= etcdPatience: // by the clock that nobody sets
		l.lost(fmt.Errorf("%w for %v: %w", ErrUnreachable, etcdPatience, err))
	case !l.silent:
		l.silent = true
		l.d.log.Warn("etcd does not answer, trying again", "error", err, "until", etcdPatience)
	}
	return etcdPause
}

// Close gives the lock back, if it is not lost: then another one can have it at once.
func (l *etcdLock) Close() error {
	close(l.stop)
	<-l.ended
	if l.ctx.Err() == nil {
		l.release()
	}
	l.lost(errors.New("the lock was given back"))
	return nil
}

// release gives the lock back, if it is ours. If that fails it is taken etcdTTL later.
func (l *etcdLock) release() {
	if l.value == nil { // take was never tried
		return
	}
	released := l.owner
	released.Released = true
	value, _ := json.Marshal(released)
	ctx, cancel := context.WithTimeout(context.Background(), etcdTimeout)
	defer cancel()
	l.d.client.call(ctx, "kv/txn", etcdTxn{
		Compare: []etcdCompare{l.isOurs()},
		Success: []etcdOp{etcdPut(l.d.key("lock"), value)},
	})
}
