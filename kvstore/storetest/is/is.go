// Package is says what a test wants, in one line each.
package is

import (
	"cmp"
	"fmt"
	"strings"
	"testing"
	"time"
)

// Equal wants got to be want.
func Equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %.600q, want %.600q", what, fmt.Sprint(got), fmt.Sprint(want))
	}
}

// Between wants got to be from least to most.
func Between[T cmp.Ordered](t testing.TB, what string, got, least, most T) {
	t.Helper()
	if got < least || got > most {
		t.Errorf("%s: got %v, want %v to %v", what, got, least, most)
	}
}

// Within runs do, which must take from least to most.
func Within(t testing.TB, least, most time.Duration, do func()) {
	t.Helper()
	start := time.Now()
	do()
	Between(t, "the time that it took", time.Since(start), least, most)
}

// In wants text to have all of these parts.
func In(t testing.TB, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: no %q in %s", what, part, text)
		}
	}
}

// OK ends the test at an error.
func OK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
