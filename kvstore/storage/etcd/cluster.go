// Package etcd has a Directory in an etcd cluster, which it asks through etcd's JSON gateway:
// cluster.go asks, directory.go has the names, file.go the files, lock.go who may write, and
// room.go how much.
package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
)

// Times and sizes of requests.
const (
	requestTime  = 1500 * time.Millisecond // of one request, without what its bytes take
	slowLink     = 128 << 10               // bytes a second that a link has at least
	pauseTime    = 50 * time.Millisecond   // before a request is sent again
	patienceTime = 10 * time.Second        // without an answer, until we give up
	tellTime     = time.Second             // without an answer, until we say so

	pieceLeast = 16 << 10 // bytes of a piece as it is sent: smaller ones would help no link
	pieceFirst = 64 << 10 // the same at first: they double while the link can do it
	pieceMost  = 1 << 20  // bytes of a piece, packed or not: etcd takes requests of 1.5 MiB
	pageFirst  = 64 << 10 // bytes of the pieces that are asked for together, at first
	pageMost   = 3 << 20  // the same at last: gateways before 3.4.17 answer at most 4 MiB
	keysMost   = 4 << 10  // keys that are asked for together: etcd counts all behind them, too
	keySize    = 250      // bytes that a key takes in an answer, about
	replyMost  = 100      // bytes of an answer that is none of etcd's, in an error
	filesAhead = 16       // connections to a member that are kept
	dialTime   = time.Second
)

// Errors of a store in etcd.
var (
	// ErrAddress is returned for an address that names no members, or no prefix.
	ErrAddress = errors.New("no address of data in etcd")
	// ErrUnreachable is returned when no member of the cluster has answered for patienceTime.
	ErrUnreachable = errors.New("etcd does not answer")
	// ErrRefused is returned when etcd answers, but not to us: a wrong certificate, user or
	// password, or a right that is missing.
	ErrRefused = errors.New("etcd refuses")
	// ErrTooLarge is returned when etcd takes only requests that are too small for us.
	ErrTooLarge = errors.New("etcd takes only smaller requests")
	// ErrTakenOver is returned when another process has taken the lock.
	ErrTakenOver = errors.New("another server has taken the data over")
	// ErrOther is returned when a member belongs to another cluster than those that were asked
	// before, or the cluster knows less than it has told: somebody has restored a copy.
	ErrOther = errors.New("not the etcd cluster that it was")

	// errSmaller is what a request that was too large, or too slow, for its size ends with.
	errSmaller = errors.New("to be asked for in smaller parts")
)

// cluster asks a cluster. Any goroutine may.
type cluster struct {
	members        []string // http://host:port
	http           *http.Client
	user, password string
	log            *slog.Logger

	member   atomic.Int32           // the one that is asked: another one after each failure
	token    atomic.Pointer[string] // of the user; nil: none yet, or none is needed
	id       atomic.Pointer[string] // of the cluster; nil: nobody has told
	revision atomic.Int64           // of the cluster, as of the latest answer
	warned   sync.Once              // of a member that is another cluster

	room // of the database
}

// What is used of etcd's messages, in the names of its API. Bytes travel as base64.
type (
	keyValue struct {
		Key      []byte `json:"key"`
		Value    []byte `json:"value,omitempty"`
		Revision int64  `json:"mod_revision,string,omitempty"` // of the last change; 0: it is not there
	}
	keyRange struct {
		Key       []byte `json:"key"`
		End       []byte `json:"range_end,omitempty"` // the first key that is meant no more
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
		Result string `json:"result,omitempty"` // GREATER; "": they are equal
		keyValue
	}
	transaction struct {
		Compare []comparison `json:"compare"`
		Success []operation  `json:"success"`
		Failure []operation  `json:"failure,omitempty"`
	}
	// found is what a range holds.
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

// read returns what the i-th operation of a transaction has read.
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
func isThere(key []byte) comparison { return comparison{"MOD", "GREATER", keyValue{Key: key}} }

// refusal is etcd's answer to a request that it does not do.
type refusal struct {
	Message string `json:"message"`
	Code    int    `json:"code"` // gRPC's
}

func (e *refusal) Error() string { return e.Message }

// Is makes a database that is full what a full disk is, and other final refusals ErrRefused.
func (e *refusal) Is(target error) bool {
	isFull := e.Code == 8 && strings.Contains(e.Message, "space")
	return target == syscall.ENOSPC && isFull || target == ErrRefused && isFinal(e) && !isFull
}

// isExpired tells whether it is the token that is bad: a JWT is too old once users change.
func (e *refusal) isExpired() bool {
	return e.Code == 16 || strings.Contains(e.Message, "revision of auth store is old")
}

// isFinal tells whether to ask this member again is in vain.
func isFinal(err error) bool {
	if e := (*refusal)(nil); errors.As(err, &e) {
		switch e.Code {
		// cancelled, unknown, too late, aborted, internal, no leader, expired
		case 1, 2, 4, 10, 13, 14, 16:
			return false
		case 8: // no space, too large an answer, or too many requests
			return !strings.Contains(e.Message, "too many")
		}
		return !e.isExpired()
	}
	return isUntrusted(err) || errors.Is(err, ErrOther)
}

// isTooMuch tells whether a smaller request may do.
func isTooMuch(err error) bool {
	e := (*refusal)(nil)
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &e) &&
		(strings.Contains(e.Message, "too large") || strings.Contains(e.Message, "larger than max"))
}

