package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"k8s.io/client-go/tools/remotecommand"

	"a3s-box-cri/tests/streaming/clients"
)

// sample is exit codes that mean something to somebody; every one of them is a case of its own.
var sample = []int{0, 1, 2, 7, 126, 127, 128, 137, 143, 255}

// execCases are what every protocol version is asked.
func execCases(d clients.Dialect) []testCase {
	plain := func(name string, e exec) testCase {
		return testCase{d.Name + ": " + name, func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			return c.both(ctx, d, s, e)
		}}
	}
	with := func(stdin io.Reader, text string) exec {
		e := script(text)
		e.options.Stdin = stdin
		return e
	}
	cases := []testCase{
		plain("both outputs, each in order", script("i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done")),
		plain("no output at all", script(":")),
		plain("every byte there is", script(`i=0; while [ $i -lt 256 ]; do printf "\\$(printf %03o $i)"; i=$((i+1)); done`)),
		plain("without stdin", script("cat; echo end; wc -c </dev/stdin")),
		plain("arguments as they are", exec{command: []string{"printf", "[%s]", "", " a  b ", "new\nline", "$HOME", "ü€😀", `"'\`}}),
		{d.Name + ": 20 sessions at once", func(ctx context.Context, n *node, s *seen) error {
			return together(ctx, n, s, d, 20)
		}},
	}
	if d.HalfClose {
		cases = append(cases,
			plain("a process that closes its outputs", script("exec >&- 2>&-; exit 4")),
			plain("stdin to its end", with(strings.NewReader("one\ntwo\n"), "cat; echo end")),
			plain("empty stdin", with(strings.NewReader(""), "cat; echo end")),
			plain("every byte of stdin", with(bytes.NewReader(everyByte()), "/probe digest")),
		)
	}
	if d.Protocol == "channel.k8s.io" {
		// Whether this version's client sees how it ends depends on what it reads first.
		return cases
	}
	if !d.ExitCodes {
		return append(cases, plain("exit code 3", script("echo said; exit 3")), plain("a missing program", exec{command: []string{"no-such-program"}}))
	}
	return append(cases,
		testCase{d.Name + ": exit codes", func(ctx context.Context, n *node, s *seen) error { return exitCodes(ctx, n, s, d, sample) }},
		plain("ended by SIGTERM", script("kill -TERM $$; sleep 10")),
		plain("ended by SIGKILL", script("kill -KILL $$; sleep 10")),
		plain("ended by SIGSEGV", script("kill -SEGV $$; sleep 10")),
		plain("ended by SIGPIPE", script("kill -PIPE $$; sleep 10")),
		plain("a missing program", exec{command: []string{"no-such-program"}}),
		plain("a missing path", exec{command: []string{"/no/such/program", "x"}}),
		plain("a file that is no program", exec{command: []string{"/etc/passwd"}}),
		plain("a folder", exec{command: []string{"/etc"}}),
		plain("an empty name", exec{command: []string{""}}),
		plain("a process that ignores its stdin", with(endless{}, "exit 7")),
		plain("a process that closes its stdin", with(endless{}, "exec <&-; sleep 0.2; echo closed; exit 3")),
		plain("a process that reads a part of its stdin", with(endless{}, "head -c 100000 | wc -c")),
		testCase{d.Name + ": only stdout is asked for", func(ctx context.Context, n *node, s *seen) error {
			return only(ctx, n, s, d, func(o *remotecommand.StreamOptions, to io.Writer) { o.Stdout = to })
		}},
		testCase{d.Name + ": only stderr is asked for", func(ctx context.Context, n *node, s *seen) error {
			return only(ctx, n, s, d, func(o *remotecommand.StreamOptions, to io.Writer) { o.Stderr = to })
		}},
		testCase{d.Name + ": what the process leaves running", func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			if err := c.both(ctx, d, s, script("sleep 777 >/dev/null 2>&1 </dev/null & echo begun")); err != nil {
				return err
			}
			left, err := c.sync(ctx, "pgrep -fx 'sleep 777' | wc -l; pkill -fx 'sleep 777'")
			s.text("still running", left)
			return err
		}},
		testCase{d.Name + ": an exec'd process is like its container's", likeItsContainer(d)},
	)
}

// endless is a stdin that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func everyByte() []byte {
	all := make([]byte, 1<<16)
	for place := range all {
		all[place] = byte(place) ^ byte(place>>8)
	}
	return all
}

func exitCodes(ctx context.Context, n *node, s *seen, d clients.Dialect, codes []int) error {
	c, err := n.shell(ctx)
	if err != nil {
		return err
	}
	for _, code := range codes {
		e := script(fmt.Sprintf("exit %d", code))
		e.options.Stdout = io.Discard
		err, end := c.exec(ctx, d, e)
		if err != nil {
			return err
		}
		s.ended(fmt.Sprintf("of exit %d", code), end)
	}
	return nil
}

// only asks for one output of a process that has two.
func only(ctx context.Context, n *node, s *seen, d clients.Dialect, want func(*remotecommand.StreamOptions, io.Writer)) error {
	c, err := n.shell(ctx)
	if err != nil {
		return err
	}
	var output bytes.Buffer
	e := script("i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; exit 6")
	want(&e.options, &output)
	err, end := c.exec(ctx, d, e)
	text := output.String()
	s.note("lines", "%d", strings.Count(text, "\n"))
	s.text("the last", text[strings.LastIndex(strings.TrimSuffix(text, "\n"), "\n")+1:])
	s.end(end)
	return err
}

// together runs sessions at once, each with bytes of its own both ways where the protocol has an end of stdin.
func together(ctx context.Context, n *node, s *seen, d clients.Dialect, count int) error {
	c, err := n.shell(ctx)
	if err != nil {
		return err
	}
	type result struct {
		err, end error
		right    bool
	}
	results := make(chan result, count)
	for number := range count {
		go func() {
			var stdout bytes.Buffer
			want := strings.Repeat(fmt.Sprintf("line of session %d\n", number), 1000)
			e := script(fmt.Sprintf("yes 'line of session %d' | head -n 1000; exit %d", number, number))
			if !d.ExitCodes {
				// The oldest client takes a failure for the end of its output.
				e = script(fmt.Sprintf("yes 'line of session %d' | head -n 1000", number))
			}
			if d.HalfClose {
				e = script(fmt.Sprintf("cat; exit %d", number))
				e.options.Stdin = strings.NewReader(want)
			}
			e.options.Stdout = &stdout
			err, end := c.exec(ctx, d, e)
			code, other := clients.ExitCode(end)
			right := stdout.String() == want && (!d.ExitCodes || other == nil && code == number)
			results <- result{err, end, right}
		}()
	}
	right := 0
	for range count {
		one := <-results
		if one.err != nil {
			return one.err
		}
		if one.right {
			right++
		} else if right == 0 {
			s.ended("the end of one", one.end)
		}
	}
	s.note("sessions with the right bytes and code", "%d", right)
	return nil
}

// likeItsContainer compares what the kernel says of an exec'd process with the container's first one.
func likeItsContainer(d clients.Dialect) func(context.Context, *node, *seen) error {
	const compare = `self=$$
for ns in cgroup ipc mnt net pid user uts; do
	[ "$(readlink /proc/1/ns/$ns)" = "$(readlink /proc/$self/ns/$ns)" ] && echo same $ns || echo other $ns
done
for line in Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp; do
	[ "$(grep ^$line: /proc/1/status)" = "$(grep ^$line: /proc/$self/status)" ] && echo same $line || echo other $line
done
for file in cgroup oom_score_adj limits; do
	[ "$(cat /proc/1/$file)" = "$(cat /proc/$self/$file)" ] && echo same $file || echo other $file
done
echo "cwd $(pwd) umask $(umask) parent $(grep ^PPid: /proc/$self/status | tr -d '\t')"
env | grep -v -e ^SHLVL= -e ^_= -e ^HOSTNAME= | sort
ls -l /proc/$self/fd | sed -n 's/.* \([0-9]*\) -> \([a-z]*\).*/fd \1 \2/p' | sort | head -n 3`
	return func(ctx context.Context, n *node, s *seen) error {
		c, err := n.shell(ctx)
		if err != nil {
			return err
		}
		return c.both(ctx, d, s, script(compare))
	}
}
