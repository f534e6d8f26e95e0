package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// directory is a Directory in a cluster. Below the prefix that its address gives there are these
// keys:
//
//	lock        who may write: a holder. Its holder writes it anew every beatTime
//	step        the number of the holder's last change of names
//	n/NAME      the id of the file that has this name
//	d/ID/PIECE  one write to that file; PIECE is its number, its offset and its size. If the
//	            value is smaller than that, it is compressed (DEFLATE)
//
// Every transaction of a holder compares the lock with what the holder wrote there: one that was
// robbed of it can change nothing any more, however late its requests come. It also compares what
// it goes on from: the name's id and the piece before, or the step. And each may be sent again
// when its answer was lost: a piece has a key of its own and never changes, and a change of names
// says which step it is, so that no step is made twice.
//
// A lease of etcd's would not do: its time begins anew when the cluster gets another leader.
type directory struct {
	name   string // as people call it
	prefix string
	client *cluster
	opts   Options
	log    *slog.Logger

	ctx  context.Context // of those calls that come before there is a lock
	lock *clusterLock    // nil before Lock; then it stays

	access  access                // to what is below
	steps   string                // what all values of step begin with
	step    int                   // the last change
	names   map[string]string     // the id of each name, once the lock is held
	files   map[string]*pieceFile // by id, those that were opened since
	lost    map[string]bool       // names of files that etcd may not have as they were left there
	known   int64                 // the revision before etcd was perhaps put back; 0: it was not
	isSwept bool                  // pieces without a name were removed

	stamps atomic.Pointer[map[string]storage.Stamp] // of names
	pieces atomic.Int64                             // that there are, once the lock is held
}

// access admits one goroutine at a time to something. Unlike a sync.Mutex it can also be tried for a
// while, and in a test with a fake clock time goes on while somebody waits for it.
type access chan struct{}

// begin waits until nobody else has access. It returns what ends it.
func (a access) begin() (end func()) {
	a <- struct{}{}
	return a.end
}

func (a access) end() { <-a }

// segmentBytes is how large a log file becomes: what is read again at a start, about.
const segmentBytes = 16 << 20

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

	// We assume no port: each member must name its own.
	members := strings.Split(hosts, ",")
	for _, host := range members {
		_, _, hostErr := net.SplitHostPort(host)
		err = cmp.Or(err, hostErr)
	}

	// Without a prefix the store would be all of etcd, with the keys of others in it.
	if prefix == "" || scheme != "etcd" && scheme != "etcds" {
		err = errors.New("want etcd://HOST:PORT,.../PREFIX or etcds://")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrAddress, address, err)
	}

	// The zero Options are valid: what we say then goes nowhere.
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Status == nil {
		opts.Status = new(storage.Status)
	}

	client, err := newCluster(members, scheme == "etcds", query)
	if err != nil {
		return nil, err
	}
	client.log = opts.Log

	return &directory{name: scheme + "://" + hosts + "/" + prefix, prefix: prefix + "/",
		client: client, opts: opts, log: opts.Log, ctx: ctx, access: make(access, 1),
		files: map[string]*pieceFile{}, lost: map[string]bool{}}, nil
}

// Sizes: what is written costs a request, whatever its size, and zeros would be kept.
func (d *directory) Sizes() (segment, compact int64, reserve int) {
	return segmentBytes, segmentBytes, 0
}

func (d *directory) Path(name string) string { return strings.TrimSuffix(d.name+"/"+name, "/") }

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

// all are the keys below the prefix that begin with name.
func (d *directory) all(name string) *keyRange {
	return &keyRange{Key: d.key(name), End: below(d.key(name))}
}

