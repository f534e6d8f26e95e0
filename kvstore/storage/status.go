package storage

import (
	"sort"
	"sync/atomic"
	"time"
)

// Status is how a store is, from before it is open. Any goroutine may look at it, and note what has
// changed. Its zero value is that of a store that is being opened.
type Status struct {
	stage     atomic.Pointer[string]    // Stage; nil: nothing was noted yet
	confirmed atomic.Pointer[time.Time] // Confirmed; nil: never
	takeovers atomic.Int64              // Takeovers

	Fsyncs      Histogram    // how long each took, in seconds
	Compactions atomic.Int64 // that have ended well
}

// Stage is what a store that is not open waits for, such as "loading 43 %"; "" once it is.
func (s *Status) Stage() string {
	if stage := s.stage.Load(); stage != nil {
		return *stage
	}
	return "opening the data"
}

// Confirmed is when others last agreed that the store is ours: the zero time where there
// are no others.
func (s *Status) Confirmed() time.Time {
	if at := s.confirmed.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// Confirm notes when others last agreed that the store is ours.
func (s *Status) Confirm(at time.Time) { s.confirmed.Store(&at) }

// TakeOver notes how often the store has been taken over.
func (s *Status) TakeOver(times int64) { s.takeovers.Store(times) }

// Takeovers is how often the store has been taken over: another process has got it that it was not
// handed to.
func (s *Status) Takeovers() int64 { return s.takeovers.Load() }

// Set notes the stage: what is being waited for.
func (s *Status) Set(stage string) { s.stage.Store(&stage) }

// Histogram counts amounts, such as how long something took, in buckets. Any goroutine may use it;
// its zero value is empty, and for seconds.
type Histogram struct {
	Counts bool // amounts are numbers of things; read-only once it is used

	counts [10]atomic.Int64 // of each bucket of Bounds, and of what was more
	micros atomic.Int64     // the sum of all amounts, in millionths
}

// Upper bounds, each four times the one before, or twice.
var (
	secondBounds = []float64{0.0001, 0.0004, 0.0016, 0.0064, 0.0256, 0.1024, 0.4096, 1.6384, 6.5536}
	countBounds  = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256}
)

// Bounds are the upper bounds of the buckets.
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

// Read returns how many amounts were at most each of Bounds, how many there were in all, and their
// sum.
func (h *Histogram) Read() (atMost []int64, all int64, sum float64) {
	// Each bucket counts with those below it.
	for i := range h.counts {
		all += h.counts[i].Load()
		atMost = append(atMost, all)
	}

	// The last is what was more than all bounds, which is in all alone.
	return atMost[:len(h.Bounds())], all, float64(h.micros.Load()) / 1e6
}
