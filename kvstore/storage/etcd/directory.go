package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// directory is a Directory in a cluster.
type directory struct {
	name   string // as people call it
	prefix string
	client *cluster
	opts   Options
	log    *slog.Logger

	ctx  context.Context // of those calls that come before there is a lock
	lock *clusterLock    // nil before Lock; then it stays

	turn  chan struct{} // one slot, for who changes names
	step  int           // the last change; who has turn may use it
	files atomic.Int64  // created so far, for their ids
}

// Options are what Open needs to know. The zero value is that of somebody who only looks.
type Options struct {
	// Addr is where the data will be served: others that wait for it are told. Without one, Lock
	// does not wait.
	Addr   string
	Log    *slog.Logger    // nil: nobody wants to know
	Status *storage.Status // nil: nobody looks
}

// IsAddress tells whether path is meant to be the address of a store in etcd.
func IsAddress(path string) bool {
	return strings.HasPrefix(path, "etcd:") || strings.HasPrefix(path, "etcds:")
}

// Overlap tells whether one of two addresses is inside the other's prefix.
func Overlap(a, b string) bool {
	a, b = strings.TrimRight(a, "/")+"/", strings.TrimRight(b, "/")+"/"
	return strings.HasPrefix(a, b) || strings.HasPrefix(b, a)
}

// Open returns the directory at etcd://host:port,host:port/prefix, or at etcds:// with
// TLS and ?ca=FILE&cert=FILE&key=FILE. The environment's KVSERVER_ETCD_USER is a
// name:password. Nothing is asked yet.
func Open(ctx context.Context, address string, opts Options) (storage.Directory, error) {
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
	client, err := newCluster(members, scheme == "etcds", query)
	if err != nil {
		return nil, err
	}
	d := &directory{name: scheme + "://" + hosts + "/" + prefix, prefix: prefix + "/",
		client: client, opts: opts, log: opts.Log, ctx: ctx, turn: make(chan struct{}, 1)}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.opts.Status == nil {
		d.opts.Status = new(storage.Status)
	}
	return d, nil
}

// Sizes: what is written costs a request, whatever its size, and zeros would be kept.
func (d *directory) Sizes() (segment, compact int64, reserve int) {
	return segmentBytes, segmentBytes, 0
}

func (d *directory) Path(name string) string { return strings.TrimSuffix(d.name+"/"+name, "/") }

// Sync has nothing to do: every change of names is durable when it is done.
func (d *directory) Sync() error { return nil }

// Close has nothing to do.
func (d *directory) Close() error {
	d.client.http.CloseIdleConnections()
	return nil
}

func (d *directory) key(name string) []byte { return []byte(d.prefix + name) }

// below is the end of the keys that begin with prefix.
func below(prefix []byte) (end []byte) {
	end = slices.Clone(prefix)
	end[len(end)-1]++
	return end
}

// call asks etcd: for patienceTime where there is no lock, else for three times that while the
// lock is held.
func (d *directory) call(at string, request any) (response, error) {
	ctx, patience := d.ctx, patienceTime
	if d.lock != nil {
		ctx, patience = d.lock.ctx, 3*patienceTime
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, ErrUnreachable)
	defer cancel()
	return d.client.call(ctx, at, request)
}

// get returns the keys that r means.
func (d *directory) get(r keyRange) ([]keyValue, error) {
	answer, err := d.call("kv/range", r)
	return answer.KVs, err
}

// change makes ops happen, once, if the lock is ours. They change names.
func (d *directory) change(ops ...operation) error {
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	key, before, after := d.key("step"), d.lock.step(d.step), d.lock.step(d.step+1)
	answer, err := d.call("kv/txn", transaction{
		Compare: []comparison{d.lock.isOurs(), {"VALUE", keyValue{Key: key, Value: before}}},
		Success: append(ops, putKey(key, after)),
		Failure: []operation{{Range: &keyRange{Key: key}}},
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
func (d *directory) do(op operation) error {
	if d.lock == nil {
		return errors.New("written without the lock")
	}
	answer, err := d.call("kv/txn", transaction{Compare: []comparison{d.lock.isOurs()},
		Success: []operation{op}})
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
func (d *directory) names() (names map[string]string, others []string, err error) {
	pieces := d.key("d/")
	before, err := d.get(keyRange{Key: d.key(""), End: pieces, KeysOnly: true, Limit: keysMost})
	if err != nil {
		return nil, nil, err
	}
	behind, err := d.get(keyRange{Key: below(pieces), End: below(d.key(""))})
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
func (d *directory) List() ([]string, error) {
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
func (d *directory) ids() (ids []string, err error) {
	r := keyRange{Key: d.key("d/"), End: below(d.key("d/")), Limit: 1, KeysOnly: true}
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
func (d *directory) lookUp(name string) (names map[string]string, id string, err error) {
	names, _, err = d.names()
	if id = names[name]; err == nil && id == "" {
		err = fmt.Errorf("%s: %w", d.Path(name), os.ErrNotExist)
	}
	return names, id, err
}

// Create makes a new file. The one that had the name goes.
func (d *directory) Create(name string) (storage.File, error) {
	names, _, err := d.names()
	if err != nil {
		return nil, err
	}
	id := fmt.Sprintf("%s-%d", d.lock.owner.Token, d.files.Add(1))
	if err := d.change(putKey(d.key("n/"+name), []byte(id))); err != nil {
		return nil, err
	}
	return d.file(id, name), d.forget(names, name)
}

func (d *directory) Rename(from, to string) error {
	names, id, err := d.lookUp(from)
	if err != nil {
		return err
	}
	if err := d.change(putKey(d.key("n/"+to), []byte(id)),
		deleteKeys(d.key("n/"+from), nil)); err != nil {
		return err
	}
	return d.forget(names, to)
}

func (d *directory) Remove(name string) error {
	names, _, err := d.lookUp(name)
	if err != nil {
		return err
	}
	if err := d.change(deleteKeys(d.key("n/"+name), nil)); err != nil {
		return err
	}
	return d.forget(names, name)
}

// Stamps tells which file has each name; how long it is is not asked.
func (d *directory) Stamps() (map[string]storage.Stamp, error) {
	names, _, err := d.names()
	stamps := map[string]storage.Stamp{}
	for name, id := range names {
		stamps[name] = storage.Stamp{ID: id}
	}
	return stamps, err
}

// forget removes the pieces of the file that had a name, unless it has another one. What it
// leaves when it fails the next Lock sweeps.
func (d *directory) forget(names map[string]string, name string) error {
	id := names[name]
	delete(names, name)
	if id == "" || slices.Contains(slices.Collect(maps.Values(names)), id) {
		return nil
	}
	return d.removePieces(id)
}

// removePieces removes the pieces of a file, some at a time: a transaction stops the cluster
// for as long as it takes.
func (d *directory) removePieces(id string) error {
	all := d.key("d/" + id + "/")
	for {
		kvs, err := d.get(keyRange{Key: all, End: below(all), Limit: keysMost, KeysOnly: true})
		if err != nil || len(kvs) == 0 {
			return err
		}
		if err := d.do(deleteKeys(all, append(kvs[len(kvs)-1].Key, 0))); err != nil {
			return err
		}
	}
}

// sweep removes the pieces of files that have no name.
func (d *directory) sweep() error {
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
func (d *directory) file(id, name string) *pieceFile {
	return &pieceFile{d: d, id: id, name: name, turn: make(chan struct{}, 1)}
}

func (d *directory) Extend(name string) (storage.File, error) {
	f, _, err := d.Open(name)
	return f, err
}

func (d *directory) Open(name string) (storage.File, int64, error) {
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