// call asks etcd, about or for so many bytes. Without the lock that ends after patienceTime; with
// it after three times that, but for as long as etcd has no room.
func (d *directory) call(at string, request any, size int) (response, error) {
	// Without the lock we are starting, or only looking: give up soon, and say meanwhile why
	// nothing happens.
	if d.lock == nil {
		ctx, cancel := context.WithTimeoutCause(d.ctx, patienceTime, ErrUnreachable)
		defer cancel()
		defer time.AfterFunc(tellTime, func() {
			d.log.Warn("etcd does not answer yet, trying on")
			d.opts.Status.Set("etcd does not answer yet")
		}).Stop()
		return d.client.call(ctx, at, request, size)
	}

	// With the lock, beat gives etcd up after patienceTime. The longer limit here is for a request
	// that fails while signs of life arrive.
	for {
		ctx, cancel := context.WithTimeoutCause(d.lock.ctx, 3*patienceTime, ErrUnreachable)
		answer, err := d.client.call(ctx, at, request, size)
		cancel()

		// etcd is not the cluster that it was: Held says from now on that files are gone.
		if errors.Is(err, ErrOther) && !errors.Is(err, ErrUnreachable) {
			err = d.lock.miss(err)
		}

		// A full etcd is waited for: somebody can make room, and the write is not lost.
		if !errors.Is(err, syscall.ENOSPC) {
			return answer, err
		}
		d.client.noteFull(true)
		if err := wait(d.lock.ctx, beatTime); err != nil {
			return answer, err
		}
	}
}

// get returns the keys that r means, which are about so many bytes.
func (d *directory) get(r keyRange, size int) ([]keyValue, error) {
	answer, err := d.call("kv/range", r, size)
	return answer.KVs, err
}

// each calls do with the keys, without their values, from one on that is before end.
func (d *directory) each(from, end []byte, do func([]keyValue) error) error {
	for {
		kvs, err := d.get(keyRange{Key: from, End: end, Limit: keysMost, KeysOnly: true},
			-keysMost*keySize)
		if err == nil && len(kvs) > 0 {
			from = append(slices.Clone(kvs[len(kvs)-1].Key), 0)
			err = do(kvs)
		}

		// A page that is not full is the last one.
		if err != nil || len(kvs) < keysMost {
			return err
		}
	}
}

// do makes ops happen, at least once, if the lock is ours and so is what else is compared. They
// write about so many bytes. If the first one puts a step that is there already, they have
// happened. After a storage.ErrGone they may have happened or not.
func (d *directory) do(size int, ops []operation, compare ...comparison) error {
	if d.lock == nil {
		return errors.New("written without the lock")
	}

	// Nothing may follow a change of which it is not known whether it was made: for that the lock is
	// lost, and a next step would be taken for its.
	if err := context.Cause(d.lock.ctx); err != nil {
		return err
	}

	// If a comparison fails we get the lock that is there, so that judge can say why.
	step, first := d.key("step"), ops[0].Put
	t := transaction{Compare: append(compare, d.lock.isOurs()), Success: ops,
		Failure: []operation{readKey(d.key("lock")), readKey(step)}}
	for {
		answer, err := d.call("kv/txn", t, size)
		lock, is := answer.read(0).KVs, answer.read(1).KVs
		switch {
		case err == errSmaller, errors.Is(err, storage.ErrGone):
			return err
		case err != nil: // it may yet be done, and it is not known what the next one goes on from
			return d.lock.fail(err)
		case answer.Succeeded: // now
			return nil
		case first != nil && bytes.Equal(first.Key, step) && len(is) == 1 &&
			bytes.Equal(first.Value, is[0].Value): // the first time
			return nil
		}

		// Where only the lock is gone, and nobody has had it since, it is taken anew.
		if err := d.lock.judge(lock); d.lock.isOursIn(lock) || !errors.Is(err, storage.ErrGone) {
			return err
		}
		d.lock.retake(d.lock.ctx)

		// It may fail for a while, such as in a full etcd, until beat gives up.
		if cause := wait(d.lock.ctx, pauseTime); cause != nil {
			return cause
		}
	}
}

// stepValue is what the key step says after n steps.
func (d *directory) stepValue(n int) []byte { return fmt.Appendf(nil, "%s-%d", d.steps, n) }

