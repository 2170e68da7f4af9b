// Kubernetes' own clients against the streaming server.
//
//	go run ./streaming path/to/echo
//
// The argument is the crate's example `echo`; its backend knows a few words instead of programs. Prints
// one line of JSON for each case and fails when a case does.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"a3s-box-cri/tests/streaming/clients"

	"github.com/go-logr/logr"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/klog/v2"
)

const patience = 60 * time.Second

// server is the process under test: a line in, a URL out.
type server struct {
	lock  sync.Mutex
	stdin io.Writer
	lines *bufio.Scanner
}

func start(path string) (*server, func(), error) {
	process := exec.Command(path)
	process.Stderr = os.Stderr
	stdin, err := process.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	stdout, err := process.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := process.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() {
		stdin.Close()
		process.Wait()
	}
	return &server{stdin: stdin, lines: bufio.NewScanner(stdout)}, stop, nil
}

func (s *server) url(format string, words ...any) string {
	s.lock.Lock()
	defer s.lock.Unlock()
	fmt.Fprintf(s.stdin, format+"\n", words...)
	if !s.lines.Scan() {
		panic("the server is gone")
	}
	return s.lines.Text()
}

// dialect is one of the clients' protocols.
type dialect struct{ clients.Dialect }

// output runs a command without stdin.
func (d dialect) output(ctx context.Context, s *server, command string) (string, error) {
	var stdout bytes.Buffer
	err := d.Stream(ctx, s.url("exec i %s", command), remotecommand.StreamOptions{Stdout: &stdout})
	return stdout.String(), err
}

type testCase struct {
	name string
	run  func(context.Context, *server) error
}

func expect(got, want any) error {
	if got != want {
		return fmt.Errorf("got %v, want %v", got, want)
	}
	return nil
}

func pattern(count int) []byte {
	all := make([]byte, count)
	for place := range all {
		all[place] = byte(place*31) ^ byte(place>>8)
	}
	return all
}

// endless is a stdin that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// silence is a stdin on which nothing comes.
type silence struct{}

func (silence) Read([]byte) (int, error) { select {} }

// slow takes its time for every write.
type slow struct{ bytes.Buffer }

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return s.Buffer.Write(p)
}