// named is err as people should see it.
func named(err error) error {
	switch {
	case isUntrusted(err):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	case errors.Is(err, ErrOther):
		return err
	case isTooMuch(err):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
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

// newCluster returns a client for the members at hosts. With TLS, query may name files:
// ca, cert and key.
func newCluster(hosts []string, encrypted bool, query url.Values) (*cluster, error) {
	c := &cluster{}
	c.user, c.password, _ = strings.Cut(os.Getenv("KVSERVER_ETCD_USER"), ":")

	// Idle connections are kept, so that most requests need not dial first.
	transport := &http.Transport{MaxIdleConnsPerHost: filesAhead,
		DialContext: (&net.Dialer{Timeout: dialTime}).DialContext}
	c.http = &http.Client{Transport: transport}

	scheme := "http://"
	if encrypted {
		scheme = "https://"
		var err error
		if transport.TLSClientConfig, err = tlsConfig(query); err != nil {
			return nil, err
		}
	}

	for _, host := range hosts {
		c.members = append(c.members, scheme+host)
	}

	// Pieces begin small, and tookPiece doubles them while the link is fast enough.
	c.piece.Store(pieceFirst)
	return c, nil
}

// tlsConfig reads the files that query names.
func tlsConfig(query url.Values) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}

	// Without a CA file the system's CAs decide which members we trust.
	if ca := query.Get("ca"); ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("%w: cannot read its CA: %w", ErrRefused, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: its CA: %s has no certificate", ErrRefused, ca)
		}
	}

	// One file may hold both our certificate and its key.
	if cert := query.Get("cert"); cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, cmp.Or(query.Get("key"), cert))
		if err != nil {
			return nil, fmt.Errorf("%w: cannot read our certificate for it: %w", ErrRefused, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}

	return config, nil
}

// post sends one request to one member. It is of so many bytes, or asks for so many: less than
// none if it cannot be smaller. After a failure the next goes to another member.
func (c *cluster) post(ctx context.Context, member int32, at string, request any,
	size int) (answer response, err error) {
	// The revision is read before we ask: an answer about keys must not be older.
	known := c.revision.Load()

	// Where we have a user, a request needs a token: log in first.
	if c.user != "" && c.token.Load() == nil && at != "auth/authenticate" {
		login, err := c.post(ctx, member, "auth/authenticate",
			map[string]string{"name": c.user, "password": c.password}, 0)
		if err != nil {
			return answer, err
		}
		c.token.Store(&login.Token)
	}

	// A large request may take longer: a slow link is not a member that is down.
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

// limit is the time that a request of so many bytes has.
func limit(size int) time.Duration {
	return requestTime + time.Duration(max(size, -size))*time.Second/slowLink
}

// recognize tells whether an answer is from the cluster that has answered before. One of its keys
// is of all that the cluster knew when it was asked: known is the revision that we knew then.
func (c *cluster) recognize(member string, answer response, known int64, ofKeys bool) error {
	h := answer.Header
	// etcd always names its cluster: what does not is something else.
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

	// A revision never goes back: a lower one is of a copy that somebody has restored.
	if ofKeys && h.Revision < known {
		return fmt.Errorf("%w: at %s its revision is %d, and was %d", ErrOther, member, h.Revision,
			known)
	}

	// Several requests may be answered at the same time: the highest revision stays.
	for latest := c.revision.Load(); ofKeys && h.Revision > latest &&
		!c.revision.CompareAndSwap(latest, h.Revision); {
		latest = c.revision.Load()
	}

	return nil
}

// survey asks all members who they are, and what room they have. From then on the leader is asked
// first: others would only pass on what they are asked. It returns of which cluster each is, "" of
// those that do not answer.
func (c *cluster) survey(ctx context.Context) (ids []string) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()

	// Ask all members at once, so that those that are down cost one requestTime together.
	// What is written meanwhile counts as not yet in the sizes that they answer.
	var wg sync.WaitGroup
	spent, answers := c.spent.Load(), make([]response, len(c.members))
	for i, member := range c.members {
		wg.Go(func() {
			// Who does not answer has said nothing.
			c.exchange(ctx, member+"/v3/maintenance/status", struct{}{}, &answers[i])
		})
	}
	wg.Wait()

	// A member of another cluster is not asked first, even if it is the leader there.
	for i, status := range answers {
		ids = append(ids, status.Header.Cluster)
		if c.recognize(c.members[i], status, 0, false) == nil && status.Leader != "" &&
			status.Leader == status.Header.Member {
			c.member.Store(int32(i))
		}
	}

	// Until the next survey, this one decides how much may be written.
	c.note(answers, spent)

	return ids
}

