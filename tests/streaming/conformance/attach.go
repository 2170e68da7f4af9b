package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"k8s.io/client-go/tools/remotecommand"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"a3s-box-cri/tests/streaming/clients"
)

// answering is a container's program that answers each line and ends after its stdin, or when it is told to.
const answering = `while read line; do
	echo "got $line"; echo "err $line" >&2
	[ "$line" != exit ] || exit 9
	[ "$line" != size ] || stty size
done
echo end of input`

// attached is a client of a container's own streams.
type attached struct {
	screen *screen
	errors *screen
	keys   *io.PipeWriter
	leave  context.CancelFunc
	ended  chan error
}

func (c *container) join(ctx context.Context, d clients.Dialect, tty bool) *attached {
	short, leave := context.WithCancel(ctx)
	stdin, keys := io.Pipe()
	a := &attached{&screen{}, &screen{}, keys, leave, make(chan error, 1)}
	options := remotecommand.StreamOptions{Stdin: stdin, Stdout: a.screen, Tty: tty}
	if !tty {
		options.Stderr = a.errors
	}
	go func() {
		err, end := c.attach(short, d, options)
		if err != nil {
			end = err
		}
		a.ended <- end
		stdin.Close()
	}()
	return a
}

// says types a line and waits for its answer.
func (a *attached) says(ctx context.Context, word string) error {
	if _, err := a.keys.Write([]byte(word + "\n")); err != nil {
		return err
	}
	return a.screen.shows(ctx, "got "+word)
}

func attachCases(d clients.Dialect) []testCase {
	in := func(pod, name string, run func(context.Context, *container, *seen) error, changes ...change) testCase {
		return testCase{d.Name + ", attach: " + name, func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, pod)
			if err != nil {
				return err
			}
			c, err := p.run(ctx, []string{"sh", "-c", answering}, changes...)
			if err != nil {
				return err
			}
			if err := run(ctx, c, s); err != nil {
				return err
			}
			status, err := n.runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.id})
			if err != nil {
				return err
			}
			s.note("the container", "%s, exit code %d", status.Status.State, status.Status.ExitCode)
			_, err = n.runtime.StopContainer(ctx, stop(c.id))
			return err
		}}
	}
	to := func(name string, run func(context.Context, *container, *seen) error, changes ...change) testCase {
		return in("shell", name, run, changes...)
	}
	conversation := func(ctx context.Context, c *container, s *seen) error {
		a := c.join(ctx, d, false)
		if err := a.says(ctx, "hello"); err != nil {
			return err
		}
		if err := a.errors.shows(ctx, "err hello"); err != nil {
			return err
		}
		a.keys.Write([]byte("exit\n"))
		end := <-a.ended
		s.text("stdout", a.screen.String())
		s.text("stderr", a.errors.String())
		s.end(end)
		return c.exited(ctx)
	}
	cases := []testCase{
		to("a conversation to the container's end", conversation, withStdin),
		in(onTheNode, "a conversation in a pod on the node's network", conversation, withStdin),
		to("two clients at once", func(ctx context.Context, c *container, s *seen) error {
			a, b := c.join(ctx, d, false), c.join(ctx, d, false)
			if err := meet(ctx, c, a, b); err != nil {
				return err
			}
			if err := a.says(ctx, "from one"); err != nil {
				return err
			}
			if err := b.says(ctx, "from the other"); err != nil {
				return err
			}
			s.note("each sees the other's", "%t %t", a.screen.shows(ctx, "got from the other") == nil, b.screen.shows(ctx, "got from one") == nil)
			a.keys.Write([]byte("exit\n"))
			s.ended("end of one", <-a.ended)
			s.ended("end of the other", <-b.ended)
			return c.exited(ctx)
		}, withStdin),
		to("again after a client has gone", func(ctx context.Context, c *container, s *seen) error {
			for _, word := range []string{"one", "two", "three"} {
				a := c.join(ctx, d, false)
				if err := a.says(ctx, word); err != nil {
					return err
				}
				s.text("stdout", a.screen.String())
				a.leave()
				<-a.ended
			}
			return nil
		}, withStdin),
		to("what was said before is not repeated", func(ctx context.Context, c *container, s *seen) error {
			a := c.join(ctx, d, false)
			if err := a.says(ctx, "before"); err != nil {
				return err
			}
			b := c.join(ctx, d, false)
			if err := b.says(ctx, "after"); err != nil {
				return err
			}
			s.text("stdout", b.screen.String())
			a.leave()
			b.leave()
			return nil
		}, withStdin),
		to("a client that vanishes, with stdin once", func(ctx context.Context, c *container, s *seen) error {
			a := c.join(ctx, d, false)
			if err := a.says(ctx, "hello"); err != nil {
				return err
			}
			a.leave()
			<-a.ended
			goes, err := within(ctx, func() (bool, error) { return c.hasExited(ctx) })
			s.note("the container's stdin ends", "%t", goes)
			return err
		}, onceOnly),
		to("a container without stdin", func(ctx context.Context, c *container, s *seen) error {
			s.note("ended by itself", "%t", c.exited(ctx) == nil)
			err, end := c.attach(ctx, d, remotecommand.StreamOptions{Stdout: io.Discard})
			if err != nil {
				end = err
			}
			s.end(end)
			return nil
		}),
		to("a terminal and its size", func(ctx context.Context, c *container, s *seen) error {
			stdin, keys := io.Pipe()
			out, sizes := &screen{}, make(clients.Sizes)
			ended := make(chan error, 1)
			go func() {
				err, end := c.attach(ctx, d, remotecommand.StreamOptions{Stdin: stdin, Stdout: out, Tty: true, TerminalSizeQueue: sizes})
				if err != nil {
					end = err
				}
				ended <- end
				stdin.Close()
			}()
			sizes <- remotecommand.TerminalSize{Width: 111, Height: 22}
			// It comes on a way of its own.
			if err := until(ctx, "the size", func() (bool, error) {
				_, err := keys.Write([]byte("size\n"))
				return strings.Contains(out.String(), "22 111\r\n"), err
			}); err != nil {
				return fmt.Errorf("%w; on the screen: %q", err, out)
			}
			close(sizes)
			keys.Write([]byte("exit\n"))
			end := <-ended
			s.note("the last answer shows", "%t", strings.HasSuffix(out.String(), "err exit\r\n"))
			s.end(end)
			return c.exited(ctx)
		}, withTerminal),
	}
	if !d.HalfClose {
		return cases
	}
	return append(cases,
		to("the end of stdin, with stdin once", func(ctx context.Context, c *container, s *seen) error {
			a := c.join(ctx, d, false)
			if err := a.says(ctx, "hello"); err != nil {
				return err
			}
			a.keys.Close()
			end := <-a.ended
			s.text("stdout", a.screen.String())
			s.end(end)
			return c.exited(ctx)
		}, onceOnly),
		to("the end of stdin, which stays open", func(ctx context.Context, c *container, s *seen) error {
			a := c.join(ctx, d, false)
			if err := a.says(ctx, "hello"); err != nil {
				return err
			}
			a.keys.Close()
			b := c.join(ctx, d, false)
			if err := b.says(ctx, "again"); err != nil {
				return err
			}
			seesOn, err := within(ctx, func() (bool, error) { return strings.Contains(a.screen.String(), "again"), nil })
			s.note("the first client still sees", "%t", seesOn)
			b.keys.Write([]byte("exit\n"))
			s.ended("end of one", <-a.ended)
			s.ended("end of the other", <-b.ended)
			if err != nil {
				return err
			}
			return c.exited(ctx)
		}, withStdin),
		to("only stdin", func(ctx context.Context, c *container, s *seen) error {
			err, end := c.attach(ctx, d, remotecommand.StreamOptions{Stdin: strings.NewReader("alone\n")})
			s.end(end)
			if err != nil {
				return err
			}
			return c.logs(ctx, "got alone")
		}, withStdin),
	)
}