// beginSteps begins to count steps anew. The caller has access.
func (d *directory) beginSteps() error {
	d.steps, d.step = rand.Text(), 0
	return d.do(0, []operation{putKey(d.key("step"), d.stepValue(0))})
}

// change gives names to ids, once, if the lock is ours and nobody else has changed them. The id
// "" takes a name away, and what has no name any more loses its pieces. The caller has access.
func (d *directory) change(ids map[string]string) error {
	// The step makes a repeated request harmless: it finds the new step, and changes nothing.
	ops := []operation{putKey(d.key("step"), d.stepValue(d.step+1))}
	compare := []comparison{isValue(d.key("step"), d.stepValue(d.step))}

	// A name that we know must still belong to the file that we know.
	names := maps.Clone(d.names)
	for name, id := range ids {
		key := d.key("n/" + name)
		if old := names[name]; old != "" {
			compare = append(compare, isValue(key, []byte(old)))
		}
		if names[name] = id; id != "" {
			ops = append(ops, putKey(key, []byte(id)))
		} else {
			delete(names, name)
			ops = append(ops, deleteKeys(key, nil))
		}
	}

	// A write compares its file's name, so none may be under way while that changes.
	without := nameless(slices.Collect(maps.Values(d.names)), names)
	for _, id := range slices.AppendSeq(slices.Clone(without), maps.Values(ids)) {
		if f := d.files[id]; f != nil {
			defer f.access.begin()()
		}
	}

	// Without any name all pieces go with the last one: pieces alone are taken for damage (begin).
	if len(names) == 0 {
		ops = append(ops, operation{Delete: d.all("d/")})
	}
	if err := d.do(0, ops, compare...); err != nil {
		return err
	}

	// The change is durable in etcd: take it down. A name that was given to another file, or taken
	// away, is no longer lost.
	d.step++
	if len(names) == 0 {
		d.pieces.Store(0)
	}

	for _, id := range without {
		if f := d.files[id]; f != nil {
			f.isDead.Store(true)
			d.client.garbage.Add(f.size)
		}
		delete(d.files, id)
	}
	for name, id := range ids {
		delete(d.lost, name)
		if f := d.files[id]; f != nil {
			f.name = name // if it is dead check finds it under that name, too
		}
	}
	d.setNames(names)
	return d.sweep(without)
}

// nameless returns those ids that have no name.
func nameless(ids []string, names map[string]string) []string {
	named := slices.Collect(maps.Values(names))
	return slices.DeleteFunc(ids, func(id string) bool { return slices.Contains(named, id) })
}

// sweep removes the pieces of those files that have no name, some at a time: a transaction stops
// the cluster for as long as it takes. What it leaves the next Sync finds. The caller has access.
func (d *directory) sweep(ids []string) error {
	for _, id := range nameless(ids, d.names) {
		all := d.all("d/" + id + "/")
		err := d.each(all.Key, all.End, func(kvs []keyValue) error {
			d.client.garbage.Add(int64(len(kvs)) * pieceExtra)
			d.pieces.Add(-int64(len(kvs)))
			end := append(slices.Clone(kvs[len(kvs)-1].Key), 0)
			return d.do(0, []operation{deleteKeys(all.Key, end)})
		})
		if err != nil {
			d.isSwept = false
			return err
		}
	}
	return nil
}

// begin takes down what there is, once the lock is held.
func (d *directory) begin() error {
	// A new series of steps makes every change that was sent before fail.
	if err := d.beginSteps(); err != nil {
		return err
	}

	names, pieces, _, err := d.stock(d.call)
	// A store must not begin empty over pieces that are there: Sync would remove them.
	if err == nil && len(names) == 0 && pieces > 0 {
		err = &storage.DamageError{File: d.Path("n"), What: "the names of all files are missing, " +
			"and their pieces are there"}
	}

	d.setNames(names)
	d.pieces.Store(pieces)
	return err
}

