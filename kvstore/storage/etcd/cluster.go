// Package etcd has a Directory in an etcd cluster. It talks to etcd through its JSON gateway.
//
//	cluster.go    requests to the members of a cluster, and their errors
//	directory.go  the names of files, and every change of them
//	file.go       the contents of files, in pieces
//	lock.go       who may write
//	room.go       how much may be written
package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kvserver/kvstore/storage"
)

// Times and sizes of requests.
const (
	requestTime  = 1500 * time.Millisecond // limit of one request, beside the time for its bytes
	slowLink     = 128 << 10               // bytes a second of the slowest link that we support
	pauseTime    = 50 * time.Millisecond   // before a request is sent again
	patienceTime = 10 * time.Second        // without an answer, until we give up
	tellTime     = time.Second             // without an answer, until we say so

	pieceLeast = 16 << 10 // least limit of a piece's bytes as it is sent: a lower one helps no link
	pieceFirst = 64 << 10 // the same at first: pieces double while the link is fast enough
	pieceMost  = 1 << 20  // bytes of a piece without joined ones: etcd takes requests of 1.5 MiB
	pageFirst  = 64 << 10 // bytes of the pieces that one request asks for, at first
	pageMost   = 3 << 20  // the same at most: gateways before 3.4.17 answer at most 4 MiB
	keysMost   = 4 << 10  // keys that one request asks for: each time etcd counts all that follow, too
	keySize    = 250      // bytes that a key takes in an answer, about
	replyMost  = 100      // bytes that an error quotes of an answer that is not etcd's
	idleConns  = 16       // idle connections that are kept to each member
	dialTime   = time.Second
)

// Errors of a store in etcd.
var (
	// ErrAddress is returned for an address without members, ports or a prefix, and for an option
	// that there is not.
	ErrAddress = storage.NewError("no address of data in etcd",
		"Give the members and a prefix: -data etcd://host1:2379,host2:2379/kv")
	// ErrUnreachable is returned when no member of the cluster has answered, or only with failures
	// that may pass: to a single request for requestTime, in all for patienceTime or more; and when
	// too few members answer for a new store.
	ErrUnreachable = storage.NewError("etcd does not answer", "Nothing is lost. Look whether etcd runs "+
		"at these addresses, with TLS (etcds://) or without, and has a leader: "+
		"etcdctl endpoint status --cluster")
	// ErrRefused is returned when etcd, or what answers in its place, refuses us: a wrong
	// certificate, user or password, or a missing permission; and for bad files of certificates.
	ErrRefused = storage.NewError("etcd refuses", "Look at the address in -data (etcds:// for TLS, "+
		"with ?ca=FILE&cert=FILE&key=FILE) and at KVSERVER_ETCD_USER=name:password.")
	// ErrTooLarge is returned when etcd's limit on the size of a request is too low for us.
	ErrTooLarge = storage.NewError("etcd takes only smaller requests",
		"Raise etcd's --max-request-bytes (1.5 MiB if not set).")
	// ErrTakenOver is returned when another process has taken the lock, or may have had it since.
	ErrTakenOver = storage.NewError("another server has taken the data over",
		"Nothing is lost. Start it again. Was it paused or cut off?")
	// ErrOther is returned when a member belongs to another cluster than the members that have
	// answered before, or when the cluster has gone back to an older state: somebody has restored a
	// backup.
	ErrOther = storage.NewError("not the etcd cluster that it was", "Nothing was written there. Do all "+
		"addresses in -data belong to one cluster? If somebody has restored it, start again: the "+
		"server goes on with what is there.")

	// errSmaller is returned for a request that failed because of its size: etcd found it too
	// large, or it took too long. The caller asks for less at a time.
	errSmaller = errors.New("to be asked for in smaller parts")
	errSilent  = errors.New("no answer")
	// errUnlike is returned for a piece that was not put, because etcd does not have the piece or
	// the name that it follows.
	errUnlike = errors.New("etcd does not have what was written before")
)

// cluster sends requests to an etcd cluster. Any goroutine may use it.
type cluster struct {
	members        []string // http://host:port, with TLS https://
	http           *http.Client
	user, password string
	log            *slog.Logger

	member   atomic.Int32           // index of the member that is asked; after a failure the next one
	token    atomic.Pointer[string] // of the user; nil: none yet, or none is needed
	id       atomic.Pointer[string] // of the cluster; nil: no member has answered yet
	revision atomic.Int64           // the highest that the cluster has answered
	warned   sync.Once              // about a member of another cluster
	failure  atomic.Pointer[error]  // the latest that may pass, for the log; nil: none

	room // in the members' databases
}

