package world

import (
	"math/rand/v2"
	"time"
)

const kilo = 1000 // bytes

// Wait lets d of fake time pass. No time at all is no timer: with the race detector Go
// 1.26 crashes, once in some thousands, where a bubble receives from one that is due.
func Wait(d time.Duration) {
	if d > 0 {
		<-time.After(d)
	}
}

// Chance is true once in n times.
func Chance(random *rand.Rand, n int) bool { return random.IntN(n) == 0 }

// Between returns a time from least to most.
func Between(random *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(random.Int64N(int64(most-least)+1))
}

// Pick returns one of what.
func Pick[T any](random *rand.Rand, what ...T) T { return what[random.IntN(len(what))] }

// isClosed tells whether signal is closed.
func isClosed(signal <-chan struct{}) bool {
	select {
	case <-signal:
		return true
	default:
		return false
	}
}
