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
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// directory is a Directory in a cluster. Its address gives a prefix, below which are these keys:
//
//	lock        who may write: a holder in JSON, which puts it again every beatTime
//	step        the series and number of the last change of names
//	n/NAME      the id of the file that has this name
//	d/ID/PIECE  some bytes of the file with this id: PIECE has the piece's number, and their
//	            offset and size. A value shorter than this size is compressed (DEFLATE)
//
// Every change by the holder is a transaction that compares the lock with what the holder has put
// there (except a retake of the lock). So a process that has lost the lock can change nothing any
// more, however late its requests arrive. A write and a change of names also compare the state that
// they follow: the name's id and the piece before, or the step. And they may be sent again when the
// answer was lost: a piece has a key of its own and never changes, and a change of names puts the
// next step, so that it cannot happen twice.
//
// An etcd lease would not do: its time starts again when the cluster gets another leader.
type directory struct {
	name   string // as people call it
	prefix string
	client *cluster
	opts   Options

	ctx  context.Context // for requests while there is no lock
	told sync.Once       // for the log line that etcd does not answer yet
	lock *clusterLock    // set by Lock; nil before

	access  access                // guards what is below
	steps   string                // what all values of step begin with
	step    int                   // the number of the last change
	names   map[string]string     // the id of each name, once the lock is held
	files   map[string]*pieceFile // by id: files that were opened since
	lost    map[string]bool       // names whose files etcd may not have as they were written
	known   int64                 // the revision before etcd was perhaps restored; 0: it was not
	isSwept bool                  // pieces of files without a name were removed

	stamps atomic.Pointer[map[string]storage.Stamp] // for Stamps, by name
	pieces atomic.Int64                             // number of pieces in etcd, once the lock is held
}

// access admits one goroutine at a time. It is a channel and not a sync.Mutex because takeStock
// waits for it only a while, and because in a test with a fake clock time goes on while somebody
// waits for it.
type access chan struct{}

// enter waits until nobody else has access. It returns the function that ends the access.
func (a access) enter() (end func()) {
	a <- struct{}{}
	return a.leave
}

func (a access) leave() { <-a }

// segmentBytes is how large a segment becomes, in bytes; in a small database it is less (Sizes).
const segmentBytes = 16 << 20

// Options are what Open needs to know. The zero value is for a process that is no server.
type Options struct {
	// Addr is the address at which this process will serve the data. Other servers that wait for
	// the lock log it. If Addr is "", Lock does not wait for a holder that is alive.
	Addr   string
	Log    *slog.Logger    // nil: log nothing
	Status *storage.Status // nil: nobody reads it
}

// IsAddress reports whether path is meant to be the address of a store in etcd.
func IsAddress(path string) bool {
	return strings.HasPrefix(path, "etcd:") || strings.HasPrefix(path, "etcds:")
}

// Overlap reports whether one of two addresses is the other one, or inside its prefix, as far as
// their texts show it: with options, or other members, only mayBegin can find that out.
func Overlap(a, b string) bool {
	a, b = strings.TrimRight(a, "/")+"/", strings.TrimRight(b, "/")+"/"
	return strings.HasPrefix(a, b) || strings.HasPrefix(b, a)
}

