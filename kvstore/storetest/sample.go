package storetest

import (
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"testing"
)

// Next returns the case that a test tries after case n, where many cases are much alike: on average
// one in so many is tried, drawn at random but the same ones in each run. With the race detector,
// which makes everything ten times slower, it is an eighth of these. With KVSTORE_STEPS set, as in
// .ci/run, every case is tried.
func Next(n, of int) int {
	if os.Getenv("KVSTORE_STEPS") != "" {
		return n + 1
	}

	if isRace() {
		of *= 8
	}
	return n + 1 + rand.New(rand.NewPCG(uint64(n), uint64(of))).IntN(2*of-1)
}

// Fewer returns n, or only n/of with the race detector: how often a test repeats what the detector
// sees all of in a few repetitions, because it is one goroutine that works, or the same ones again.
func Fewer(n, of int) int {
	if isRace() {
		return n / of
	}
	return n
}

// Seeds returns the first of the seeds whose worlds a test looks at, and how many they are: Fewer(n,
// of) from 1 on, or what the environment's KVSERVER_SEED and KVSERVER_SEEDS say.
func Seeds(t *testing.T, n, of int) (first, many uint64) {
	first, many = 1, uint64(Fewer(n, of))
	for name, number := range map[string]*uint64{"KVSERVER_SEED": &first, "KVSERVER_SEEDS": &many} {
		if text := os.Getenv(name); text != "" {
			var err error
			if *number, err = strconv.ParseUint(text, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	return first, many
}

// isRace reports whether the race detector is on.
var isRace = sync.OnceValue(func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
})
