// Dist makes the archives of a release in dist/, from the current commit: for each system an
// archive with the binary, LICENSE, README.md and the files that the README shows, and beside the
// archives SHA256SUMS. The same commit, Go version and tags give the same bytes. With -files DIR it
// only writes the README's files into DIR.
package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// everywhere is the systems for which archives are made, if -targets does not say which.
const everywhere = "linux/amd64,linux/arm64,darwin/amd64,darwin/arm64,windows/amd64,windows/arm64"

// file is a file in an archive.
type file struct {
	name string
	data []byte
	mode int64
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("dist: ")
	to := flag.String("files", "", "only write the files that the README shows into `DIR`")
	targets := flag.String("targets", "", "systems, with commas between them; none: "+everywhere)
	flag.Parse()
	shown := readmeFiles(read("README.md"))
	if *to != "" {
		for _, f := range shown {
			must(os.WriteFile(filepath.Join(*to, f.name), f.data, 0o644))
		}
		return
	}
	if changed := run("git", "status", "--porcelain"); changed != "" {
		log.Fatalf("commit first, for an archive is of a commit:\n%s", changed)
	}
	seconds, err := strconv.ParseInt(run("git", "log", "-1", "--format=%ct"), 10, 64)
	must(err)
	version := run("git", "describe", "--tags", "--always")
	common := append([]file{{"LICENSE", read("LICENSE"), 0o644},
		{"README.md", read("README.md"), 0o644}}, shown...)

	must(os.RemoveAll("dist"))
	must(os.Mkdir("dist", 0o755))
	sums := ""
	for target := range strings.SplitSeq(cmp.Or(*targets, everywhere), ",") {
		system, arch, _ := strings.Cut(target, "/")
		name := "kvserver-" + version + "-" + system + "-" + arch
		files := append([]file{build(system, arch)}, common...)
		archive, packed := name+".tar.gz", tarball(name, files, time.Unix(seconds, 0))
		if system == "windows" {
			archive, packed = name+".zip", zipped(name, files, time.Unix(seconds, 0))
		}
		must(os.WriteFile(filepath.Join("dist", archive), packed, 0o644))
		sums += fmt.Sprintf("%x  %s\n", sha256.Sum256(packed), archive)
	}
	must(os.WriteFile("dist/SHA256SUMS", []byte(sums), 0o644))
	fmt.Print(sums)
}

// readmeFiles returns the files in the README's code blocks. A file begins with a comment that is
// its name, and ends before the next such comment or with its block.
func readmeFiles(readme []byte) (files []file) {
	name := regexp.MustCompile(`^# (?:\S*/)?([\w.-]+\.(?:service|timer|yml))\n$`)
	isFile := false
	for line := range strings.Lines(string(readme)) {
		if strings.HasPrefix(line, "```") {
			isFile = false
		} else if m := name.FindStringSubmatch(line); m != nil {
			files, isFile = append(files, file{name: m[1], mode: 0o644}), true
		}
		if isFile {
			last := &files[len(files)-1]
			last.data = append(last.data, line...)
		}
	}
	for i := range files {
		files[i].data = append(bytes.TrimSpace(files[i].data), '\n')
	}
	return files
}

// build makes the binary for a system.
func build(system, arch string) file {
	name := "kvserver"
	if system == "windows" {
		name += ".exe"
	}
	dir, err := os.MkdirTemp("", "dist")
	must(err)
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-buildvcs=true", "-trimpath", "-ldflags=-s -w", "-o",
		filepath.Join(dir, name), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+system, "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	must(cmd.Run())
	return file{name, read(filepath.Join(dir, name)), 0o755}
}

// tarball packs files into a directory called name, as a tar file with gzip.
func tarball(name string, files []file, at time.Time) []byte {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	t := tar.NewWriter(z)
	for _, f := range files {
		must(t.WriteHeader(&tar.Header{Name: name + "/" + f.name, Mode: f.mode, Size: int64(len(f.data)),
			ModTime: at, Format: tar.FormatUSTAR}))
		_, err := t.Write(f.data)
		must(err)
	}
	must(t.Close())
	must(z.Close())
	return packed.Bytes()
}

// zipped packs files into a directory called name, as a zip file.
func zipped(name string, files []file, at time.Time) []byte {
	var packed bytes.Buffer
	z := zip.NewWriter(&packed)
	for _, f := range files {
		head := &zip.FileHeader{Name: name + "/" + f.name, Method: zip.Deflate, Modified: at.UTC()}
		head.SetMode(os.FileMode(f.mode))
		w, err := z.CreateHeader(head)
		must(err)
		_, err = io.Copy(w, bytes.NewReader(f.data))
		must(err)
	}
	must(z.Close())
	return packed.Bytes()
}

// run returns what a command prints, without the white space around it.
func run(command ...string) string {
	out, err := exec.Command(command[0], command[1:]...).Output()
	must(err)
	return strings.TrimSpace(string(out))
}

func read(name string) []byte {
	data, err := os.ReadFile(name)
	must(err)
	return data
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