// Open returns the directory at etcd://host:port,host:port/prefix, or with TLS at
// etcds://host:port,host:port/prefix?ca=FILE&cert=FILE&key=FILE. The environment variable
// KVSERVER_ETCD_USER may have a name:password. Open sends no request. ctx ends the requests that
// are sent before Lock.
func Open(ctx context.Context, address string, opts Options) (storage.Directory, error) {
	rest, text, _ := strings.Cut(address, "?")
	scheme, rest, _ := strings.Cut(rest, "://")
	hosts, prefix, _ := strings.Cut(strings.TrimRight(rest, "/"), "/")
	query, err := url.ParseQuery(text)

	// An option that does nothing would make somebody believe that the connection is encrypted.
	for name := range query {
		if scheme != "etcds" || !slices.Contains([]string{"ca", "cert", "key"}, name) {
			err = fmt.Errorf("%q is no option: etcds:// has ca, cert and key, and etcd:// has none", name)
		}
	}

	// There is no default port: each member must name one.
	members := strings.Split(hosts, ",")
	for _, host := range members {
		_, _, hostErr := net.SplitHostPort(host)
		err = cmp.Or(err, hostErr)
	}

	// Without a prefix everybody's keys would be the store's.
	if prefix == "" || scheme != "etcd" && scheme != "etcds" {
		err = errors.New("want etcd://HOST:PORT,.../PREFIX or etcds://")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrAddress, address, err)
	}

	opts.Log = cmp.Or(opts.Log, slog.New(slog.DiscardHandler))
	opts.Status = cmp.Or(opts.Status, new(storage.Status))
	client, err := newCluster(members, scheme == "etcds", query)
	if err != nil {
		return nil, err
	}
	client.log = opts.Log

	return &directory{name: scheme + "://" + hosts + "/" + prefix, prefix: prefix + "/",
		client: client, opts: opts, ctx: ctx, access: make(access, 1),
		files: map[string]*pieceFile{}, lost: map[string]bool{}}, nil
}

// Sizes has small segments, smaller ones for a small database, and no zeros ahead: etcd would store
// the zeros. The lock must be held, for the quota to be known.
func (d *directory) Sizes() (segment, compact int64, zeros int) {
	segment = d.client.share(segmentBytes)
	return segment, segment, 0
}

func (d *directory) Path(name string) string { return strings.TrimSuffix(d.name+"/"+name, "/") }

// Close closes idle connections.
func (d *directory) Close() error {
	d.client.http.CloseIdleConnections()
	return nil
}

func (d *directory) key(name string) []byte { return []byte(d.prefix + name) }

// below returns the end of the range of keys that begin with prefix.
func below(prefix []byte) (end []byte) {
	end = slices.Clone(prefix)
	end[len(end)-1]++
	return end
}

// all is the range of the store's keys that begin with name.
func (d *directory) all(name string) *keyRange {
	return &keyRange{Key: d.key(name), End: below(d.key(name))}
}

// call is cluster.call with a limit: patienceTime while there is no lock, else three times that.
func (d *directory) call(at string, request any, size int) (response, error) {
	// Without the lock this process is starting, or only reads: give up soon, and say meanwhile
	// why nothing happens.
	if d.lock == nil {
		ctx, cancel := context.WithTimeoutCause(d.ctx, patienceTime, ErrUnreachable)
		defer cancel()
		defer d.awaitAnswer()()
		return d.client.call(ctx, at, request, size)
	}

	// With the lock, beat gives up after patienceTime without an answer. The longer limit here is
	// for a request that fails while signs of life arrive.
	ctx, cancel := context.WithTimeoutCause(d.lock.ctx, 3*patienceTime, ErrUnreachable)
	defer cancel()
	answer, err := d.client.call(ctx, at, request, size)

	// etcd is not the cluster that it was: Held returns storage.ErrGone from now on.
	if errors.Is(err, ErrOther) && !errors.Is(err, ErrUnreachable) {
		err = d.lock.miss(err)
	}
	return answer, err
}

// awaitAnswer lets the log and the status say after tellTime that etcd does not answer yet, unless
// end, which it returns, is called before.
func (d *directory) awaitAnswer() (end func() bool) {
	return time.AfterFunc(tellTime, func() {
		d.opts.Status.Set("etcd does not answer yet")
		d.told.Do(func() {
			why := cmp.Or(d.client.failure.Load(), &errSilent)
			d.client.log.Warn("etcd does not answer yet, trying on", "error", *why)
		})
	}).Stop
}