// meet waits until each of the two is attached: the container's output begins at different times for them.
func meet(ctx context.Context, c *container, all ...*attached) error {
	for _, a := range all {
		if err := a.says(ctx, "here"); err != nil {
			return err
		}
	}
	return nil
}

func (c *container) hasExited(ctx context.Context) (bool, error) {
	status, err := c.pod.node.runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.id})
	return err == nil && status.Status.State == runtime.ContainerState_CONTAINER_EXITED, err
}

func (c *container) exited(ctx context.Context) error {
	return until(ctx, "the container's end", func() (bool, error) { return c.hasExited(ctx) })
}

func stop(id string) *runtime.StopContainerRequest {
	return &runtime.StopContainerRequest{ContainerId: id}
}

// restartCases are about what outlives the server.
func restartCases() []testCase {
	var cases []testCase
	for _, d := range []clients.Dialect{clients.Dialects[0], clients.Dialects[5]} {
		cases = append(cases, testCase{d.Name + ", attach: to a container that is older than the server", func(ctx context.Context, n *node, s *seen) error {
			p, err := n.pod(ctx, "shell")
			if err != nil {
				return err
			}
			c, err := p.run(ctx, []string{"sh", "-c", answering}, withStdin)
			if err != nil {
				return err
			}
			before := c.join(ctx, d, false)
			if err := before.says(ctx, "before"); err != nil {
				return err
			}
			if err := n.restart(ctx); err != nil {
				return err
			}
			// How it ends is a matter of luck.
			<-before.ended
			after := c.join(ctx, d, false)
			if err := after.says(ctx, "after"); err != nil {
				return err
			}
			after.keys.Write([]byte("exit\n"))
			end := <-after.ended
			s.text("stdout", after.screen.String())
			s.end(end)
			return c.exited(ctx)
		}})
	}
	return cases
}
