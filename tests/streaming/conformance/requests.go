package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"a3s-box-cri/tests/streaming/clients"
)

// requestCases are about what is asked over gRPC and over HTTP before any stream is there.
func requestCases() []testCase {
	return []testCase{
		{"request: exec without streams", func(ctx context.Context, n *node, s *seen) error {
			return n.asks(ctx, s, &runtime.ExecRequest{Cmd: []string{"true"}})
		}},
		{"request: exec on a terminal with stderr", func(ctx context.Context, n *node, s *seen) error {
			return n.asks(ctx, s, &runtime.ExecRequest{Cmd: []string{"true"}, Tty: true, Stdout: true, Stderr: true})
		}},
		{"request: exec in a container that is not there", func(ctx context.Context, n *node, s *seen) error {
			return n.asks(ctx, s, &runtime.ExecRequest{ContainerId: "nobody", Cmd: []string{"true"}, Stdout: true})
		}},
		{"request: exec without a container", func(ctx context.Context, n *node, s *seen) error {
			_, err := n.runtime.Exec(ctx, &runtime.ExecRequest{Cmd: []string{"true"}, Stdout: true})
			s.answer(err)
			return nil
		}},
		{"request: exec in a container that was not started", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "shell")
			if err != nil {
				return err
			}
			c, err := p.create(ctx, []string{"sleep", "1000"})
			if err != nil {
				return err
			}
			return n.asks(ctx, s, &runtime.ExecRequest{ContainerId: c.id, Cmd: []string{"true"}, Stdout: true})
		}},
		{"request: exec and attach to a container that has ended", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "shell")
			if err != nil {
				return err
			}
			c, err := p.run(ctx, []string{"true"})
			if err != nil {
				return err
			}
			if err := c.exited(ctx); err != nil {
				return err
			}
			_, err = n.runtime.Attach(ctx, &runtime.AttachRequest{ContainerId: c.id, Stdout: true})
			s.answer(err)
			return n.asks(ctx, s, &runtime.ExecRequest{ContainerId: c.id, Cmd: []string{"true"}, Stdout: true})
		}},
		{"request: a container that ends before its client comes", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "shell")
			if err != nil {
				return err
			}
			c, err := p.run(ctx, []string{"sleep", "1000"})
			if err != nil {
				return err
			}
			e := exec{command: []string{"true"}}
			e.options.Stdout = io.Discard
			target, err := c.url(ctx, e)
			if err != nil {
				return err
			}
			if _, err := n.runtime.StopContainer(ctx, stop(c.id)); err != nil {
				return err
			}
			s.end(clients.Dialects[0].Stream(ctx, target, e.options))
			return nil
		}},
		{"request: a container that ends under its exec", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "shell")
			if err != nil {
				return err
			}
			c, err := p.run(ctx, []string{"sleep", "1000"})
			if err != nil {
				return err
			}
			begun, ended := make(chan struct{}, 1), make(chan error, 1)
			e := script("echo begun; sleep 1000")
			e.options.Stdout = notice{begun}
			target, err := c.url(ctx, e)
			if err != nil {
				return err
			}
			go func() { ended <- clients.Dialects[0].Stream(ctx, target, e.options) }()
			<-begun
			if _, err := n.runtime.StopContainer(ctx, stop(c.id)); err != nil {
				return err
			}
			s.end(<-ended)
			return nil
		}},
		{"request: attach to a container that is not there", func(ctx context.Context, n *node, s *seen) error {
			_, err := n.runtime.Attach(ctx, &runtime.AttachRequest{ContainerId: "nobody", Stdout: true})
			s.answer(err)
			return nil
		}},
		{"request: attach without streams", func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			_, err = n.runtime.Attach(ctx, &runtime.AttachRequest{ContainerId: c.id})
			s.answer(err)
			return nil
		}},
		{"request: port-forward of a pod that is not there", func(ctx context.Context, n *node, s *seen) error {
			_, err := n.runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: "nobody"})
			s.answer(err)
			return nil
		}},
		{"request: port-forward of a pod that was stopped", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "stopped")
			if err != nil {
				return err
			}
			if _, err := n.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
				return err
			}
			_, err = n.runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: p.id})
			s.answer(err)
			return nil
		}},
		{"http: a token that was never given out", page(func(target *url.URL) { target.Path = "/exec/AbCdEf12" })},
		{"http: a token with a letter too many", page(func(target *url.URL) { target.Path += "x" })},
		{"http: exec's token on attach's path", page(func(target *url.URL) { target.Path = strings.Replace(target.Path, "/exec/", "/attach/", 1) })},
		{"http: exec's token on port-forward's path", page(func(target *url.URL) { target.Path = strings.Replace(target.Path, "/exec/", "/portforward/", 1) })},
		{"http: another path", page(func(target *url.URL) { target.Path = "/" })},
		{"http: a token that was used", func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			e := script("echo ran >>/tmp/ran")
			e.options.Stdout = io.Discard
			target, err := c.url(ctx, e)
			if err != nil {
				return err
			}
			s.ended("first", clients.Dialects[0].Stream(ctx, target, e.options))
			for _, d := range []clients.Dialect{clients.Dialects[0], clients.Dialects[5]} {
				s.note(d.Name, "is refused: %t", d.Stream(ctx, target, e.options) != nil)
			}
			if err := get(ctx, s, target, nil); err != nil {
				return err
			}
			ran, err := c.sync(ctx, "cat /tmp/ran; rm /tmp/ran")
			s.text("it ran", ran)
			return err
		}},
		{"http: no upgrade", page(func(*url.URL) {})},
		{"http: an upgrade to something else", header("Connection", "Upgrade", "Upgrade", "h2c")},
		{"http: SPDY without a protocol", header("Connection", "Upgrade", "Upgrade", "SPDY/3.1")},
		{"http: SPDY with an unknown protocol", header("Connection", "Upgrade", "Upgrade", "SPDY/3.1", "X-Stream-Protocol-Version", "v9.channel.k8s.io")},
	}
}