// get returns the keys of a range. size is as for cluster.post.
func (d *directory) get(r keyRange, size int) ([]keyValue, error) {
	answer, err := d.call("kv/range", r, size)
	return answer.KVs, err
}

// each calls do with the keys of a range, which begins at from and ends before end: some keys at a
// time, without their values.
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

// do applies ops in one transaction, at least once, if the lock is ours and all comparisons hold.
// ops put about size bytes. If the first of ops puts the step that etcd has already, an earlier try
// has applied them. If etcd is full and size is 0, do waits for room; if size is more, it returns a
// storage.ErrNoRoom. After that, an errSmaller or a storage.ErrGone it is not known whether ops
// were applied. An errUnlike says that a comparison of a write does not hold.
func (d *directory) do(size int, ops []operation, compare ...comparison) error {
	// If a comparison fails, read the lock and the step, to find out why.
	step, first := d.key("step"), ops[0].Put
	isStep := first != nil && bytes.Equal(first.Key, step)
	t := transaction{Compare: append(compare, d.lock.isOurs()), Success: ops,
		Failure: []operation{readKey(d.key("lock")), readKey(step)}}

	// If the lock is lost, perhaps it is not known whether the last change was made. No other may
	// follow: it would have the same step.
	for d.lock.ctx.Err() == nil {
		answer, err := d.call("kv/txn", t, size)
		lock, is := answer.read(0).KVs, answer.read(1).KVs
		switch {
		case err == errSmaller, errors.Is(err, storage.ErrGone):
			return err

		// etcd is full. It says so, too, after it has applied ops that fill it.
		case errors.Is(err, syscall.ENOSPC):
			d.client.noteFull(true)
			if size > 0 {
				return fmt.Errorf("%w: %w", storage.ErrNoRoom, err)
			}
			wait(d.lock.ctx, beatTime)
			continue

		case err != nil: // ops may still be applied: the next transaction cannot know what it follows
			return d.lock.fail(err)
		case answer.Succeeded:
			return nil
		case isStep && len(is) == 1 && bytes.Equal(first.Value, is[0].Value): // by an earlier try
			return nil

		// Our lock is there, so it is one of compare that does not hold.
		case !isStep && d.lock.isOursIn(lock):
			return errUnlike
		}

		// If only the lock is gone, and nobody else has had it since, take it again.
		if err := d.lock.judge(lock); d.lock.isOursIn(lock) || !errors.Is(err, storage.ErrGone) {
			return err
		}
		d.lock.retake(d.lock.ctx)

		// retake may fail for a while, such as in a full etcd: try again until beat gives up.
		wait(d.lock.ctx, pauseTime)
	}
	return context.Cause(d.lock.ctx)
}

// stepValue is the value of the key step after n changes.
func (d *directory) stepValue(n int) []byte { return fmt.Appendf(nil, "%s-%d", d.steps, n) }

// beginSteps starts a new series of steps. The caller has access, or is readAll. The step that is
// there is compared, so that the request is harmless if the network delivers it again, later.
func (d *directory) beginSteps() error {
	step, revision := d.key("step"), int64(0)
	answer, err := d.call("kv/txn", transaction{Success: []operation{readKey(step)}}, 0)
	if err != nil {
		return err
	}
	for _, kv := range answer.read(0).KVs {
		revision = kv.Revision
	}

	d.steps, d.step = rand.Text(), 0
	return d.do(0, []operation{putKey(step, d.stepValue(0))}, isRevision(step, revision))
}

