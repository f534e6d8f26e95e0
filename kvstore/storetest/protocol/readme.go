package protocol

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
)

// ReadmeSession ensures that the session in the README is what happens.
func ReadmeSession(t *testing.T, start Start, readme string) {
	pattern := regexp.MustCompile("(?s)```text\n\\$ nc localhost 9999\n(.*?)```")
	sessions := pattern.FindAllStringSubmatch(readme, -1)
	if len(sessions) == 0 {
		t.Fatal("the README shows no session")
	}

	for _, session := range sessions {
		start.inBubble(t, func(t *testing.T, n *Net) {
			a := n.Dial(t)
			for line := range strings.Lines(session[1]) {
				line = strings.TrimSuffix(line, "\n")
				if request, _, typed := strings.Cut(line, "  <-"); typed {
					a.Send(strings.TrimRight(request, " ") + "\n")
				} else {
					a.Want(line)
				}
			}

			a.Conn.CloseWrite()
			a.WantClosed()
		})
	}
}

// ReadmeConversations ensures that the README's conversations of two clients, about a lock, a
// counter, a queue and a session, are what happens.
func ReadmeConversations(t *testing.T, start Start, readme string) {
	_, section, _ := strings.Cut(readme, "\n## A lock, a counter, a queue, a session\n")
	_, block, _ := strings.Cut(section, "```text\n")
	block, _, _ = strings.Cut(block, "\n```")
	talks := strings.Split(block, "\n\n")
	if len(talks) != 4 {
		t.Fatalf("the README shows %d conversations", len(talks))
	}

	for _, talk := range talks {
		start.inBubble(t, func(t *testing.T, n *Net) {
			clients := map[string]*Client{}
			for line := range strings.Lines(talk) {
				line = fmt.Sprintf("%-120s", strings.TrimSuffix(line, "\n"))
				name, request := line[:1], strings.TrimSpace(line[3:31])
				if clients[name] == nil {
					clients[name] = n.Dial(t)
					clients[name].Ask("Ack", ":OK 0")
				}

				if request != "" {
					clients[name].Send(request + "\n")
				}
				for answer := range strings.SplitSeq(strings.TrimSpace(line[31:60]), " | ") {
					if answer != "" {
						clients[name].Want(answer)
					}
				}

				synctest.Wait() // so that a Take is in line
			}
		})
	}
}