// stock asks etcd for the id of each name, how many pieces there are, and the lock.
func (d *directory) stock(ask func(at string, request any, size int) (response, error)) (
	names map[string]string, pieces int64, lock []keyValue, err error) {
	answer, err := ask("kv/txn", transaction{Success: []operation{{Range: d.all("n/")},
		{Range: &keyRange{Key: d.key("d/"), End: d.all("d/").End, CountOnly: true}},
		readKey(d.key("lock"))}}, 0)

	names = map[string]string{}
	for _, kv := range answer.read(0).KVs {
		names[strings.TrimPrefix(string(kv.Key), d.prefix+"n/")] = string(kv.Value)
	}
	return names, answer.read(1).Count, answer.read(2).KVs, err
}

// Stamps tells which file has each name. If check has found that something of ours is gone, all
// files are lost: they have new stamps each time, and until each of them was removed, or made anew,
// Held says that files are gone.
func (d *directory) Stamps() (map[string]storage.Stamp, error) {
	// Nothing is gone, so there is nothing to ask etcd.
	if !d.lock.isGone() {
		return *d.stamps.Load(), nil
	}

	// The caller must not go on before it is known what is gone.
	for !d.check() {
		if err := wait(d.lock.ctx, pauseTime); err != nil {
			return nil, err
		}
	}
	return *d.stamps.Load(), nil
}

// setNames notes what names there are. The caller has access.
func (d *directory) setNames(names map[string]string) {
	stamps := map[string]storage.Stamp{}
	for name, id := range names {
		if d.lost[name] {
			// A stamp that was never given before says that the file is not as it was left.
			id = rand.Text()
		}
		stamps[name] = storage.Stamp{ID: id}
	}
	d.names = names
	d.stamps.Store(&stamps)
}

// check looks whether etcd has all that this process has left there, and tells whether it knows:
// not if etcd does not answer at once, or a file is being written. If not, all files are lost: what
// is left of them is of no use, for the data is then written anew as a whole.
func (d *directory) check() (isKnown bool) {
	defer d.access.begin()()

	// The lock must be ours again first, so that nobody else changes what we compare.
	missed, isGone := d.lock.missed.Load(), d.lock.isGone()
	if isGone && d.recover() != nil {
		return false
	}

	names, more, lock, err := d.look()
	switch {
	case err != nil:
		return false
	case !d.lock.isOursIn(lock):
		// It is another one, or missing: judge tells which.
		d.lock.judge(lock)
		return false
	}

	// A piece more than were counted is of a request that has come late: it does no harm.
	isLost := !maps.Equal(names, d.names) || more < 0 || d.client.revision.Load() < d.known
	for name, id := range names {
		f := d.files[id]
		isLost = isLost || f != nil && f.isDead.Load() && !d.lost[name]
	}
	if isLost {
		d.lose(names)
	}

	// From here on what etcd has is what it should have, and only lost files are gone.
	d.known = 0
	d.setNames(names)
	d.pieces.Add(more)
	if len(d.lost) == 0 {
		d.lock.mended.Store(missed)
	}
	d.lock.look()
	return true
}

// lose notes that all files are lost, those that etcd has and those that we know. The caller has
// access.
func (d *directory) lose(names map[string]string) {
	// Held says so before a file takes no more writes: they would stand behind a hole.
	d.lock.missed.Add(1)
	for _, known := range []map[string]string{names, d.names} {
		for name := range known {
			d.lost[name] = true
		}
	}
	for _, f := range d.files {
		f.isDead.Store(true)
	}
}