// The parts of etcd's messages that we use, in the names of its API. Bytes travel as base64.
type (
	keyValue struct {
		Key      []byte `json:"key"`
		Value    []byte `json:"value,omitempty"`
		Revision int64  `json:"mod_revision,string,omitempty"` // of the last change; 0: no such key
	}
	keyRange struct {
		Key       []byte `json:"key"`
		End       []byte `json:"range_end,omitempty"` // the range ends before this key
		Limit     int    `json:"limit,string,omitempty"`
		KeysOnly  bool   `json:"keys_only,omitempty"`
		CountOnly bool   `json:"count_only,omitempty"`
	}
	operation struct {
		Put    *keyValue `json:"request_put,omitempty"`
		Delete *keyRange `json:"request_delete_range,omitempty"`
		Range  *keyRange `json:"request_range,omitempty"`
	}
	comparison struct {
		Target string `json:"target"`           // VALUE or MOD
		Result string `json:"result,omitempty"` // GREATER; "": EQUAL
		keyValue
	}
	transaction struct {
		Compare []comparison `json:"compare"`
		Success []operation  `json:"success"`
		Failure []operation  `json:"failure,omitempty"`
	}
	// found is the result of a range.
	found struct {
		KVs   []keyValue `json:"kvs"`
		Count int64      `json:"count,string"`
	}
	// response is the answer to any request.
	response struct {
		Header struct {
			Cluster  string `json:"cluster_id"`
			Member   string `json:"member_id"`
			Revision int64  `json:"revision,string"`
		} `json:"header"`
		found
		Succeeded bool `json:"succeeded"`
		Responses []struct {
			Range found `json:"response_range"`
		} `json:"responses"`
		Token  string `json:"token"`
		Leader string `json:"leader"`
		Size   int64  `json:"dbSize,string"`
		InUse  int64  `json:"dbSizeInUse,string"`
		Quota  int64  `json:"dbSizeQuota,string"` // since 3.6
	}
)

// read returns the result of a transaction's i-th operation, which was a range.
func (r response) read(i int) found {
	if i < len(r.Responses) {
		return r.Responses[i].Range
	}
	return found{}
}

func putKey(key, value []byte) operation {
	return operation{Put: &keyValue{Key: key, Value: value}}
}
func deleteKeys(key, end []byte) operation {
	return operation{Delete: &keyRange{Key: key, End: end}}
}
func readKey(key []byte) operation { return operation{Range: &keyRange{Key: key}} }
func isValue(key, value []byte) comparison {
	return comparison{"VALUE", "", keyValue{Key: key, Value: value}}
}
func isRevision(key []byte, revision int64) comparison {
	return comparison{"MOD", "", keyValue{Key: key, Revision: revision}}
}
func exists(key []byte) comparison { return comparison{"MOD", "GREATER", keyValue{Key: key}} }

// refusal is etcd's answer to a request that it has refused.
type refusal struct {
	Message string `json:"message"`
	Code    int    `json:"code"` // gRPC's
}

func (e *refusal) Error() string { return e.Message }

// Is makes the refusal of a full etcd a syscall.ENOSPC, as of a full disk, and other final refusals
// an ErrRefused.
func (e *refusal) Is(target error) bool {
	isFull := e.Code == 8 && strings.Contains(e.Message, "space")
	return target == syscall.ENOSPC && isFull || target == ErrRefused && isFinal(e) && !isFull
}

// isExpired reports whether only the token is bad: it has expired, or, if it is a JWT, users have
// changed since.
func (e *refusal) isExpired() bool {
	return e.Code == 16 || strings.Contains(e.Message, "revision of auth store is old")
}

// isFinal reports whether to send the request to this member again would be in vain.
func isFinal(err error) bool {
	if e := (*refusal)(nil); errors.As(err, &e) {
		switch e.Code {
		// cancelled, unknown, deadline exceeded, aborted, internal, unavailable, unauthenticated
		case 1, 2, 4, 10, 13, 14, 16:
			return false
		case 8: // resource exhausted: no space, an answer too large, or too many requests
			return !strings.Contains(e.Message, "too many")
		}
		return !e.isExpired()
	}
	return isUntrusted(err) || errors.Is(err, ErrOther)
}

// isTooMuch reports whether a smaller request may succeed.
func isTooMuch(err error) bool {
	e := (*refusal)(nil)
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &e) &&
		(strings.Contains(e.Message, "too large") || strings.Contains(e.Message, "larger than max"))
}