// agree asks all members who they are, and returns how many answer: with an ErrOther if they are
// not one cluster.
func (c *cluster) agree(ctx context.Context) (answered int, err error) {
	var list []string
	for i, id := range c.survey(ctx) {
		// A member that does not answer contradicts nobody.
		if id == "" {
			continue
		}
		answered++
		list = append(list, fmt.Sprintf("%s is of cluster %s", c.members[i], id))
		if id != *c.id.Load() {
			err = ErrOther
		}
	}

	// The operator must see which member is the wrong one, so name them all.
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.Join(list, ", "))
	}
	return answered, err
}

// adopt takes the cluster for what it is now: another one only if all members are that.
func (c *cluster) adopt(ctx context.Context) error {
	was, ids := *c.id.Load(), c.survey(ctx)
	// Where no member is of the cluster that we knew, all must be of one new cluster.
	if !slices.Contains(ids, was) {
		isOther := func(id string) bool { return id != ids[0] }
		if ids[0] == "" || slices.ContainsFunc(ids, isOther) {
			return fmt.Errorf("%w: not all members say what they are now", ErrOther)
		}
		c.id.Store(&ids[0])
	}

	// A restored copy has a lower revision, and recognize would refuse its answers.
	c.revision.Store(0)
	return nil
}

// exchange sends a request and reads the answer.
func (c *cluster) exchange(ctx context.Context, url string, request any,
	answer *response) error {
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

	// The answer is read to its end, so that the connection can be used again.
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode == http.StatusOK:
		return json.Unmarshal(text, answer)
	}

	// etcd explains a refusal in JSON. Another text is from a proxy, or from no etcd: unless
	// its status is 4xx it counts as unavailable (14), so that call tries again.
	refused := &refusal{}
	if json.Unmarshal(text, refused) != nil || refused.Message == "" {
		refused.Message, refused.Code = fmt.Sprintf("%s answers %s: %.*q", url, response.Status,
			replyMost, text), 14
		if response.StatusCode/100 == 4 { // somebody else answers there, or wants TLS
			refused.Code = 12
		}
	}
	return refused
}

// call sends a request until it is answered, every member has refused it, or ctx is done. One
// that is larger than need be ends with errSmaller if that may be why it fails.
func (c *cluster) call(ctx context.Context, at string, request any, size int) (response, error) {
	// A member that refuses for good may be the only one that does.
	var why error
	for refused := map[int32]bool{}; ; {
		member := c.member.Load()
		answer, err := c.post(ctx, member, at, request, size)
		switch {
		case err == nil:
			return answer, nil

		// A part of it may fit, or be in time: the caller asks again for less.
		case isTooMuch(err) && size > pieceLeast && ctx.Err() == nil:
			return answer, errSmaller

		// This failure may pass: ask on for as long as ctx allows.
		case !isFinal(err):
			clear(refused)
			why = nil

		// It is another cluster only if all members are.
		case !errors.Is(err, ErrOther) || why == nil:
			why = err
			fallthrough
		default:
			if refused[member] = true; len(refused) == len(c.members) {
				return answer, named(why)
			}
		}

		// Try on until ctx is done: the caller decides how long that is.
		if cause := wait(ctx, pauseTime); cause != nil {
			return answer, fmt.Errorf("%w: %w", cause, err)
		}
	}
}

// try is call for so long as one request has; then it ends with an ErrUnreachable.
func (c *cluster) try(ctx context.Context, at string, request any) (response, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTime, ErrUnreachable)
	defer cancel()
	return c.call(ctx, at, request, 0)
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
