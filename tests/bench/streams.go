package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"a3s-box-cri/tests/streaming/clients"
)

const (
	// How much the throughput rows carry.
	carriedMiB = 32
	keystrokes = 200
	// Of a session's first keys some pass where nothing has passed before.
	firstKeys = 20
	port      = 8000
)

// streams is what a client with streams waits for.
func (c *client) streams(ctx context.Context, sandbox, container string, rows sample) error {
	if err := c.echo(ctx, container, rows); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	if err := c.flood(ctx, container, rows); err != nil {
		return fmt.Errorf("exec stdout: %w", err)
	}
	if err := c.forward(ctx, sandbox, container, rows); err != nil {
		return fmt.Errorf("port-forward: %w", err)
	}
	return nil
}

func (c *client) exec(ctx context.Context, container string, command []string, options remotecommand.StreamOptions) error {
	answer, err := c.runtime.Exec(ctx, &runtime.ExecRequest{
		ContainerId: container, Cmd: command, Tty: options.Tty, Stdin: options.Stdin != nil, Stdout: options.Stdout != nil,
	})
	if err != nil {
		return err
	}
	return clients.Dialects[0].Stream(ctx, answer.Url, options)
}

// echo types on a terminal and waits for each key to show.
func (c *client) echo(ctx context.Context, container string, rows sample) error {
	stdin, keys := io.Pipe()
	screen, shown := io.Pipe()
	ended := make(chan error, 1)
	begin := time.Now()
	go func() {
		err := c.exec(ctx, container, []string{"sh", "-c", "printf r; read line"},
			remotecommand.StreamOptions{Stdin: stdin, Stdout: shown, Tty: true})
		shown.CloseWithError(errors.Join(err, io.EOF))
		ended <- err
	}()
	one := make([]byte, 1)
	if _, err := io.ReadFull(screen, one); err != nil {
		return err
	}
	rows.since("Exec with a terminal, to its first byte", begin)
	for number := range keystrokes {
		row := "a key's echo, Exec with a terminal"
		if number < firstKeys {
			row = fmt.Sprintf("a key's echo, the first %d of a new pod", firstKeys)
		}
		step := time.Now()
		if _, err := keys.Write([]byte("k")); err != nil {
			return err
		}
		if _, err := io.ReadFull(screen, one); err != nil {
			return err
		}
		rows.since(row, step)
	}
	go io.Copy(io.Discard, screen)
	if _, err := keys.Write([]byte("\n")); err != nil {
		return err
	}
	return <-ended
}

func (c *client) flood(ctx context.Context, container string, rows sample) error {
	var count counter
	begin := time.Now()
	command := []string{"dd", "if=/dev/zero", "bs=64k", fmt.Sprintf("count=%d", carriedMiB*16)}
	if err := c.exec(ctx, container, command, remotecommand.StreamOptions{Stdout: &count}); err != nil {
		return err
	}
	rows.since(fmt.Sprintf("%d MiB out of Exec", carriedMiB), begin)
	return count.check()
}

func (c *client) forward(ctx context.Context, sandbox, container string, rows sample) error {
	script := fmt.Sprintf("nc -l -p %d -e dd if=/dev/zero bs=64k count=%d >/dev/null 2>&1 </dev/null & "+
		"while ! netstat -tln | grep -q :%d; do usleep 10000; done", port, carriedMiB*16, port)
	listening, err := c.runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "-c", script}, Timeout: 30})
	if err != nil || listening.ExitCode != 0 {
		return fmt.Errorf("listen: %v %v", listening, err)
	}
	answer, err := c.runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: sandbox, Port: []int32{port}})
	if err != nil {
		return err
	}
	forward, err := clients.StartForward(ctx, answer.Url, false, port)
	if err != nil {
		return err
	}
	begin := time.Now()
	connection, err := net.Dial("tcp", forward.Address(port))
	if err != nil {
		return err
	}
	defer connection.Close()
	var count counter
	if _, err := io.Copy(&count, connection); err != nil {
		return err
	}
	rows.since(fmt.Sprintf("%d MiB through a port-forward", carriedMiB), begin)
	return errors.Join(count.check(), forward.Stop())
}

// counter takes bytes and counts them.
type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func (c *counter) check() error {
	if *c != carriedMiB<<20 {
		return fmt.Errorf("%d bytes came, not %d", *c, carriedMiB<<20)
	}
	return nil
}
