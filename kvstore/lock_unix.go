//go:build unix

package kvstore

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Lock holds an flock, which ends with the process however that ends. The file
// says which process it is.
func (d osDirectory) Lock() (io.Closer, error) {
	f, err := os.OpenFile(d.Path(lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		owner := make([]byte, 20)
		n, _ := f.Read(owner)
		f.Close()
		if err == syscall.EWOULDBLOCK {
			return nil, fmt.Errorf("%w: %s by process %s", ErrLocked, string(d), strings.TrimSpace(string(owner[:n])))
		}
		return nil, fmt.Errorf("flock %s: %w", d.Path(lockName), err)
	}
	if err := f.Truncate(0); err == nil {
		f.WriteString(strconv.Itoa(os.Getpid()) + "\n") // only a help for people
	}
	return f, nil
}