// look asks what there is while nothing is being written, if that is so within a short time: the
// names, how many pieces more than there should be, and the lock. The caller has access.
func (d *directory) look() (names map[string]string, more int64, lock []keyValue, err error) {
	// Nothing may be written while etcd counts the pieces. A writer has access to its file: wait
	// for that, but not for long.
	late := time.After(pauseTime)
	for _, f := range d.files {
		select {
		case f.access <- struct{}{}:
			defer f.access.end()
		case <-late:
			return nil, 0, nil, errors.New("a file is being written")
		}
	}

	// One transaction reads all, so that names, number and lock are of the same moment.
	names, pieces, lock, err := d.stock(func(at string, t any, _ int) (response, error) {
		return d.client.try(d.lock.ctx, at, t)
	})
	// Another cluster, or an older state of ours, has answered: Held must know.
	if errors.Is(err, ErrOther) && !errors.Is(err, ErrUnreachable) {
		err = d.lock.miss(err)
	}
	return names, pieces - d.pieces.Load(), lock, err
}

// recover goes on from what there is now, if the lock is ours still, or nobody's. The caller has
// access.
func (d *directory) recover() error {
	// etcd may know less than before, or be another cluster now, which counts other revisions: a
	// lock there that is not ours is somebody's.
	l, was := d.lock, *d.client.id.Load()
	d.known = max(d.known, d.client.revision.Load())
	err := d.client.adopt(l.ctx)
	if err == nil && *d.client.id.Load() != was {
		d.known = math.MaxInt64
		l.revision.Store(0)
	}
	if err == nil {
		err = l.retake(l.ctx)
	}

	// The key step may be older than ours, too, so the steps begin anew.
	if err == nil {
		err = d.beginSteps()
	}
	return err
}

// List returns names of files, and of keys that are none of ours.
func (d *directory) List() (list []string, err error) {
	defer d.access.begin()()

	// Without the lock we know no names: ask etcd, and list also the keys that are none of
	// ours, so that people see them.
	names := d.names
	if d.lock == nil {
		if _, err := d.client.agree(d.ctx); err != nil {
			return nil, err
		}
		if names, _, _, err = d.stock(d.call); err != nil {
			return nil, err
		}
		if _, list, err = d.scan(); err != nil {
			return nil, err
		}
	}

	list = slices.AppendSeq(list, maps.Keys(names))
	slices.Sort(list)
	return list, nil
}

// scan returns the ids of files that have pieces, and the keys that are none of ours.
func (d *directory) scan() (ids, others []string, err error) {
	// Read one key, then jump behind all that belong with it: there are many pieces, but few
	// files. Who has the lock wants all ids.
	for from := d.key(""); d.lock != nil || len(others) < othersMost; {
		kvs, err := d.get(keyRange{Key: from, End: d.all("").End, Limit: 1, KeysOnly: true}, 0)
		if err != nil || len(kvs) == 0 {
			return ids, others, err
		}

		key := strings.TrimPrefix(string(kvs[0].Key), d.prefix)
		from = append(kvs[0].Key, 0)
		id, isPiece := pieceID(key)
		inner, isInner := innerStore(key)

		switch {
		case isPiece:
			ids = append(ids, id)
			from = d.all("d/" + id + "/").End
		case strings.HasPrefix(key, "n/"):
			from = d.all("n/").End
		case isInner: // it is not ours to judge
			from = d.all(inner + "/").End
		case key != "lock" && key != "step":
			others = append(others, strconv.Quote(key)) // so that it is no file's name
		}
	}
	return ids, others, nil
}

// othersMost is how many keys that are none of ours we want to know.
const othersMost = 10

// pieceID is the id of the file to which a piece belongs: a random text, and a number.
func pieceID(key string) (id string, isPiece bool) {
	rest, isBelow := strings.CutPrefix(key, "d/")
	id, _, isPiece = strings.Cut(rest, "/")
	token, number, _ := strings.Cut(id, "-")
	_, err := strconv.Atoi(number)
	return id, isBelow && isPiece && len(token) == len(rand.Text()) && err == nil
}

// innerStore is the prefix of the store, in a prefix inside ours, to which a key may belong.
func innerStore(key string) (inner string, isInner bool) {
	for i, char := range key {
		if char != '/' || i == 0 {
			continue
		}
		rest := key[i+1:]
		_, isPiece := pieceID(rest)
		if rest == "lock" || rest == "step" || strings.HasPrefix(rest, "n/") || isPiece {
			return key[:i], true
		}
	}
	return "", false
}

