package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"a3s-box-cri/tests/streaming/clients"
	"a3s-box-cri/tests/streaming/pattern"
)

// flowCases are about many bytes, many sessions, clients that are slow and clients that are gone.
func flowCases(d clients.Dialect) []testCase {
	in := func(name string, run func(context.Context, *container, *seen) error) testCase {
		return testCase{d.Name + ": " + name, func(ctx context.Context, n *node, s *seen) error {
			c, err := n.shell(ctx)
			if err != nil {
				return err
			}
			return run(ctx, c, s)
		}}
	}
	cases := []testCase{
		in("many bytes out", func(ctx context.Context, c *container, s *seen) error {
			sum := newSum()
			e := exec{command: []string{"/probe", "flood", strconv.FormatInt(*volume, 10)}}
			e.options.Stdout = sum
			err, end := c.exec(ctx, d, e)
			s.note("bytes", "%s", sum.of(*volume))
			s.end(end)
			return err
		}),
		in("every exit code", func(ctx context.Context, c *container, s *seen) error {
			all := make([]int, 256)
			for code := range all {
				all[code] = code
			}
			return exitCodes(ctx, c.pod.node, s, d, all)
		}),
		in("100 sessions at once", func(ctx context.Context, c *container, s *seen) error {
			return together(ctx, c.pod.node, s, d, 100)
		}),
		in("a client that reads nothing", func(ctx context.Context, c *container, s *seen) error {
			return unread(ctx, c, s, d)
		}),
		in("a process that reads nothing", func(ctx context.Context, c *container, s *seen) error {
			return unfed(ctx, c, s, d)
		}),
		in("a slow reader misses nothing", func(ctx context.Context, c *container, s *seen) error {
			sum := newSum()
			e := exec{command: []string{"/probe", "flood", "4000000"}}
			e.options.Stdout = &slow{sum}
			err, end := c.exec(ctx, d, e)
			s.note("bytes", "%s", sum.of(4_000_000))
			s.end(end)
			return err
		}),
		in("the process of a client that vanishes", func(ctx context.Context, c *container, s *seen) error {
			return vanish(ctx, c, s, d, "sleep 778; :", nil)
		}),
		in("the reader of a client that vanishes", func(ctx context.Context, c *container, s *seen) error {
			return vanish(ctx, c, s, d, "cat; sleep 778; :", silence{})
		}),
		in("the writer of a client that vanishes", func(ctx context.Context, c *container, s *seen) error {
			return vanish(ctx, c, s, d, "while [ ! -e /tmp/vanished ]; do echo line; sleep 0.1; done; echo line; sleep 778; :", nil)
		}),
	}
	if !d.HalfClose {
		return cases
	}
	return append(cases,
		in("many bytes in", func(ctx context.Context, c *container, s *seen) error {
			var stdout bytes.Buffer
			e := exec{command: []string{"/probe", "digest"}}
			e.options.Stdin, e.options.Stdout = io.LimitReader(pattern.New(), *volume), &stdout
			err, end := c.exec(ctx, d, e)
			s.note("right", "%t", stdout.String() == fmt.Sprintf("%d %08x", *volume, pattern.Sum(*volume)))
			s.end(end)
			return err
		}),
		in("many bytes both ways", func(ctx context.Context, c *container, s *seen) error {
			sum := newSum()
			e := exec{command: []string{"cat"}}
			e.options.Stdin, e.options.Stdout = io.LimitReader(pattern.New(), *volume/4), sum
			err, end := c.exec(ctx, d, e)
			s.note("bytes", "%s", sum.of(*volume/4))
			s.end(end)
			return err
		}),
	)
}

// sum counts and sums what is written to it.
type sum struct {
	count int64
	crc   uint32
}

func newSum() *sum { return &sum{} }

func (s *sum) Write(p []byte) (int, error) {
	s.count += int64(len(p))
	s.crc = crc32.Update(s.crc, pattern.Table, p)
	return len(p), nil
}

// of tells whether all bytes have come, and only they, in their order.
func (s *sum) of(count int64) string {
	switch {
	case s.crc != pattern.Sum(s.count):
		return "others than were sent"
	case s.count != count:
		return "not as many as were sent"
	default:
		return "all, in order"
	}
}

// silence is a stdin on which nothing comes.
type silence struct{}

func (silence) Read([]byte) (int, error) { select {} }

// slow takes its time for every write.
type slow struct{ to io.Writer }

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return s.to.Write(p)
}

// gated is a client that reads nothing until it is let go.
type gated struct {
	open chan struct{}
	to   io.Writer
}

func (g *gated) Write(p []byte) (int, error) {
	<-g.open
	return g.to.Write(p)
}

// A session may hold so much of what its client does not read. It is what sockets, pipes and buffers are
// between a process and its client, not what the process could write.
const mostHeld = 32 << 20