// quiet waits until only the question itself is running.
func quiet(ctx context.Context, s *server) error {
	for {
		running, err := (dialect{clients.Dialects[0]}).output(ctx, s, "running")
		if err != nil || running == "1" {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s sessions are still running", running)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func commandCases(d dialect) []testCase {
	cases := []testCase{
		{"stdout and stderr apart and in order", func(ctx context.Context, s *server) error {
			var stdout, stderr, wantOut, wantErr bytes.Buffer
			const lines = 5000
			options := remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr}
			if err := d.Stream(ctx, s.url("exec io both %d", lines), options); err != nil {
				return err
			}
			for line := range lines {
				fmt.Fprintf(&wantOut, "out %d\n", line)
				fmt.Fprintf(&wantErr, "err %d\n", line)
			}
			return errors.Join(
				expect(stdout.String() == wantOut.String(), true),
				expect(stderr.String() == wantErr.String(), true))
		}},
		{"16 MiB out", func(ctx context.Context, s *server) error {
			var stdout bytes.Buffer
			options := remotecommand.StreamOptions{Stdout: &stdout}
			if err := d.Stream(ctx, s.url("exec i flood %d", 16<<20), options); err != nil {
				return err
			}
			return expect(bytes.Equal(stdout.Bytes(), pattern(16<<20)), true)
		}},
		{"a slow reader misses nothing", func(ctx context.Context, s *server) error {
			var stdout slow
			options := remotecommand.StreamOptions{Stdout: &stdout}
			if err := d.Stream(ctx, s.url("exec i flood %d", 4<<20), options); err != nil {
				return err
			}
			return expect(bytes.Equal(stdout.Bytes(), pattern(4<<20)), true)
		}},
		{"a client that vanishes ends its session", func(ctx context.Context, s *server) error {
			short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
			defer cancel()
			if _, err := d.output(short, s, "sleep"); err == nil {
				return errors.New("ended by itself")
			}
			return quiet(ctx, s)
		}},
		{"so does one whose stdin nobody takes", func(ctx context.Context, s *server) error {
			short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
			defer cancel()
			stdin := io.MultiReader(bytes.NewReader(pattern(1<<20)), silence{})
			options := remotecommand.StreamOptions{Stdin: stdin, Stdout: io.Discard}
			if err := d.Stream(short, s.url("exec ci sleep"), options); err == nil {
				return errors.New("ended by itself")
			}
			return quiet(ctx, s)
		}},
		{"a command that fails to start", func(ctx context.Context, s *server) error {
			_, err := d.output(ctx, s, "fail")
			if d.Protocol == "channel.k8s.io" {
				// Whether this version's client sees it depends on what it reads first.
				return nil
			}
			if err == nil {
				return errors.New("no error")
			}
			return expect(strings.Contains(err.Error(), "no such program"), true)
		}},
		{"20 sessions at once", func(ctx context.Context, s *server) error {
			var group sync.WaitGroup
			failures := make([]error, 20)
			for number := range failures {
				group.Go(func() {
					out, err := d.output(ctx, s, fmt.Sprintf("flood %d", 100_000+number))
					failures[number] = errors.Join(err, expect(out == string(pattern(100_000+number)), true))
				})
			}
			group.Wait()
			return errors.Join(failures...)
		}},
		{"a token works once", func(ctx context.Context, s *server) error {
			target := s.url("exec i exit 0")
			options := remotecommand.StreamOptions{Stdout: io.Discard}
			if err := d.Stream(ctx, target, options); err != nil {
				return err
			}
			return expect(d.Stream(ctx, target, options) != nil, true)
		}},
	}
	if d.HalfClose {
		cases = append(cases,
			testCase{"stdin comes back and its end is told", func(ctx context.Context, s *server) error {
				var stdout bytes.Buffer
				options := remotecommand.StreamOptions{Stdin: strings.NewReader("hello"), Stdout: &stdout}
				err := d.Stream(ctx, s.url("exec ci cat"), options)
				return errors.Join(err, expect(stdout.String(), "hello"))
			}},
			testCase{"16 MiB in", func(ctx context.Context, s *server) error {
				all := pattern(16 << 20)
				hash := fnv.New64a()
				hash.Write(all)
				var stdout bytes.Buffer
				options := remotecommand.StreamOptions{Stdin: bytes.NewReader(all), Stdout: &stdout}
				err := d.Stream(ctx, s.url("exec ci digest"), options)
				return errors.Join(err, expect(stdout.String(), fmt.Sprintf("%d %016x", len(all), hash.Sum64())))
			}},
			testCase{"8 MiB there and back", func(ctx context.Context, s *server) error {
				all := pattern(8 << 20)
				var stdout bytes.Buffer
				options := remotecommand.StreamOptions{Stdin: bytes.NewReader(all), Stdout: &stdout}
				err := d.Stream(ctx, s.url("exec ci cat"), options)
				return errors.Join(err, expect(bytes.Equal(stdout.Bytes(), all), true))
			}},
			testCase{"attach", func(ctx context.Context, s *server) error {
				var stdout bytes.Buffer
				options := remotecommand.StreamOptions{Stdin: strings.NewReader("hi"), Stdout: &stdout}
				err := d.Stream(ctx, s.url("attach ci"), options)
				return errors.Join(err, expect(stdout.String(), "hi"))
			}},
		)
	}
	if d.ExitCodes {
		cases = append(cases,
			testCase{"every exit code", func(ctx context.Context, s *server) error {
				for want := range 256 {
					_, err := d.output(ctx, s, fmt.Sprintf("exit %d", want))
					got, err := clients.ExitCode(err)
					if err := errors.Join(err, expect(got, want)); err != nil {
						return err
					}
				}
				return nil
			}},
			testCase{"the exit code arrives although stdin still flows", func(ctx context.Context, s *server) error {
				for range 30 {
					options := remotecommand.StreamOptions{Stdin: endless{}, Stdout: io.Discard}
					got, err := clients.ExitCode(d.Stream(ctx, s.url("exec ci exit 7"), options))
					if err := errors.Join(err, expect(got, 7)); err != nil {
						return err
					}
				}
				return nil
			}},
		)
	}
	if d.Resizes {
		cases = append(cases, testCase{"sizes from the first one on", func(ctx context.Context, s *server) error {
			queue := make(clients.Sizes)
			output, input := io.Pipe()
			go func() {
				defer close(queue)
				lines := bufio.NewScanner(output)
				for number := range uint16(20) {
					queue <- remotecommand.TerminalSize{Width: 80 + number, Height: 24}
					lines.Scan()
					if want := fmt.Sprintf("%dx24", 80+number); lines.Text() != want {
						output.CloseWithError(fmt.Errorf("got %q, want %q", lines.Text(), want))
						return
					}
				}
			}()
			options := remotecommand.StreamOptions{Stdout: input, Tty: true, TerminalSizeQueue: queue}
			return d.Stream(ctx, s.url("exec ti sizes 20"), options)
		}})
	}
	return cases
}

// echoed sends bytes, ends its side, and reads what comes back.
func echoed(address string, count int) error {
	connection, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	all := pattern(count)
	go func() {
		connection.Write(all)
		connection.(*net.TCPConn).CloseWrite()
	}()
	back, err := io.ReadAll(connection)
	return errors.Join(err, expect(bytes.Equal(back, all), true))
}

// The backend's port on which nobody listens.
const refusing = 1

func forwardCases(tunnel bool) []testCase {
	forwarded := func(port int, run func(context.Context, *server, string) error) func(context.Context, *server) error {
		return func(ctx context.Context, s *server) error {
			forward, err := clients.StartForward(ctx, s.url("forward %d", port), tunnel, port)
			if err != nil {
				return err
			}
			err = run(ctx, s, forward.Address(port))
			stopped := forward.Stop()
			// The client gives the whole session up when a port refuses.
			if port == refusing && errors.Is(stopped, portforward.ErrLostConnectionToPod) {
				stopped = nil
			}
			return errors.Join(err, stopped, quiet(ctx, s))
		}
	}
	return []testCase{
		{"one connection", forwarded(80, func(_ context.Context, _ *server, address string) error {
			return echoed(address, 5)
		})},
		{"8 MiB there and back", forwarded(80, func(_ context.Context, _ *server, address string) error {
			return echoed(address, 8<<20)
		})},
		{"one after the other", forwarded(80, func(_ context.Context, _ *server, address string) error {
			for range 300 {
				if err := echoed(address, 1000); err != nil {
					return err
				}
			}
			return nil
		})},
		{"100 at once", forwarded(80, func(_ context.Context, _ *server, address string) error {
			var group sync.WaitGroup
			failures := make([]error, 100)
			for number := range failures {
				group.Go(func() { failures[number] = echoed(address, 100_000+number) })
			}
			group.Wait()
			return errors.Join(failures...)
		})},
		{"a port that refuses", forwarded(refusing, func(_ context.Context, _ *server, address string) error {
			connection, err := net.Dial("tcp", address)
			if err != nil {
				return err
			}
			defer connection.Close()
			connection.SetDeadline(time.Now().Add(patience))
			back, err := io.ReadAll(connection)
			return errors.Join(err, expect(len(back), 0))
		})},
		{"a client that vanishes ends its connections", forwarded(2, func(_ context.Context, _ *server, address string) error {
			for range 10 {
				connection, err := net.Dial("tcp", address)
				if err != nil {
					return err
				}
				defer connection.Close()
				if _, err := connection.Write(pattern(1 << 20)[:1000]); err != nil {
					return err
				}
			}
			time.Sleep(300 * time.Millisecond)
			return nil
		})},
	}
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: client ECHO [ONLY]")
		os.Exit(64)
	}
	// What clients say of expected failures is of no interest.
	klog.SetLogger(logr.Discard())
	s, stop, err := start(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	failed := 0
	run := func(group string, cases []testCase) {
		for _, c := range cases {
			name := group + ": " + c.name
			if len(os.Args) > 2 && !strings.Contains(name, os.Args[2]) {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			begin := time.Now()
			err := c.run(ctx, s)
			cancel()
			result := map[string]any{"case": name, "ok": err == nil, "ms": time.Since(begin).Milliseconds()}
			if err != nil {
				failed++
				result["error"] = err.Error()
			}
			line, _ := json.Marshal(result)
			fmt.Println(string(line))
		}
	}
	for _, d := range clients.Dialects {
		run(d.Name, commandCases(dialect{d}))
	}
	run("forward-spdy", forwardCases(false))
	run("forward-tunnel", forwardCases(true))
	stop()
	if failed > 0 {
		fmt.Fprintf(os.Stderr, "%d cases failed\n", failed)
		os.Exit(1)
	}
}