// change gives each name its new id in ids, in one transaction, if the lock is ours and the names
// are as we know them. The id "" removes a name. The pieces of files that have lost their names are
// removed. The caller has access.
func (d *directory) change(ids map[string]string) error {
	// The step makes it harmless to send the request twice: the second finds the new step, and
	// changes nothing.
	ops := []operation{putKey(d.key("step"), d.stepValue(d.step+1))}
	compare := []comparison{isValue(d.key("step"), d.stepValue(d.step))}

	// A name that we know must still belong to the same file.
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

	// A write compares its file's name, so no write may be under way while the name changes.
	without := nameless(slices.Collect(maps.Values(d.names)), names)
	for _, id := range slices.AppendSeq(slices.Clone(without), maps.Values(ids)) {
		if f := d.files[id]; f != nil {
			defer f.access.enter()()
		}
	}

	// The last name goes together with all pieces: readAll takes pieces without any name for
	// damage.
	if len(names) == 0 {
		ops = append(ops, operation{Delete: d.all("d/")})
	}
	if err := d.do(0, ops, compare...); err != nil {
		return err
	}

	// The change is durable in etcd: note it here. A name that has got another file, or was
	// removed, is no longer lost.
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
			f.name = name // which the file's next write compares (add)
		}
	}
	d.setNames(names)
	return d.sweep(without)
}

// nameless returns those of ids that have no name in names. It changes ids.
func nameless(ids []string, names map[string]string) []string {
	named := slices.Collect(maps.Values(names))
	return slices.DeleteFunc(ids, func(id string) bool { return slices.Contains(named, id) })
}

// sweep removes the pieces of those files that have no name. It removes some at a time, because the
// cluster does nothing else during a transaction. If it fails, the next Sync removes the rest. The
// caller has access.
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

// readAll reads what is in etcd, once the lock is held. It needs no access: nobody else has d yet.
func (d *directory) readAll() error {
	// A new series of steps makes every change fail that was sent before, and arrives late.
	if err := d.beginSteps(); err != nil {
		return err
	}

	names, pieces, _, err := d.stock(d.call)
	// A store must not begin empty while there are pieces: Sync would remove them.
	if err == nil && len(names) == 0 && pieces > 0 {
		err = &storage.DamageError{File: d.Path("n"), What: "the names of all files are missing, " +
			"and their pieces are there"}
	}

	d.setNames(names)
	d.pieces.Store(pieces)
	return err
}

// stock reads the id of each name, the number of pieces, and the lock, all of one moment.
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

// Stamps returns which file each name has. If check has found that anything of ours is gone, all
// files count as lost: their stamps are new each time, and Held returns a storage.ErrGone until
// each of them was removed or replaced.
func (d *directory) Stamps() (map[string]storage.Stamp, error) {
	// Nothing is gone: do not ask etcd.
	if !d.lock.isGone() {
		return *d.stamps.Load(), nil
	}

	// Wait until it is known what is gone: the caller must not go on before.
	for !d.check() {
		if err := wait(d.lock.ctx, pauseTime); err != nil {
			return nil, err
		}
	}
	return *d.stamps.Load(), nil
}

// setNames sets names, and makes their stamps. The caller has access, or is readAll.
func (d *directory) setNames(names map[string]string) {
	stamps := map[string]storage.Stamp{}
	for name, id := range names {
		if d.lost[name] {
			// A new stamp says that the file is not as it was written.
			id = rand.Text()
		}
		stamps[name] = storage.Stamp{ID: id}
	}
	d.names = names
	d.stamps.Store(&stamps)
}

// check finds out whether etcd has everything that this process has written. If anything is gone,
// all files count as lost: the store then writes all its data again, so what is left of them is of
// no use. It returns false if it could not find out: etcd did not answer, a file is being written,
// a write has arrived late, or the lock has to be taken again.
func (d *directory) check() (isKnown bool) {
	defer d.access.enter()()

	// First the lock must be ours again, so that nobody else changes what we compare.
	missed, isGone := d.lock.missed.Load(), d.lock.isGone()
	if isGone && d.recover() != nil {
		return false
	}

	names, more, lock, err := d.takeStock()
	switch {
	case err != nil:
		return false
	case !d.lock.isOursIn(lock):
		// The lock is another one, or missing: judge finds out which.
		d.lock.judge(lock)
		return false
	}

	// More pieces than were counted, of a file that is not open, do no harm: a request has arrived
	// late.
	isLost := !maps.Equal(names, d.names) || more < 0 || d.client.revision.Load() < d.known
	for name, id := range names {
		f := d.files[id]
		isLost = isLost || f != nil && f.isDead.Load() && !d.lost[name]
	}
	if isLost {
		d.lose(names)
	}

	// What etcd has now is what later checks compare with.
	d.known = 0
	d.setNames(names)
	d.pieces.Add(more)
	if len(d.lost) == 0 {
		d.lock.mended.Store(missed)
	}
	return true
}

