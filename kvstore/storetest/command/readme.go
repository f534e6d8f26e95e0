package command

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kvserver/kvstore/storetest/is"
	"kvserver/kvstore/storetest/protocol"
)

// ReadmePrograms ensures that the README's client for programs works as it is printed, also with
// odd data: bytes that are no text, long values, mistakes, and lines that are no requests.
func ReadmePrograms(t *testing.T, readme string, serve Serve) {
	t.Parallel()
	m := regexp.MustCompile("(?s)```python\n(.*?)```").FindStringSubmatch(readme)
	if m == nil {
		t.Fatal("the README has no client in Python")
	}
	if Tool(t, "python3") == "" {
		return
	}

	_, port, _ := net.SplitHostPort(serve(t))
	program := strings.Replace(m[1], "localhost:9999", "localhost:"+port, 1)
	const odd = `
for value in [b"\xff\xfe", b"", b"\0", b": OK 1", b"v" * 300000]:
    ask(b"Delete:odd")
    ask(b"Put:odd:" + value)
    for bad in [b"nonsense \xff", b"Put:odd", b"Get:a:b"]:
        try:
            ask(bad)
            print("not refused", bad)
        except RuntimeError:
            pass
    for bad in [b"", b"\r", b"\r\0", b"Get:a\nGet:b"]:
        try:
            ask(bad)
            print("sent", bad)
        except ValueError:
            pass
    if ask(b"Get:odd") != [b"odd:" + value]:
        print("lost", value[:10])
`

	for _, text := range []string{program, program + odd} {
		file := filepath.Join(t.TempDir(), "client.py")
		os.WriteFile(file, []byte(text), 0o600)
		out, err := exec.Command("python3", file).CombinedOutput()
		if want := "fruit:apple\nfruit:pear\n"; err != nil || string(out) != want {
			t.Errorf("it prints %.200q, %v, want %q", out, err, want)
		}
	}
}

// ReadmeCommands ensures that the README's commands do what it says, those in scripts and those
// that make and use certificates.
func ReadmeCommands(t *testing.T, readme string, program protocol.Program, serve Serve) {
	t.Parallel()
	dir := t.TempDir()
	shim := "#!/bin/sh\nexec " + program().Path + " \"$@\"\n"
	is.OK(t, os.WriteFile(filepath.Join(dir, "kvserver"), []byte(shim), 0o700))
	is.OK(t, os.WriteFile(filepath.Join(dir, "requests.txt"), []byte("Put:k:v\n\nGet:k\n"), 0o600))

	// play runs commands beside the server at addr, and returns what they print.
	play := func(addr, commands string) string {
		cmd := exec.Command("sh", "-e", "-c", strings.ReplaceAll(commands, "localhost:9999", addr))
		cmd.Dir = dir
		cmd.Env = append(program().Env, "PATH="+dir+":"+os.Getenv("PATH"), "KVSERVER_ADDR="+addr)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", commands, err, out)
		}
		return string(out)
	}

	for _, line := range commandsWith(t, readme, "requests.txt") {
		want := "fruit:apple\n"
		if strings.Contains(line, "requests.txt") {
			want = "k:v\n"
		}
		if help, _ := exec.Command("nc", "-h").CombinedOutput(); strings.Contains(line, "nc -N") {
			if !bytes.Contains(help, []byte("OpenBSD")) {
				t.Log("nc is not OpenBSD's, or not on PATH: it was not tried")
				continue
			}
			line = strings.Replace(line, "localhost 9999", "$(echo localhost:9999 | tr : ' ')", 1)
		}
		if out := play(serve(t), line); out != want {
			t.Errorf("%s prints %q, want %q", line, out, want)
		}
	}

	if Tool(t, "openssl") != "" {
		playTLS(t, commandsWith(t, readme, "tls-client-ca"), dir, program, play)
	}
}

// commandsWith returns the lines of the README's first block of commands that has this text.
func commandsWith(t *testing.T, readme, has string) []string {
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(readme, -1)
	for _, m := range blocks {
		if strings.Contains(m[1], has) {
			return strings.Split(strings.TrimSpace(m[1]), "\n")
		}
	}
	t.Fatalf("the README has no commands with %s", has)
	return nil
}