// unread looks at the writer, other sessions and the log while a client does not read.
func unread(ctx context.Context, c *container, s *seen, d clients.Dialect) error {
	logger, err := c.pod.run(ctx, []string{"sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done"})
	if err != nil {
		return err
	}
	short, vanish := context.WithCancel(ctx)
	defer vanish()
	gate := &gated{make(chan struct{}), io.Discard}
	ended := make(chan error, 1)
	url, err := c.url(ctx, exec{[]string{"/probe", "pressure", "/tmp/taken"}, remotecommand.StreamOptions{Stdout: gate}})
	if err != nil {
		return err
	}
	go func() { ended <- d.Stream(short, url, remotecommand.StreamOptions{Stdout: gate}) }()
	taken, err := stops(ctx, c)
	if err != nil {
		return err
	}
	s.note("the writer stops", "%t", taken > 0)
	s.note("bytes taken are bounded", "%t", taken <= mostHeld)
	for _, other := range []*container{c, logger} {
		var stdout bytes.Buffer
		e := script("echo another session")
		e.options.Stdout = &stdout
		err, end := other.exec(ctx, d, e)
		if err != nil {
			return err
		}
		s.text("another session", stdout.String())
		s.ended("its end", end)
	}
	before, err := os.ReadFile(logger.log)
	if err != nil {
		return err
	}
	goes, err := within(ctx, func() (bool, error) {
		now, err := os.ReadFile(logger.log)
		return len(now) > len(before), err
	})
	s.note("the log goes on", "%t", goes)
	close(gate.open)
	again, later := within(ctx, func() (bool, error) {
		now, err := count(ctx, c)
		return now > taken, err
	})
	s.note("the writer goes on when the client reads", "%t", again)
	vanish()
	<-ended
	_, killed := c.sync(ctx, "pkill -fx '/probe pressure /tmp/taken'; rm -f /tmp/taken")
	_, stopped := c.pod.node.runtime.StopContainer(ctx, stop(logger.id))
	return errors.Join(err, later, killed, stopped)
}

func count(ctx context.Context, c *container) (int64, error) {
	text, err := c.sync(ctx, "cat /tmp/taken 2>/dev/null || echo 0")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(text, "\n")
	return strconv.ParseInt(first, 10, 64)
}

// stops waits until the writer's count stays the same and tells it; 0 when it does not stop.
func stops(ctx context.Context, c *container) (int64, error) {
	for last, same := int64(0), 0; ctx.Err() == nil; time.Sleep(300 * time.Millisecond) {
		now, err := count(ctx, c)
		if err != nil {
			return 0, err
		}
		if now != last || now == 0 {
			last, same = now, 0
			if now > 16*mostHeld {
				return 0, nil
			}
			continue
		}
		if same++; same == 5 {
			return now, nil
		}
	}
	return 0, ctx.Err()
}

// counted is an endless stdin that counts what was taken of it.
type counted struct{ taken atomic.Int64 }

func (c *counted) Read(p []byte) (int, error) {
	c.taken.Add(int64(len(p)))
	return len(p), nil
}

// unfed looks at a client and at other sessions while a process does not read.
func unfed(ctx context.Context, c *container, s *seen, d clients.Dialect) error {
	short, vanish := context.WithCancel(ctx)
	defer vanish()
	stdin, begun, ended := &counted{}, make(chan struct{}, 1), make(chan error, 1)
	e := script("echo begun; exec sleep 786")
	e.options.Stdin, e.options.Stdout = stdin, notice{begun}
	url, err := c.url(ctx, e)
	if err != nil {
		return err
	}
	go func() { ended <- d.Stream(short, url, e.options) }()
	<-begun
	last, same := int64(0), 0
	for ; same < 5 && last < 16*mostHeld; time.Sleep(300 * time.Millisecond) {
		now := stdin.taken.Load()
		if now == last {
			same++
		} else {
			last, same = now, 0
		}
	}
	s.note("the client has to wait", "%t", same == 5)
	s.note("bytes taken are bounded", "%t", last <= mostHeld)
	var stdout bytes.Buffer
	other := script("cat")
	other.options.Stdin, other.options.Stdout = io.LimitReader(pattern.New(), 100_000), &stdout
	if !d.HalfClose {
		other = script("yes | head -c 100000")
		other.options.Stdout = &stdout
	}
	err, end := c.exec(ctx, d, other)
	s.note("another session", "%d bytes", stdout.Len())
	s.ended("its end", end)
	vanish()
	<-ended
	_, killed := c.sync(ctx, "pkill -fx 'sleep 786'; :")
	return errors.Join(err, killed)
}

// vanish looks at what becomes of a process whose client's connection breaks, and whether the process
// finds its stdin ended.
func vanish(ctx context.Context, c *container, s *seen, d clients.Dialect, text string, stdin io.Reader) error {
	short, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := make(chan struct{}, 1)
	e := script("echo begun; " + text)
	e.options.Stdin, e.options.Stdout = stdin, notice{begun}
	ended := make(chan error, 1)
	url, err := c.url(ctx, e)
	if err != nil {
		return err
	}
	go func() { ended <- d.Stream(short, url, e.options) }()
	select {
	case <-begun:
	case err := <-ended:
		return fmt.Errorf("ended at once: %v", err)
	}
	cancel()
	<-ended
	if _, err := c.sync(ctx, "touch /tmp/vanished"); err != nil {
		return err
	}
	defer c.sync(ctx, "rm -f /tmp/vanished")
	running, err := within(ctx, func() (bool, error) { return c.runs(ctx, "sleep 778") })
	s.note("it gets on", "%t", running)
	return errors.Join(err, fate(ctx, c, s, "sleep 778"))
}

// notice tells of a first write.
type notice struct{ come chan struct{} }

func (n notice) Write(p []byte) (int, error) {
	select {
	case n.come <- struct{}{}:
	default:
	}
	return len(p), nil
}