// lose marks all files as lost: those that etcd has, which are names, and those that we know. The
// caller has access.
func (d *directory) lose(names map[string]string) {
	// First of all Held must say so: from here on writes to the files go nowhere.
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

// takeStock reads the names, the lock, and how many pieces there are beyond those counted, at a
// moment at which no file is being written. It fails if that moment does not come soon. The caller
// has access.
func (d *directory) takeStock() (names map[string]string, more int64, lock []keyValue, err error) {
	// A writer has access to its file. Wait for that, but not for long.
	late := time.After(pauseTime)
	for _, f := range d.files {
		select {
		case f.access <- struct{}{}:
			defer f.access.leave()
		case <-late:
			return nil, 0, nil, errors.New("a file is being written")
		}
	}

	names, pieces, lock, err := d.stock(func(at string, t any, _ int) (response, error) {
		return d.client.try(d.lock.ctx, at, t)
	})

	// A write that arrives late adds a piece, and may remove pieces that it joins: the files have
	// all their bytes then. If that is why the numbers differ, look again later.
	counted := d.pieces.Load()
	for _, f := range d.files {
		if err == nil && pieces != counted && d.lock.isOursIn(lock) && !f.isDead.Load() {
			err = f.unlessGone(f.settle(nil))
		}
	}
	if err == nil && d.pieces.Load() != counted {
		err = errors.New("a write has arrived late")
	}
	// Another cluster, or an older state of ours, has answered: Held must say so.
	if errors.Is(err, ErrOther) && !errors.Is(err, ErrUnreachable) {
		err = d.lock.miss(err)
	}
	return names, pieces - d.pieces.Load(), lock, err
}

// recover accepts the cluster as it is now, and takes the lock again, if that is still ours, or
// nobody's. The caller has access.
func (d *directory) recover() error {
	// etcd may have been restored, or be another cluster now. Revisions of another cluster cannot
	// be compared with ours, so any lock there that is not ours is somebody else's.
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

	// The key step may be an older one too: start a new series.
	if err == nil {
		err = d.beginSteps()
	}
	return err
}

// List returns the names of files, and while there is no lock also the quoted names of keys that
// are not ours.
func (d *directory) List() (list []string, err error) {
	defer d.access.enter()()

	// Without the lock no names are known: ask etcd. Keys that are not ours are listed so that a
	// start refuses the prefix, and people see why.
	names := d.names
	if d.lock == nil {
		end := d.awaitAnswer()
		_, err := d.client.agree(d.ctx)
		if end(); err != nil {
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

// scan returns the ids of files that have pieces, and the keys that are not ours. While there is no
// lock it stops after othersMost of these.
func (d *directory) scan() (ids, others []string, err error) {
	// Read one key, then skip all that belong with it: there are many pieces, but few files.
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
		case isInner: // another store, whose keys are not looked at
			from = d.all(inner + "/").End
		case key != "lock" && key != "step":
			others = append(others, strconv.Quote(key)) // quoted, it cannot be a file's name
		}
	}
	return ids, others, nil
}

// othersMost is how many keys that are not ours are listed, at most.
const othersMost = 10

// pieceID returns the id of the file to which a piece belongs, and whether key is a piece's at all.
// An id is a random text and a number.
func pieceID(key string) (id string, isPiece bool) {
	rest, isBelow := strings.CutPrefix(key, "d/")
	id, _, isPiece = strings.Cut(rest, "/")
	token, number, _ := strings.Cut(id, "-")
	_, err := strconv.Atoi(number)
	return id, isBelow && isPiece && len(token) == len(rand.Text()) && err == nil
}

// innerStore returns the prefix of the store inside ours to which key belongs, if it looks like the
// key of one.
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

// mayBegin returns an error if a new store must not be made here: inside another store's prefix, or
// while so few members answer that the others may have the store.
func (d *directory) mayBegin(ctx context.Context) error {
	// Members that are not one cluster could get two stores.
	answered, err := d.client.agree(ctx)
	if err != nil {
		return err
	}

	// Members that do not answer may be another cluster that has the store, unless they are few.
	if all := len(d.client.members); 2*answered <= all {
		return fmt.Errorf("%w: only %d of %d members answer, too few for a new store", ErrUnreachable,
			answered, all)
	}

	// A store at a shorter prefix would find our keys among its own. Look for its lock.
	for i, char := range d.prefix[:len(d.prefix)-1] {
		if char != '/' {
			continue
		}
		outer := d.prefix[:i]
		answer, err := d.client.try(ctx, "kv/range", keyRange{Key: []byte(outer + "/lock")})
		if err != nil {
			return err
		}

		// A key of that name is a lock only if kvserver has written it.
		if o, _, err := d.readLock(answer.KVs); err == nil && o.Token != "" {
			return fmt.Errorf("%w: %s is inside the prefix %s, which is a store", storage.ErrNotOurs,
				d.name, outer)
		}
	}
	return nil
}

// fileID returns the id of a name. The caller has access, or this process has no lock.
func (d *directory) fileID(name string) (id string, err error) {
	// The holder of the lock knows all names. Any other process asks etcd each time.
	names := d.names
	if d.lock == nil {
		names, _, _, err = d.stock(d.call)
	}

	if id = names[name]; err == nil && id == "" {
		err = fmt.Errorf("%s: %w", d.Path(name), os.ErrNotExist)
	}
	return id, err
}

// Create makes a new file. It replaces a file that has the name.
func (d *directory) Create(name string) (storage.File, error) {
	defer d.access.enter()()

	// The text is random: no other process makes the same id.
	id := rand.Text() + "-0"
	if err := d.change(map[string]string{name: id}); err != nil {
		return nil, err
	}
	d.files[id] = newFile(d, id, name)
	return d.files[id], nil
}

func (d *directory) Rename(from, to string) error {
	defer d.access.enter()()
	id, err := d.fileID(from)
	if err == nil {
		err = d.change(map[string]string{to: id, from: ""})
	}
	return err
}

func (d *directory) Remove(name string) error {
	defer d.access.enter()()

	if _, err := d.fileID(name); err != nil {
		delete(d.lost, name) // there is no such file any more, as the caller wants
		return err
	}
	return d.change(map[string]string{name: ""})
}

func (d *directory) Extend(name string) (storage.File, error) {
	f, _, err := d.Open(name)
	return f, err
}

// Open opens a file. For the holder of the lock it asks etcd for a file's pieces only the first
// time: nobody else writes the file.
func (d *directory) Open(name string) (storage.File, int64, error) {
	defer d.access.enter()()

	id, err := d.fileID(name)
	if err != nil {
		return nil, 0, err
	}

	f := d.files[id]
	if f == nil {
		f = newFile(d, id, name)
		if err := f.open(); err != nil {
			return nil, 0, err
		}
	}

	// Without the lock the next Open must ask again.
	if d.lock != nil {
		d.files[id] = f
	}

	return f, f.length(), nil
}

// Sync has nothing to make durable: every change of names is durable when it is made. The first
// Sync after a start, or after a sweep that failed, removes all pieces of files without a name,
// such as a crash leaves.
func (d *directory) Sync() error {
	defer d.access.enter()()
	// Only the holder may remove anything, and once is enough: nobody else writes.
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
