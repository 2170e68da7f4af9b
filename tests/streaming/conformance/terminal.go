package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	"k8s.io/client-go/tools/remotecommand"

	"a3s-box-cri/tests/streaming/clients"
)

// screen is what a terminal shows, with the way to wait for a word on it.
type screen struct {
	lock sync.Mutex
	text bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.lock.Lock()
	defer s.lock.Unlock()
	return s.text.String()
}

func (s *screen) shows(ctx context.Context, word string) error {
	return until(ctx, fmt.Sprintf("%q on the screen, which shows %q", word, s), func() (bool, error) {
		return strings.Contains(s.String(), word), nil
	})
}

// dialogue is one session with somebody who types.
type dialogue struct {
	screen *screen
	keys   *io.PipeWriter
	sizes  clients.Sizes
	ended  chan error
}

// talk begins one on a terminal.
func (c *container) talk(ctx context.Context, d clients.Dialect, command ...string) (*dialogue, error) {
	stdin, keys := io.Pipe()
	t := &dialogue{&screen{}, keys, make(clients.Sizes), make(chan error, 1)}
	e := exec{command, remotecommand.StreamOptions{Stdin: stdin, Stdout: t.screen, Tty: true, TerminalSizeQueue: t.sizes}}
	url, err := c.url(ctx, e)
	if err != nil {
		return nil, err
	}
	go func() {
		t.ended <- d.Stream(ctx, url, e.options)
		close(t.sizes)
		stdin.Close()
	}()
	return t, nil
}

func (t *dialogue) resize(ctx context.Context, width, height uint16) {
	select {
	case t.sizes <- remotecommand.TerminalSize{Width: width, Height: height}:
	case <-ctx.Done():
	}
}

func (t *dialogue) types(text string) { t.keys.Write([]byte(text)) }

func terminalCases(d clients.Dialect) []testCase {
	plain := func(name string, e exec) testCase {
		e.options.Tty = true
		return testCase{d.Name + ", terminal: " + name, func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			return c.both(ctx, d, s, e)
		}}
	}
	typed := func(name string, run func(context.Context, *dialogue, *seen) error, command ...string) testCase {
		return testCase{d.Name + ", terminal: " + name, func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			t, err := c.talk(ctx, d, command...)
			if err != nil {
				return err
			}
			return run(ctx, t, s)
		}}
	}
	return []testCase{
		plain("both outputs are one", script("echo out; echo err >&2; exit 5")),
		plain("all three are the terminal", script("test -t 0 && test -t 1 && test -t 2 && tty | tr -d 0-9; echo TERM=$TERM")),
		plain("a missing program", exec{command: []string{"no-such-program"}}),
		plain("it controls the session", script(": </dev/tty && echo controlling")),
		typed("the first size is there from the start", func(ctx context.Context, t *dialogue, s *seen) error {
			t.resize(ctx, 123, 45)
			end := <-t.ended
			s.note("last size", "%s", lastLine(t.screen))
			s.end(end)
			return nil
		}, "/probe", "sizes", "123"),
		typed("10,000 sizes end with the last", func(ctx context.Context, t *dialogue, s *seen) error {
			if err := t.screen.shows(ctx, "x"); err != nil {
				return err
			}
			for number := range 9999 {
				t.resize(ctx, uint16(100+number%100), uint16(number%50+1))
			}
			t.resize(ctx, 321, 54)
			end := <-t.ended
			s.note("last size", "%s", lastLine(t.screen))
			s.end(end)
			return nil
		}, "/probe", "sizes", "321"),
		typed("typed lines are echoed", func(ctx context.Context, t *dialogue, s *seen) error {
			t.types("hello\n")
			if err := t.screen.shows(ctx, "got hello"); err != nil {
				return err
			}
			t.types("exit\n")
			end := <-t.ended
			s.text("screen", t.screen.String())
			s.end(end)
			return nil
		}, "sh", "-c", `while read line; do echo "got $line"; [ "$line" != exit ] || exit 9; done`),
		typed("control-C interrupts", func(ctx context.Context, t *dialogue, s *seen) error {
			if err := t.screen.shows(ctx, "begun\r\n"); err != nil {
				return err
			}
			t.types("\x03")
			end := <-t.ended
			s.text("screen", t.screen.String())
			s.end(end)
			return nil
		}, "sh", "-c", "echo begun; exec sleep 779"),
		typed("control-D ends the input", func(ctx context.Context, t *dialogue, s *seen) error {
			if err := t.screen.shows(ctx, "begun\r\n"); err != nil {
				return err
			}
			t.types("line\n\x04")
			end := <-t.ended
			s.text("screen", t.screen.String())
			s.end(end)
			return nil
		}, "sh", "-c", "stty -echo; echo begun; cat; echo end"),
		{d.Name + ", terminal: the process of a client that vanishes", func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			short, cancel := context.WithCancel(ctx)
			defer cancel()
			t, err := c.talk(short, d, "sh", "-c", "echo begun; sleep 780; :")
			if err != nil {
				return err
			}
			if err := t.screen.shows(ctx, "begun"); err != nil {
				return err
			}
			cancel()
			<-t.ended
			return fate(ctx, c, s, "sleep 780")
		}},
	}
}

// fate notes whether a process goes on after its client has gone, and ends it.
func fate(ctx context.Context, c *container, s *seen, command string) error {
	ended, err := within(ctx, func() (bool, error) {
		running, err := c.runs(ctx, command)
		return !running, err
	})
	s.note("the process goes on", "%t", !ended)
	if err != nil {
		return err
	}
	_, err = c.sync(ctx, fmt.Sprintf("pkill -fx '%s'; :", command))
	return err
}

func lastLine(t *screen) string {
	lines := strings.Fields(t.String())
	if len(lines) == 0 {
		return ""
	}
	return lines[len(lines)-1]
}
