package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Ensure that a histogram counts exactly, on both sides of each of its bounds.
func TestHistogram(t *testing.T) {
	for _, counts := range []bool{false, true} {
		h := &Histogram{Counts: counts}
		bounds, sum, step := h.Bounds(), 0.0, 4.0
		if counts {
			step = 2
		}
		for i, bound := range bounds {
			if i > 0 && bound/bounds[i-1] != step {
				t.Errorf("counts %v: bound %v is behind %v", counts, bound, bounds[i-1])
			}
			for range i + 1 { // no two buckets get the same number
				h.Observe(bound)
				h.Observe(bound * 1.5)
				sum += bound * 2.5
			}
		}

		atMost, all, total := h.Read()
		var want []int64
		n := 0
		for i := range bounds {
			n += 2*i + 1 // i+1 on this bound, i above the one before
			want = append(want, int64(n))
		}

		if n += len(bounds); !slices.Equal(atMost, want) || all != int64(n) {
			t.Errorf("counts %v: %v of %d, want %v of %d", counts, atMost, all, want, n)
		}
		if fmt.Sprintf("%.6f", total) != fmt.Sprintf("%.6f", sum) {
			t.Errorf("counts %v: together %v, want %v", counts, total, sum)
		}
	}

	first, last := secondBounds[0], secondBounds[len(secondBounds)-1]
	if first != 0.0001 || last < 5 {
		t.Errorf("from %v to %v seconds", first, last)
	}
}

// Ensure that a Status returns what was set last, and that its zero value is that of a store that
// is being opened.
func TestStatus(t *testing.T) {
	var s Status
	if s.Stage() == "" || !s.Confirmed().IsZero() {
		t.Errorf("at first %q, %v", s.Stage(), s.Confirmed())
	}

	now := time.Now()
	s.Set("")
	s.Confirm(now)
	if s.Stage() != "" || !s.Confirmed().Equal(now) {
		t.Errorf("later %q, %v", s.Stage(), s.Confirmed())
	}
}

// Ensure that a DamageError says where the damage is, and that a missing file is an fs.ErrNotExist.
func TestDamageSaysWhere(t *testing.T) {
	for _, c := range []struct {
		err  DamageError
		want string
	}{
		{DamageError{File: "f", What: "it is odd"}, "f is damaged: it is odd"},
		{DamageError{File: "f", Offset: 64, Frame: 1, What: "it is odd"},
			"f is damaged at offset 64, frame 1: it is odd"},
		{DamageError{File: "f", What: "the file is missing", Missing: true},
			"f is damaged: the file is missing"},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
		if got := errors.Is(&c.err, fs.ErrNotExist); got != c.err.Missing {
			t.Errorf("%q can be there at the next look: %v", c.want, got)
		}
	}

	for err, want := range map[error]bool{syscall.ENOSPC: true, syscall.EDQUOT: true,
		&os.PathError{Err: syscall.ENOSPC}: true, syscall.EIO: false, os.ErrNotExist: false} {
		if IsFull(err) != want {
			t.Errorf("%v says that the disk is full: %v", err, !want)
		}
	}
}

// Ensure that the advice for an error fits it, and has the directory as one word of a shell.
func TestAdvice(t *testing.T) {
	for err, want := range map[error]string{
		ErrMissing:                        `mkdir -m 700 "/my data"`,
		&DamageError{File: "f"}:           `kvserver repair "/my data" NEW`,
		&os.PathError{Err: syscall.EPERM}: "Start as the user who owns it",
		&os.PathError{Err: syscall.EROFS}: `kvserver backup "/my data" NEW`,
		syscall.EIO:                       `else in "/my data"`,
	} {
		if got := Advice(Advise("/my data", err, "else in DIR")); !strings.Contains(got, want) {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}

// Ensure that a stamp tells a file from another one, and from itself after any change.
func TestStamps(t *testing.T) {
	was := Stamp{ID: 1, Size: 2, Changed: time.Unix(3, 0)}

	for _, c := range []struct {
		now            Stamp
		sameFile, same bool
	}{
		{was, true, true},
		{Stamp{1, 2, was.Changed.UTC()}, true, true},
		{Stamp{2, 2, was.Changed}, false, false},
		{Stamp{1, 3, was.Changed}, true, false},
		{Stamp{1, 2, time.Unix(3, 1)}, true, false},
		{Stamp{}, false, false},
	} {
		if was.IsSameFile(c.now) != c.sameFile || was.IsSame(c.now) != c.same {
			t.Errorf("%v and %v: the same file %v, the same %v", was, c.now, !c.sameFile, !c.same)
		}
	}
}
