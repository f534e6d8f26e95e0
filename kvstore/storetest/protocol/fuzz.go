package protocol

import (
	"cmp"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
)

// tlsHandshake is the first byte of a TLS connection.
const tlsHandshake = "\x16"

// FuzzConversation ensures that whatever bytes a client sends, in whatever pieces, it gets exactly
// the replies of the model. other returns what a client is answered whose first line is of another
// protocol, "" if it is not, and whether its connection ends.
func FuzzConversation(f *testing.F, start Start, help []string, other func(line string) (string, bool)) {
	for i, c := range All(help) {
		if len(c.Send) < 10_000 {
			f.Add([]byte(c.Send), uint16(i))
		}
	}

	f.Fuzz(func(t *testing.T, script []byte, cut uint16) {
		want, isKnown := answers(NewModel(help), string(script), other)
		if !isKnown {
			return
		}

		start.inBubble(t, func(t *testing.T, n *Net) {
			a := n.Dial(t)
			go func() {
				at := min(int(cut), len(script))
				a.Conn.Write(script[:at])
				synctest.Wait()
				a.Conn.Write(script[at:])
				a.Conn.CloseWrite()
			}()
			// The reason in an error is for people: only its place counts here, and that it is one
			// clean line.
			got := regexp.MustCompile(`(?m)^(:ERROR line \d+: )[^\n\r\x00\x1b]+$`).ReplaceAllString(
				a.ReadAll(), "$1")
			if got != want {
				t.Errorf("sent %q\n got %q\nwant %q", script, got, want)
			}
		})
	})
}

// answers returns what a client gets that sends script, with errors but for their reasons. It is
// not known if the script asks for what m has not. other is as for FuzzConversation.
func answers(m *Model, script string, other func(line string) (string, bool)) (want string, isKnown bool) {
	lines := strings.SplitAfter(script, "\n")
	spoke, quit := false, false
	if strings.HasPrefix(lines[0], tlsHandshake) {
		want, quit = ":ERROR line 1: \n", true
	}

	for i, line := range lines {
		if line == "" || quit {
			continue
		}

		if !strings.HasSuffix(line, "\n") {
			want += ":ERROR line " + strconv.Itoa(i+1) + ": \n"
			continue
		}

		// A line may end with CR, or CR and NUL, and a blank line is no request.
		line = strings.TrimSuffix(line, "\n")
		if short, ok := strings.CutSuffix(line, "\r\x00"); ok {
			line = short
		} else {
			line = strings.TrimSuffix(line, "\r")
		}
		if line == "" {
			continue
		}

		if verb, _, _ := strings.Cut(line, ":"); strings.ToLower(verb) == "stats" ||
			strings.ContainsFunc(verb, func(r rune) bool { return r > 127 }) {
			return "", false // Stats shows the time; and the model folds letters as Unicode does
		}

		answer := m.Answer(i+1, line)
		if strings.HasPrefix(answer, ":ERROR") {
			answer += "\n"
			if !spoke {
				var foreign string
				foreign, quit = other(line)
				answer = cmp.Or(foreign, answer)
			}
		}

		spoke = true
		want += answer
		verb := strings.ToLower(line)
		quit = quit || verb == "quit" || verb == "exit"
	}
	return want, true
}
