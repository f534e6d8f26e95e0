// Package etcd has a Directory in an etcd cluster, which it asks through etcd's JSON gateway:
// cluster.go asks, directory.go has the names, file.go the files, lock.go who may write.
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
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// A directory in an etcd cluster, which it asks through etcd's JSON gateway. Below the
// prefix that its address gives there are these keys:
//
//	lock        who may write: an holder. Its holder writes it anew every beatTime
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
	pieceMost  = 1 << 20  // bytes of a piece: etcd takes requests of 1.5 MiB
	fileMost   = 1 << 47  // bytes of a file
	packLeast  = 512      // bytes of a piece that is compressed
	pageMost   = 4 << 20  // bytes of the pieces that are asked for at a time
	aheadLeast = 64 << 10 // the same at first
	keysMost   = 4 << 10  // keys that are
	// bytes of a log file: what is read again at a start, about
	segmentBytes = 16 << 20
	beatTime     = time.Second     // between two signs of life in the lock
	lockTime     = 5 * time.Second // after which a lock without one may be taken
	// so long a sign of life is good for: clocks may run differently
	freshTime    = lockTime - lockTime/10
	patienceTime = 10 * time.Second        // without an answer, until we give up
	requestTime  = 1500 * time.Millisecond // of one request
	pauseTime    = 50 * time.Millisecond   // before it is sent again
	pollTime     = 250 * time.Millisecond  // between two looks at a lock that another one has
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
	// ErrTakenOver is returned when another process has taken the lock.
	ErrTakenOver = errors.New("another server has taken the data over")
)

// cluster asks a cluster. Any goroutine may.
type cluster struct {
	members        []string // http://host:port
	http           *http.Client
	user, password string

	member atomic.Int32           // the one that is asked: another one after each failure
	token  atomic.Pointer[string] // of the user; nil: none yet, or none is needed
}

// What is used of etcd's messages, in the names of its API. Bytes travel as base64.
type (
	keyValue struct {
		Key      []byte `json:"key"`
		Value    []byte `json:"value,omitempty"`
		Revision int64  `json:"mod_revision,string,omitempty"` // of the last change; 0: it is not there
	}
	keyRange struct {
		Key      []byte `json:"key"`
		End      []byte `json:"range_end,omitempty"` // the first key that is meant no more
		Limit    int    `json:"limit,string,omitempty"`
		KeysOnly bool   `json:"keys_only,omitempty"`
	}
	operation struct {
		Put    *keyValue `json:"request_put,omitempty"`
		Delete *keyRange `json:"request_delete_range,omitempty"`
		Range  *keyRange `json:"request_range,omitempty"`
	}
	comparison struct {
		Target string `json:"target"` // VALUE or MOD, for equality
		keyValue
	}
	transaction struct {
		Compare []comparison `json:"compare"`
		Success []operation  `json:"success"`
		Failure []operation  `json:"failure,omitempty"`
	}
	// response is the answer to any request.
	response struct {
		KVs       []keyValue `json:"kvs"`
		Succeeded bool       `json:"succeeded"`
		Responses []struct {
			Range struct {
				KVs []keyValue `json:"kvs"`
			} `json:"response_range"`
		} `json:"responses"`
		Token  string `json:"token"`
		Leader string `json:"leader"`
		Header struct {
			Member string `json:"member_id"`
		} `json:"header"`
	}
)

func putKey(key, value []byte) operation   { return operation{Put: &keyValue{Key: key, Value: value}} }
func deleteKeys(key, end []byte) operation { return operation{Delete: &keyRange{Key: key, End: end}} }

// refusal is etcd's answer to a request that it does not do.
type refusal struct {
	Message string `json:"message"`
	Code    int    `json:"code"` // gRPC's
}

func (e *refusal) Error() string { return e.Message }

// Is makes a database that is full what a full disk is, and other final refusals ErrRefused.
func (e *refusal) Is(target error) bool {
	isFull := e.Code == 8
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
func newCluster(hosts []string, encrypted bool, query url.Values) (*cluster, error) {
	c := &cluster{}
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
func (c *cluster) post(ctx context.Context, at string,
	request any) (answer response, err error) {
	member := c.member.Load()
	if c.user != "" && c.token.Load() == nil && at != "auth/authenticate" {
		login, err := c.post(ctx, "auth/authenticate",
			map[string]string{"name": c.user, "password": c.password})
		if err != nil {
			return answer, err
		}
		c.token.Store(&login.Token)
	}
	limit := requestTime
	if at == "kv/range" { // there may be much to read
		limit *= 3
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = c.exchange(ctx, c.members[member]+"/v3/"+at, request, &answer)
	if e := (*refusal)(nil); errors.As(err, &e) && e.isExpired() {
		c.token.Store(nil)
	} else if err != nil {
		c.member.CompareAndSwap(member, (member+1)%int32(len(c.members)))
	}
	return answer, err
}

// preferLeader asks the cluster's leader from now on, if one member says that it is: the
// others would only pass on what they are asked.
func (c *cluster) preferLeader(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	for i, member := range c.members {
		var status response
		if c.exchange(ctx, member+"/v3/maintenance/status", struct{}{}, &status) == nil &&
			status.Leader == status.Header.Member && status.Leader != "" {
			c.member.Store(int32(i))
			return
		}
	}
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
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode == http.StatusOK:
		return json.Unmarshal(text, answer)
	}
	refused := &refusal{}
	if json.Unmarshal(text, refused) != nil || refused.Message == "" {
		refused.Message, refused.Code = fmt.Sprintf("%s answers %s: %.100q", url, response.Status,
			text), 14
		if response.StatusCode/100 == 4 { // somebody else answers there, or wants TLS
			refused.Code = 12
		}
	}
	return refused
}

// call sends a request until it is answered, every member has refused it, or ctx is done.
func (c *cluster) call(ctx context.Context, at string, request any) (response, error) {
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
		if cause := wait(ctx, pauseTime); cause != nil {
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