// named returns err as people should see it.
func named(err error) error {
	switch {
	case errors.Is(err, ErrOther):
		return err
	case isTooMuch(err):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case isUntrusted(err), errors.Is(err, ErrRefused):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("etcd: %w", err)
}

// isUntrusted reports whether TLS has failed: one side of a connection does not trust the other, or
// one of them does not speak TLS.
func isUntrusted(err error) bool {
	record, certificate := tls.RecordHeaderError{}, (*tls.CertificateVerificationError)(nil)
	alert := (*net.OpError)(nil) // the other side's, with the Op "remote error"
	return errors.As(err, &alert) && alert.Op == "remote error" || errors.As(err, &record) ||
		errors.As(err, &certificate) || errors.Is(err, http.ErrSchemeMismatch)
}

// newCluster returns a client for the members at hosts. With TLS, query may name the files ca, cert
// and key.
func newCluster(hosts []string, encrypted bool, query url.Values) (*cluster, error) {
	c := &cluster{}
	c.user, c.password, _ = strings.Cut(os.Getenv("KVSERVER_ETCD_USER"), ":")

	// Keep idle connections, so that few requests have to dial.
	transport := &http.Transport{MaxIdleConnsPerHost: idleConns,
		DialContext: (&net.Dialer{Timeout: dialTime}).DialContext}
	c.http = &http.Client{Transport: transport}

	scheme := "http://"
	if encrypted {
		scheme = "https://"
		cert := query.Get("cert")
		key := cmp.Or(query.Get("key"), cert) // one file may hold both
		config, err := storage.TLSConfig(cert, key, query.Get("ca"))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRefused, err)
		}
		transport.TLSClientConfig = config
	}

	for _, host := range hosts {
		c.members = append(c.members, scheme+host)
	}

	// Pieces are small at first, and tookPiece doubles their size while the link is fast enough.
	c.piece.Store(pieceFirst)
	c.limit.Store(math.MaxInt64) // until the first survey
	return c, nil
}

// post sends one request to one member. size is how many bytes the request sends or asks for,
// about; it is negative if the request cannot be made smaller. After a failure the next request
// goes to another member.
func (c *cluster) post(ctx context.Context, member int32, at string, request any,
	size int) (answer response, err error) {
	// Read the revision before asking: an answer about keys must not be older.
	known := c.revision.Load()

	// A request of a user needs a token: log in first.
	if c.user != "" && c.token.Load() == nil && at != "auth/authenticate" {
		login, err := c.post(ctx, member, "auth/authenticate",
			map[string]string{"name": c.user, "password": c.password}, 0)
		if err != nil {
			return answer, err
		}
		c.token.Store(&login.Token)
	}

	// A large request has more time: a slow link does not mean that the member is down.
	one, cancel := context.WithTimeout(ctx, limit(size))
	defer cancel()
	err = c.exchange(one, c.members[member]+"/v3/"+at, request, &answer)
	if err == nil {
		// An answer from another cluster, or from an older state of ours, is an error.
		err = c.recognize(c.members[member], answer, known, strings.HasPrefix(at, "kv/"))
	}

	// A bad token is not the member's fault: the next request logs in again. After another
	// failure the next request goes to another member.
	if e := (*refusal)(nil); errors.As(err, &e) && e.isExpired() {
		c.token.Store(nil)
	} else if err != nil {
		c.member.CompareAndSwap(member, (member+1)%int32(len(c.members)))
	}

	return answer, err
}

// limit is the time that a request of that many bytes has.
func limit(size int) time.Duration {
	return requestTime + time.Duration(max(size, -size))*time.Second/slowLink
}

// recognize returns an error if an answer is not from the cluster that has answered before. ofKeys
// says that the answer is about keys, and so is not older than known, the revision that we knew
// before we asked.
func (c *cluster) recognize(member string, answer response, known int64, ofKeys bool) error {
	h := answer.Header
	// etcd always names its cluster, so this is some other server.
	if h.Cluster == "" {
		return &refusal{member + " answers, and not as etcd does", 12}
	}

	// The first answer decides which cluster is ours.
	if c.id.CompareAndSwap(nil, &h.Cluster); *c.id.Load() != h.Cluster {
		c.warned.Do(func() {
			c.log.Error("a member is another cluster, so it is not asked", "member", member)
		})
		return fmt.Errorf("%w: %s is of cluster %s, the others are of %s", ErrOther, member,
			h.Cluster, *c.id.Load())
	}

	// A revision never goes back, unless somebody has restored a backup.
	if ofKeys && h.Revision < known {
		return fmt.Errorf("%w: at %s its revision is %d, and was %d", ErrOther, member, h.Revision,
			known)
	}

	// Other goroutines store revisions at the same time: keep the highest.
	for latest := c.revision.Load(); ofKeys && h.Revision > latest &&
		!c.revision.CompareAndSwap(latest, h.Revision); {
		latest = c.revision.Load()
	}

	return nil
}