// answer notes an error of gRPC.
func (s *seen) answer(err error) {
	s.note("code", "%s", status.Code(err))
	s.note("text", "%s", status.Convert(err).Message())
}

func (n *node) asks(ctx context.Context, s *seen, request *runtime.ExecRequest) error {
	if request.ContainerId == "" {
		c, err := n.shell(ctx)
		if err != nil {
			return err
		}
		request.ContainerId = c.id
	}
	_, err := n.runtime.Exec(ctx, request)
	s.answer(err)
	return nil
}

// page looks at a plain GET of an exec's URL, which is changed before.
func page(change func(*url.URL)) func(context.Context, *node, *seen) error {
	return func(ctx context.Context, n *node, s *seen) error {
		target, err := n.target(ctx)
		if err != nil {
			return err
		}
		change(target)
		return get(ctx, s, target.String(), nil)
	}
}

func header(pairs ...string) func(context.Context, *node, *seen) error {
	return func(ctx context.Context, n *node, s *seen) error {
		target, err := n.target(ctx)
		if err != nil {
			return err
		}
		return get(ctx, s, target.String(), pairs)
	}
}

func (n *node) target(ctx context.Context) (*url.URL, error) {
	c, err := n.shell(ctx)
	if err != nil {
		return nil, err
	}
	e := script("echo it ran")
	e.options.Stdout = io.Discard
	text, err := c.url(ctx, e)
	if err != nil {
		return nil, err
	}
	return url.Parse(text)
}

func get(ctx context.Context, s *seen, target string, headers []string) error {
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(short, "GET", target, nil)
	if err != nil {
		return err
	}
	for place := 0; place < len(headers); place += 2 {
		request.Header.Set(headers[place], headers[place+1])
	}
	answer, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		s.note("answer", "none: %v", errors.Unwrap(err))
		return nil
	}
	defer answer.Body.Close()
	s.note("status", "%d", answer.StatusCode)
	if answer.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	body, err := io.ReadAll(answer.Body)
	s.text("body", string(body))
	for _, name := range []string{"X-Accepted-Stream-Protocol-Versions"} {
		if values := answer.Header.Values(name); len(values) > 0 {
			s.note(name, "%s", strings.Join(values, " "))
		}
	}
	return err
}

// syncCases are ExecSync's.
func syncCases() []testCase {
	run := func(ctx context.Context, n *node, s *seen, timeout int64, command ...string) error {
		c, err := n.shell(ctx)
		if err != nil {
			return err
		}
		short, cancel := context.WithTimeout(ctx, hang)
		defer cancel()
		answer, err := n.runtime.ExecSync(short, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: command, Timeout: timeout})
		if short.Err() != nil {
			s.note("answer", "none")
			return nil
		}
		s.answer(err)
		if err == nil {
			s.note("exit code", "%d", answer.ExitCode)
			for _, output := range []struct {
				name  string
				bytes []byte
			}{{"stdout", answer.Stdout}, {"stderr", answer.Stderr}} {
				if len(output.bytes) > 200 {
					s.note(output.name, "%d bytes", len(output.bytes))
				} else {
					s.text(output.name, string(output.bytes))
				}
			}
		}
		return nil
	}
	plain := func(name string, timeout int64, command ...string) testCase {
		return testCase{"execsync: " + name, func(ctx context.Context, n *node, s *seen) error {
			return run(ctx, n, s, timeout, command...)
		}}
	}
	return []testCase{
		plain("both outputs and a code", 0, "sh", "-c", "echo out; echo err >&2; exit 9"),
		plain("ended by SIGKILL", 10, "sh", "-c", "kill -KILL $$; sleep 5"),
		plain("a missing program", 10, "no-such-program"),
		plain("an empty command", 10),
		plain("stdin is empty", 10, "wc", "-c"),
		plain("17 MiB of each output", 60, "sh", "-c", fmt.Sprintf("/probe flood %d; /probe flood %d >&2; exit 8", 17<<20, 17<<20)),
		plain("16 MiB to the byte", 60, "/probe", "flood", fmt.Sprint(16<<20)),
		plain("what it leaves behind has its output", 5, "sh", "-c", "echo said; sleep 784 & :"),
		plain("what it inherits", 10, "sh", "-c", "ls /proc/self/fd | grep -v -x -e 0 -e 1 -e 2 | wc -l"),
		{"execsync: the timeout ends all it started", func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			const tree = "exec >/dev/null 2>&1; trap '' TERM HUP INT; sleep 781 & (setsid sleep 782 &) ; sh -c 'trap \"\" TERM; sleep 783'"
			if err := run(ctx, n, s, 1, "sh", "-c", tree); err != nil {
				return err
			}
			for _, name := range []string{"sleep 781", "sleep 782", "sleep 783"} {
				if err := fate(ctx, c, s, name); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}
