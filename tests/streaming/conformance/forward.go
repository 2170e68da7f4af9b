package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"a3s-box-cri/tests/streaming/clients"
	"a3s-box-cri/tests/streaming/pattern"
)

// What the pod serves.
const (
	echoPort = 8001 + iota
	digestPort
	floodPort
	silentPort
	sixPort
	nobodysPort
)

const floodBytes = 5_000_000

// ports is the container that serves them, in a pod of its own or on the node.
func (n *node) ports(ctx context.Context, name string) (*pod, *container, error) {
	if known := n.pods[name]; known != nil && known.serving != nil {
		return known, known.serving, nil
	}
	// Others use it too: it is made for longer than this case.
	ctx = context.WithoutCancel(ctx)
	p, err := n.pod(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	c, err := p.idle(ctx)
	if err != nil {
		return nil, nil, err
	}
	servers := []string{
		fmt.Sprintf("echo 127.0.0.1:%d", echoPort), fmt.Sprintf("digest 127.0.0.1:%d", digestPort),
		fmt.Sprintf("flood/%d 127.0.0.1:%d", floodBytes, floodPort), fmt.Sprintf("silent 127.0.0.1:%d", silentPort),
		fmt.Sprintf("echo [::1]:%d", sixPort),
	}
	for _, server := range servers {
		// Its output is the container's, whose log tells what it saw.
		script := fmt.Sprintf("/probe serve %s >/proc/1/fd/1 2>&1 </dev/null &", server)
		if _, err := c.sync(ctx, script); err != nil {
			return nil, nil, err
		}
	}
	p.serving = c
	return p, c, until(ctx, "all servers", func() (bool, error) {
		text, err := c.sync(ctx, "netstat -tln | grep -c -e 127.0.0.1:800 -e ::1:800")
		return text == fmt.Sprintf("%d\n", len(servers)), err
	})
}

// complaints are what client-go says of connections that fail: it has no other way to tell.
var complaints = struct {
	sync.Mutex
	texts []string
}{}

func init() {
	utilruntime.ErrorHandlers = []utilruntime.ErrorHandler{func(_ context.Context, err error, _ string, _ ...any) {
		complaints.Lock()
		defer complaints.Unlock()
		complaints.texts = append(complaints.texts, err.Error())
	}}
}

func forwardCases(name string, tunnel bool) []testCase {
	through := func(what, pod string, run func(context.Context, *clients.Forward, *container, *seen) error, ports ...int) testCase {
		return testCase{name + ": " + what, func(ctx context.Context, n *node, s *seen) error {
			p, c, err := n.ports(ctx, pod)
			if err != nil {
				return err
			}
			url, err := p.forward(ctx, ports...)
			if err != nil {
				return err
			}
			forward, err := clients.StartForward(ctx, url, tunnel, ports...)
			if err != nil {
				s.note("not forwarded", "%v", err)
				return nil
			}
			err = run(ctx, forward, c, s)
			if lost := forward.Stop(); lost != nil {
				s.note("the session", "%v", lost)
			}
			return err
		}}
	}
	cases := []testCase{
		through("one connection", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return echo(f.Address(echoPort), 1000, s)
		}, echoPort),
		through("a server on IPv6 only", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return echo(f.Address(sixPort), 1000, s)
		}, sixPort),
		through("two ports", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return errors.Join(echo(f.Address(echoPort), 1000, s), digested(f.Address(digestPort), 70_000, s))
		}, echoPort, digestPort),
		through("100 connections one after the other", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			right := 0
			for range 100 {
				if back, err := echoed(f.Address(echoPort), 1000); err == nil && back.count == 1000 {
					right++
				}
			}
			s.note("right", "%d", right)
			return nil
		}, echoPort),
		through("100 connections at once", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			results := make(chan bool, 100)
			for number := range 100 {
				go func() {
					back, err := echoed(f.Address(echoPort), int64(50_000+number))
					results <- err == nil && back.count == int64(50_000+number) && back.crc == pattern.Sum(back.count)
				}()
			}
			right := 0
			for range 100 {
				if <-results {
					right++
				}
			}
			s.note("right", "%d", right)
			return nil
		}, echoPort),
		through("many bytes in", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return digested(f.Address(digestPort), *volume, s)
		}, digestPort),
		through("many bytes both ways", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return echo(f.Address(echoPort), *volume/4, s)
		}, echoPort),
		through("the server ends first", "ports", func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			connection, err := dial(f.Address(floodPort))
			if err != nil {
				return err
			}
			defer connection.Close()
			back := newSum()
			_, err = io.Copy(back, connection)
			s.note("bytes", "%s", back.of(floodBytes))
			s.note("error", "%v", err)
			return nil
		}, floodPort),
		through("a port where nobody listens", "ports", refused, nobodysPort),
		through("a client whose connection ends", "ports", func(ctx context.Context, f *clients.Forward, c *container, s *seen) error {
			connections, err := knock(ctx, f, c, 1)
			if err != nil {
				return err
			}
			connections[0].Close()
			gone, err := within(ctx, func() (bool, error) { return c.silence() })
			s.note("the server sees it", "%t", gone)
			return err
		}, silentPort),
		{name + ": a client that vanishes", func(ctx context.Context, n *node, s *seen) error {
			p, c, err := n.ports(ctx, "ports")
			if err != nil {
				return err
			}
			url, err := p.forward(ctx, silentPort)
			if err != nil {
				return err
			}
			f, err := clients.StartForward(ctx, url, tunnel, silentPort)
			if err != nil {
				s.note("not forwarded", "%v", err)
				return nil
			}
			if _, err := knock(ctx, f, c, 5); err != nil {
				return err
			}
			f.Stop()
			gone, err := within(ctx, func() (bool, error) { return c.silence() })
			s.note("the pod's connections end", "%t", gone)
			return err
		}},
		through("a pod on the node's network", onTheNode, func(_ context.Context, f *clients.Forward, _ *container, s *seen) error {
			return errors.Join(echo(f.Address(echoPort), 1000, s), digested(f.Address(digestPort), 70_000, s))
		}, echoPort, digestPort),
		through("a port of such a pod where nobody listens", onTheNode, refused, nobodysPort),
	}
	return append(cases, testCase{name + ": a port that was not in the request", func(ctx context.Context, n *node, s *seen) error {
		p, _, err := n.ports(ctx, "ports")
		if err != nil {
			return err
		}
		url, err := p.forward(ctx, digestPort)
		if err != nil {
			return err
		}
		f, err := clients.StartForward(ctx, url, tunnel, echoPort)
		if err != nil {
			s.note("not forwarded", "%v", err)
			return nil
		}
		// Whether the client sees an end or a reset is a matter of moments.
		back, _ := echoed(f.Address(echoPort), 1000)
		s.note("bytes", "%s", back.of(1000))
		f.Stop()
		return nil
	}})
}