// playTLS plays lines, which make certificates in dir, start a server with them, and then talk to
// it.
func playTLS(t *testing.T, lines []string, dir string, program protocol.Program,
	play func(addr, commands string) string) {

	// The certificates.
	at := slices.IndexFunc(lines, func(line string) bool { return strings.Contains(line, "-tls-client-ca") })
	play("", strings.Join(lines[:at], "\n"))

	// The server.
	args := strings.Fields(lines[at])[1:]
	for i, arg := range args {
		if !strings.HasPrefix(arg, "-") {
			args[i] = filepath.Join(dir, arg)
		}
	}
	_, addr, log := program.Start(t, append(args, "-addr", "localhost:0")...)
	go io.Copy(io.Discard, log)
	_, port, _ := net.SplitHostPort(addr)

	// The clients.
	play("localhost:"+port, "kvserver -tls-ca ca.pem -tls-cert client.pem -tls-key client.key "+
		"-c Put:fruit:apple")
	for _, line := range lines[at+1:] {
		line = strings.Replace(line, "# as netcat; Quit ends it", "", 1)
		if strings.Contains(line, "openssl") {
			line = "printf 'Get:fruit\\nQuit\\n' | " + strings.TrimSpace(line) + " 2>/dev/null"
		}
		if out := play("localhost:"+port, line); line != "" && out != "fruit:apple\n" {
			t.Errorf("%s prints %q", line, out)
		}
	}
}

// Manual ensures that all headings of the manual are printed, or the parts whose heading has all
// words. printPart prints a part, and run runs a command.
func Manual(t *testing.T, print func(w io.Writer, words []string) error,
	printPart func(w io.Writer, part string),
	run func(command string, args []string, out io.Writer) error) {

	var all, part bytes.Buffer
	if err := print(&all, nil); err != nil || strings.Contains(all.String(), "#") {
		t.Errorf("without a word: %v, %s", err, &all)
	}
	for words, want := range map[string]string{"-FSYNC": "^-fsync WHEN\n",
		"take": "^Take:key, Take:key:seconds\n", "timeout": "^-write-timeout TIME\n(.*\n)*-timeout TIME\n"} {
		part.Reset()
		err := print(&part, []string{words})
		if err != nil || !regexp.MustCompile(want).MatchString(part.String()) {
			t.Errorf("help %s: %v, it prints %.60q, want %q", words, err, &part, want)
		}
	}

	for _, words := range []string{"systemd", "backup", "TLS", "tls", "flags", "etcd", "repair",
		"check repair", "Repair CHECK", "more than one machine"} {
		part.Reset()
		err := print(&part, strings.Fields(words))
		heading, _, _ := strings.Cut(part.String(), "\n")
		for word := range strings.FieldsSeq(strings.ToLower(words)) {
			if err != nil || !strings.HasPrefix(heading, "#") ||
				!strings.Contains(strings.ToLower(heading), word) {
				t.Errorf("help %s: %v, it begins with %q", words, err, heading)
			}
		}

		if text := part.String(); len(text) < 100 || strings.Contains(text, "|--") ||
			strings.Count(text, "\n## ") > 0 || strings.Contains(text, "\n-tls-key FILE\n") != (words == "flags") {
			t.Errorf("help %s prints no part of the README, two, or a raw table: %s", words, text)
		}
	}

	// A table is printed a cell a line, without what Markdown needs and without its head.
	part.Reset()
	printPart(&part, "## Flags\n\nAll:\n\n| flag | is |\n|---|---|\n| `-a N` | "+
		strings.Repeat("a `word` ", 20)+"|\n| `-b` |  | last |\n")
	if want := "## Flags\n\nAll:\n\n-a N\n    " + strings.Repeat("a word ", 10) + "a word\n    " +
		strings.Repeat("a word ", 8) + "a word\n-b\n    last\n\n"; part.String() != want {
		t.Errorf("a table is printed as\n%s\nwant\n%s", &part, want)
	}

	// Who asks a command for help gets its part.
	part.Reset()
	err := run("check", []string{"-h"}, &part)
	const want = "## Keeping the data: backup, restore, check, repair\n"
	if err != nil || !strings.HasPrefix(part.String(), want) {
		t.Errorf("check -h: %v, it prints %.60q, want %q", err, &part, want)
	}
}