// mayBegin refuses a new store where it may not be made: inside another one's prefix, or where so
// few members answer that there may be one elsewhere.
func (d *directory) mayBegin(ctx context.Context) error {
	// Members that are not one cluster can hold two stores: do not make one there.
	answered, err := d.client.agree(ctx)
	if err != nil {
		return err
	}

	// The members that do not answer may be a cluster that has the store, unless they are few.
	if all := len(d.client.members); 2*answered <= all {
		return fmt.Errorf("%w: only %d of %d members answer, too few for a new store", ErrUnreachable,
			answered, all)
	}

	// A store at a shorter prefix would find our keys among its own: look for its lock.
	for i, char := range d.prefix[:len(d.prefix)-1] {
		if char != '/' {
			continue
		}
		outer := d.prefix[:i]
		answer, err := d.client.try(ctx, "kv/range", keyRange{Key: []byte(outer + "/lock")})
		if err != nil {
			return err
		}

		// Only a lock of kvserver's says that there is a store.
		if o, _, err := d.readLock(answer.KVs); err == nil && o.Token != "" {
			return fmt.Errorf("%w: %s is inside the prefix %s, which is a store", storage.ErrNotOurs,
				d.name, outer)
		}
	}
	return nil
}

// find returns the id of a name. The caller has access.
func (d *directory) find(name string) (id string, err error) {
	// The holder of the lock knows all names. Others ask etcd each time.
	names := d.names
	if d.lock == nil {
		names, _, _, err = d.stock(d.call)
	}

	if id = names[name]; err == nil && id == "" {
		err = fmt.Errorf("%s: %w", d.Path(name), os.ErrNotExist)
	}
	return id, err
}

// Create makes a new file. The one that had the name goes.
func (d *directory) Create(name string) (storage.File, error) {
	defer d.access.begin()()

	// No other process gives this id.
	id := rand.Text() + "-0"
	if err := d.change(map[string]string{name: id}); err != nil {
		return nil, err
	}
	d.files[id] = newFile(d, id, name)
	return d.files[id], nil
}

func (d *directory) Rename(from, to string) error {
	defer d.access.begin()()
	id, err := d.find(from)
	if err == nil {
		err = d.change(map[string]string{to: id, from: ""})
	}
	return err
}

func (d *directory) Remove(name string) error {
	defer d.access.begin()()

	if _, err := d.find(name); err != nil {
		delete(d.lost, name) // it is gone, as the caller wants it
		return err
	}
	return d.change(map[string]string{name: ""})
}

func (d *directory) Extend(name string) (storage.File, error) {
	f, _, err := d.Open(name)
	return f, err
}

// Open opens a file. While the lock is held nobody else writes it, so it is looked at once.
func (d *directory) Open(name string) (storage.File, int64, error) {
	defer d.access.begin()()

	id, err := d.find(name)
	if err != nil {
		return nil, 0, err
	}

	// A file that is not open yet: ask etcd which pieces it has.
	f := d.files[id]
	if f == nil {
		f = newFile(d, id, name)
		if err := f.open(); err != nil {
			return nil, 0, err
		}
	}

	// With the lock only we write the file, so what we know of it stays true. Without the lock
	// the next Open must ask again.
	if d.lock != nil {
		d.files[id] = f
	}

	return f, f.end(), nil
}

// Sync has the first time, after a load, the pieces removed that have no name, as where somebody
// has deleted names. Otherwise every change of names is durable when it is done.
func (d *directory) Sync() error {
	defer d.access.begin()()
	// Only the holder may remove anything, and once is enough: nobody else writes meanwhile.
	if d.isSwept || d.lock == nil {
		return nil
	}

	ids, _, err := d.scan()
	if err == nil {
		d.isSwept = true
		err = d.sweep(ids)
	}
	return err
}
