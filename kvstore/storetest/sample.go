package storetest

import (
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"sync"
)

// Next returns which of many cases that are much alike a test tries behind case n: one in so many,
// drawn at random, but the same ones each time. With the race detector, under which all takes ten
// times as long, it is a quarter of these. Where KVSTORE_STEPS is set, as in .ci/run, it is every
// case.
func Next(n, of int) int {
	if os.Getenv("KVSTORE_STEPS") != "" {
		return n + 1
	}

	if IsRace() {
		of *= 4
	}
	return n + 1 + rand.New(rand.NewPCG(uint64(n), uint64(of))).IntN(2*of-1)
}

// IsRace tells whether the race detector is on.
var IsRace = sync.OnceValue(func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
})
