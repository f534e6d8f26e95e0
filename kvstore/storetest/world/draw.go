package world

import (
	"math/rand/v2"
	"testing/synctest"
	"time"
)

const kilo = 1000 // bytes

// wait waits for d of fake time. If d is 0 it sets no timer: with the race detector Go 1.26
// crashes, once in some thousand times, where a bubble receives from a timer that is already due.
func wait(d time.Duration) {
	if d > 0 {
		<-time.After(d)
	}
}

// Chance is true once in n times on average.
func Chance(random *rand.Rand, n int) bool { return random.IntN(n) == 0 }

// Between returns a random time from least to most.
func Between(random *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(random.Int64N(int64(most-least)+1))
}

// pick returns a random element of what.
func pick[T any](random *rand.Rand, what ...T) T { return what[random.IntN(len(what))] }

// isClosed reports whether signal is closed.
func isClosed(signal <-chan struct{}) bool {
	select {
	case <-signal:
		return true
	default:
		return false
	}
}

// Pass lets d of fake time pass, and waits until all goroutines are idle.
func Pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}
