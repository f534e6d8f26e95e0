//go:build unix

package storage

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// ofSomebody is a file's info that names another owner, or only another group.
type ofSomebody struct {
	os.FileInfo
	user uint32
}

func (o ofSomebody) Sys() any { return &syscall.Stat_t{Uid: o.user, Gid: 54321} }

// Ensure that files made by root are given to the store's owner, without a system call for a file
// that has this owner already. If they cannot be given, they stay root's and the log says so once,
// also for a copy. Ensure that nobody else gives a file away.
func TestFilesOfRoot(t *testing.T) {
	defer func() { geteuid, lchown = os.Geteuid, (*os.Root).Lchown }()
	path := t.TempDir()
	var given []string
	var answer error
	geteuid = func() int { return 0 }
	lchown = func(_ *os.Root, name string, _, _ int) error {
		given = append(given, name)
		return answer
	}

	for _, answer = range []error{nil, syscall.EPERM, syscall.EINVAL, syscall.ENOSYS,
		syscall.EOPNOTSUPP, syscall.EROFS} {
		log := &strings.Builder{}
		d, err := OpenDisk(path, slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}

		given = nil
		f, err := d.Create("ours")
		if err != nil || len(given) != 0 {
			t.Fatalf("a file that its owner has made: %v, %q was given", err, given)
		}
		f.Close()

		info, _ := os.Stat(path)
		d.give("ours", ofSomebody{info, 54321})
		d.give("ours", ofSomebody{info, uint32(os.Getuid())})
		told := strings.Count(log.String(), "files stay root's")
		if len(given) != 2 || told > 1 || (told == 1) != (answer != nil) {
			t.Errorf("%v: %q was given, the log says %s", answer, given, log)
		}
		d.Close()
	}

	// A process that is not root's has no directory of somebody else.
	from, to := filepath.Join(path, "from"), filepath.Join(path, "to")
	log := &strings.Builder{}
	err := os.Mkdir(from, 0o700)
	isOthers := os.Chown(from, 54321, 54321) == nil
	answer = syscall.EPERM
	d, _, makeErr := MakeDisk(to, from, slog.New(slog.NewTextHandler(log, nil)))
	if err := errors.Join(err, makeErr); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if strings.Contains(log.String(), "files stay root's") != isOthers {
		t.Errorf("of a copy the log says %q", log)
	}

	// The owner may have the directory already, and root the files in it.
	os.Chown(to, 54321, 54321)
	given = nil
	f, err := d.Create("file")
	if err != nil {
		t.Fatalf("a file for somebody else: %v", err)
	}
	f.Close()
	lock, err := d.Lock(t.Context())
	if err != nil {
		t.Fatalf("a lock for somebody else: %v", err)
	}
	lock.Close()
	if want := []string{"file", LockName}; isOthers && !slices.Equal(given, want) {
		t.Errorf("%q was given, want %q", given, want)
	}

	// Only root may give files away.
	given, geteuid = nil, func() int { return 1000 }
	if info, err := os.Stat(path); err != nil || keepOwner(d.root, "file", ofSomebody{info, 54321}) != nil ||
		len(given) > 0 {
		t.Errorf("a user gives away %q, %v", given, err)
	}
}
