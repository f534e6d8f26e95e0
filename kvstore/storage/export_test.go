package storage

// LockOnlyFile has d lock only LOCK, as on a file system that does not lock directories.
func (d *Disk) LockOnlyFile() { d.isPlain = true }
