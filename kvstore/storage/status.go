package storage

import (
	"sort"
	"sync/atomic"
	"time"
)

// Status is how a store is, from before it is open, for other goroutines to look at. Its
// zero value is that of a store that is being opened.
type Status struct {
	stage     atomic.Pointer[string]
	confirmed atomic.Pointer[time.Time]
	takeovers atomic.Int64

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

// Confirm notes when others have agreed last that the store is ours.
func (s *Status) Confirm(at time.Time) { s.confirmed.Store(&at) }

// TakeOver notes how often the store has passed to another process so.
func (s *Status) TakeOver(times int64) { s.takeovers.Store(times) }

// Takeovers is how often the store has passed to another process without being handed
// over.
func (s *Status) Takeovers() int64 { return s.takeovers.Load() }

// Set notes what is being waited for.
func (s *Status) Set(stage string) { s.stage.Store(&stage) }

// Histogram counts how often something was how much. Any goroutine may use it; its zero
// value is empty, and for seconds.
type Histogram struct {
	Counts bool // it is for numbers of things

	counts [10]atomic.Int64 // one for each of Bounds, and one for what was more
	micros atomic.Int64     // together, in millionths
}

// Upper bounds, each four times, or twice, the one before.
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

// Observe counts once more, of so much.
func (h *Histogram) Observe(much float64) {
	h.counts[sort.SearchFloat64s(h.Bounds(), much)].Add(1)
	h.micros.Add(int64(much * 1e6))
}

// Read returns how often it was at most each of Bounds, how often in all, and how much
// together.
func (h *Histogram) Read() (atMost []int64, all int64, sum float64) {
	for i := range h.counts {
		all += h.counts[i].Load()
		atMost = append(atMost, all)
	}
	return atMost[:len(h.Bounds())], all, float64(h.micros.Load()) / 1e6
}