// survey asks all members at once who they are, and what room they have. From then on requests go
// to the leader first: the others would only forward them. ids has the cluster of each member, ""
// for a member that has not answered.
func (c *cluster) survey(ctx context.Context) (ids []string) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()

	// Read spent first: bytes that are written from here on may not be in the sizes that the
	// members answer.
	var wg sync.WaitGroup
	spent, answers := c.spent.Load(), make([]response, len(c.members))
	for i, member := range c.members {
		wg.Go(func() {
			// If this fails the member's answer stays empty.
			c.exchange(ctx, member+"/v3/maintenance/status", struct{}{}, &answers[i])
		})
	}
	wg.Wait()

	// A member of another cluster is not asked first, even if it leads there.
	for i, status := range answers {
		ids = append(ids, status.Header.Cluster)
		if c.recognize(c.members[i], status, 0, false) == nil && status.Leader != "" &&
			status.Leader == status.Header.Member {
			c.member.Store(int32(i))
		}
	}

	// This decides how much may be written until the next survey.
	c.note(answers, spent)

	return ids
}

// agree asks all members who they are, and returns how many have answered. It returns an ErrOther
// if these are not one cluster.
func (c *cluster) agree(ctx context.Context) (answered int, err error) {
	var list []string
	for i, id := range c.survey(ctx) {
		// A member that does not answer does not contradict the others.
		if id == "" {
			continue
		}
		answered++
		list = append(list, fmt.Sprintf("%s is of cluster %s", c.members[i], id))
		if id != *c.id.Load() {
			err = ErrOther
		}
	}

	// Name all members: only the operator knows which one is wrong.
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.Join(list, ", "))
	}
	return answered, err
}

// adopt accepts the cluster as it is now: an older state of ours, or another cluster, if all
// members are of that one.
func (c *cluster) adopt(ctx context.Context) error {
	was, ids := *c.id.Load(), c.survey(ctx)
	// If no member is of the cluster that we knew, all must be of one new cluster.
	if !slices.Contains(ids, was) {
		isOther := func(id string) bool { return id != ids[0] }
		if ids[0] == "" || slices.ContainsFunc(ids, isOther) {
			return fmt.Errorf("%w: not all members say what they are now", ErrOther)
		}
		c.id.Store(&ids[0])
	}

	// A restored backup has a lower revision, and recognize would refuse its answers.
	c.revision.Store(0)
	return nil
}

// exchange sends a request to url and reads the answer. It returns a *refusal for any HTTP status
// but 200.
func (c *cluster) exchange(ctx context.Context, url string, request any,
	answer *response) error {
	body, _ := json.Marshal(request)
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

	// Read the answer to its end, so that the connection can be used again.
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode == http.StatusOK:
		return json.Unmarshal(text, answer)
	}

	// etcd explains a refusal in JSON. Any other text is from a proxy, or from some other server.
	// It counts as unavailable (14), and call tries again, unless the status is 4xx.
	refused := &refusal{}
	if json.Unmarshal(text, refused) != nil || refused.Message == "" {
		refused.Message, refused.Code = fmt.Sprintf("%s answers %s: %.*q", url, response.Status,
			replyMost, text), 14
		if response.StatusCode/100 == 4 { // some other server, or one that wants TLS
			refused.Code = 12 // unimplemented
		}
	}
	return refused
}

// call sends a request again and again until a member answers it, every member has refused it, or
// ctx is done. It returns errSmaller if the request may have failed because of its size, and can be
// made smaller. size is as for post.
func (c *cluster) call(ctx context.Context, at string, request any, size int) (response, error) {
	// One member may refuse what the others do not, so every member is asked.
	var why error
	for refused := map[int32]bool{}; ; {
		member := c.member.Load()
		answer, err := c.post(ctx, member, at, request, size)
		switch {
		case err == nil:
			return answer, nil

		// The caller asks again for less: that may fit, or be in time.
		case isTooMuch(err) && size > pieceLeast && ctx.Err() == nil:
			return answer, errSmaller

		// This failure may pass: try again until ctx is done.
		case !isFinal(err):
			clear(refused)
			why = nil
			c.failure.Store(&err)

		// ErrOther is the reason only if it is that of all members.
		case !errors.Is(err, ErrOther) || why == nil:
			why = err
			fallthrough
		default:
			if refused[member] = true; len(refused) == len(c.members) {
				return answer, named(why)
			}
		}

		if cause := wait(ctx, pauseTime); cause != nil {
			return answer, fmt.Errorf("%w: %w", cause, err)
		}
	}
}

// try is call with a limit of requestTime, after which it returns an ErrUnreachable.
func (c *cluster) try(ctx context.Context, at string, request any) (response, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTime, ErrUnreachable)
	defer cancel()
	return c.call(ctx, at, request, 0)
}

// wait waits for that long. It returns the cause if ctx is done before.
func wait(ctx context.Context, long time.Duration) error {
	select {
	case <-time.After(long):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
