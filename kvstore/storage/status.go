package storage

import (
	"sort"
	"sync/atomic"
	"time"
)

// Status is the state of a store, also while it is being opened. Any goroutine may read and change
// it. The zero Status is that of a store that is being opened.
type Status struct {
	stage     atomic.Pointer[string]    // Stage; nil: not set yet
	confirmed atomic.Pointer[time.Time] // Confirmed; nil: never

	Fsyncs      Histogram    // how long each fsync took, in seconds
	Compactions atomic.Int64 // how many compactions have succeeded
	Takeovers   atomic.Int64 // how often the store was taken from a holder that had not released it
}

// Stage is what a store that is not open yet does or waits for, such as "loading 43 %"; "" once it
// is open.
func (s *Status) Stage() string {
	if stage := s.stage.Load(); stage != nil {
		return *stage
	}
	return "opening the data"
}

// Confirmed is when the last sign of life was sent that the cluster has confirmed: the store is
// known to have been ours until then. It is the zero time for a store on a disk.
func (s *Status) Confirmed() time.Time {
	if at := s.confirmed.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// Confirm sets Confirmed.
func (s *Status) Confirm(at time.Time) { s.confirmed.Store(&at) }

// Set sets Stage.
func (s *Status) Set(stage string) { s.stage.Store(&stage) }

// Histogram counts amounts, such as how long something took, in buckets. Any goroutine may use it.
// The zero Histogram is empty, and its amounts are seconds.
type Histogram struct {
	Counts bool // amounts are numbers of things, not seconds; read-only once it is used

	counts [10]atomic.Int64 // of each bucket of Bounds, and of larger amounts
	micros atomic.Int64     // the sum of all amounts, in millionths
}

// Upper bounds: each bound of seconds is four times the one before, each bound of counts twice.
var (
	secondBounds = []float64{0.0001, 0.0004, 0.0016, 0.0064, 0.0256, 0.1024, 0.4096, 1.6384, 6.5536}
	countBounds  = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256}
)

// Bounds returns the upper bounds of the buckets. The caller must not change them.
func (h *Histogram) Bounds() []float64 {
	if h.Counts {
		return countBounds
	}
	return secondBounds
}

// Observe counts one amount.
func (h *Histogram) Observe(amount float64) {
	h.counts[sort.SearchFloat64s(h.Bounds(), amount)].Add(1)
	h.micros.Add(int64(amount * 1e6))
}

// Read returns for each of Bounds how many amounts were at most that, then how many amounts there
// were, and their sum.
func (h *Histogram) Read() (atMost []int64, all int64, sum float64) {
	// As Prometheus wants it, each bucket includes those below it.
	for i := range h.counts {
		all += h.counts[i].Load()
		atMost = append(atMost, all)
	}

	// The last element also has the amounts above the largest bound: they are left out.
	return atMost[:len(h.Bounds())], all, float64(h.micros.Load()) / 1e6
}