// forward asks for the URL.
func (p *pod) forward(ctx context.Context, ports ...int) (string, error) {
	request := &runtime.PortForwardRequest{PodSandboxId: p.id}
	for _, port := range ports {
		request.Port = append(request.Port, int32(port))
	}
	answer, err := p.node.runtime.PortForward(ctx, request)
	if err != nil {
		return "", err
	}
	return answer.Url, nil
}

func dial(address string) (*net.TCPConn, error) {
	connection, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	connection.SetDeadline(time.Now().Add(patience + time.Duration(*volume>>20)*time.Second/4))
	return connection.(*net.TCPConn), nil
}

// echoed sends bytes, ends its side, and sums what comes back.
func echoed(address string, count int64) (*sum, error) {
	connection, err := dial(address)
	if err != nil {
		return newSum(), err
	}
	defer connection.Close()
	go func() {
		io.CopyN(connection, pattern.New(), count)
		connection.CloseWrite()
	}()
	back := newSum()
	_, err = io.Copy(back, connection)
	return back, err
}

func echo(address string, count int64, s *seen) error {
	back, err := echoed(address, count)
	s.note("bytes", "%s", back.of(count))
	return err
}

// digested sends bytes to a server that answers with their sum when they have ended.
func digested(address string, count int64, s *seen) error {
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	if _, err := io.CopyN(connection, pattern.New(), count); err != nil {
		return err
	}
	if err := connection.CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(connection)
	s.note("right", "%t", string(answer) == fmt.Sprintf("%d %08x", count, pattern.Sum(count)))
	return err
}

// refused looks at a connection to nobody, after which the client gives its session up by itself.
func refused(ctx context.Context, f *clients.Forward, _ *container, s *seen) error {
	complaints.Lock()
	complaints.texts = nil
	complaints.Unlock()
	connection, err := dial(f.Address(nobodysPort))
	if err != nil {
		return err
	}
	defer connection.Close()
	back, _ := io.ReadAll(connection)
	s.text("bytes", string(back))
	err = until(ctx, "what the client says", func() (bool, error) {
		complaints.Lock()
		defer complaints.Unlock()
		return len(complaints.texts) > 0, nil
	})
	if err != nil {
		return err
	}
	complaints.Lock()
	// The local port before it is another one each time.
	_, text, _ := strings.Cut(complaints.texts[0], ": ")
	complaints.Unlock()
	s.note("error", "%s", text)
	return until(ctx, "the end of the session", func() (bool, error) { return f.Lost(), nil })
}

// knock makes connections to the silent server, which tells of each in the container's log.
func knock(ctx context.Context, f *clients.Forward, c *container, count int) ([]*net.TCPConn, error) {
	come, _, err := c.heard()
	if err != nil {
		return nil, err
	}
	all := make([]*net.TCPConn, count)
	for place := range all {
		if all[place], err = dial(f.Address(silentPort)); err != nil {
			return nil, err
		}
	}
	return all, until(ctx, fmt.Sprintf("%d connections in the pod", count), func() (bool, error) {
		now, _, err := c.heard()
		return now == come+count, err
	})
}

// silence is whether every connection of the silent server has ended.
func (c *container) silence() (bool, error) {
	come, gone, err := c.heard()
	return come == gone, err
}

// heard counts the connections of the silent server and those of them that have ended.
func (c *container) heard() (come, gone int, err error) {
	text, err := os.ReadFile(c.log)
	return strings.Count(string(text), "a connection comes"), strings.Count(string(text), "a connection ends"), err
}
