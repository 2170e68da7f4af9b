package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/client-go/tools/remotecommand"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"a3s-box-cri/tests/streaming/clients"
)

// As large as both outputs of ExecSync.
const largestAnswer = 64 << 20

// node is the server and the pods on it, made when they are first asked for.
type node struct {
	runtime runtime.RuntimeServiceClient
	folder  string
	pods    map[string]*pod
	idle    *container
}

type pod struct {
	node   *node
	id     string
	config *runtime.PodSandboxConfig
	count  int
	// The container that has the pod's ports.
	serving *container
}

type container struct {
	pod *pod
	id  string
	log string
}

func connect() (*node, error) {
	connection, err := grpc.NewClient(*endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestAnswer)))
	if err != nil {
		return nil, err
	}
	images := runtime.NewImageServiceClient(connection)
	pull := &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: *image}}
	if _, err := images.PullImage(context.Background(), pull); err != nil {
		return nil, err
	}
	folder, err := os.MkdirTemp("", "streaming-conformance-")
	return &node{runtime: runtime.NewRuntimeServiceClient(connection), folder: folder, pods: map[string]*pod{}}, err
}

// pod is the one of this name; on the node's network it is one that shares the node's kernel everywhere.
func (n *node) pod(ctx context.Context, name string) (*pod, error) {
	if known := n.pods[name]; known != nil {
		return known, nil
	}
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name, Namespace: "streaming"},
		LogDirectory: filepath.Join(n.folder, name),
		Linux:        &runtime.LinuxPodSandboxConfig{SecurityContext: security(name)},
	}
	made, err := n.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, err
	}
	n.pods[name] = &pod{node: n, id: made.PodSandboxId, config: config}
	return n.pods[name], nil
}

const onTheNode = "on-the-node"

func security(pod string) *runtime.LinuxSandboxSecurityContext {
	// In a PID namespace of its own, so that process 1 is the container's.
	options := &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}
	if pod == onTheNode {
		options.Network = runtime.NamespaceMode_NODE
	}
	return &runtime.LinuxSandboxSecurityContext{NamespaceOptions: options}
}

// change is what a case wants of its container.
type change func(*runtime.ContainerConfig)

func withStdin(c *runtime.ContainerConfig) { c.Stdin = true }
func onceOnly(c *runtime.ContainerConfig)  { c.Stdin, c.StdinOnce = true, true }
func withTerminal(c *runtime.ContainerConfig) {
	c.Stdin, c.Tty = true, true
}

// create makes a container that is not started.
func (p *pod) create(ctx context.Context, command []string, changes ...change) (*container, error) {
	p.count++
	name := fmt.Sprintf("c%d", p.count)
	context := &runtime.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions}
	config := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name},
		Image:    &runtime.ImageSpec{Image: *image},
		Command:  command,
		LogPath:  name + ".log",
		Mounts:   []*runtime.Mount{{HostPath: filepath.Dir(*probe), ContainerPath: "/probes", Readonly: true}},
		Linux:    &runtime.LinuxContainerConfig{SecurityContext: context},
	}
	for _, change := range changes {
		change(config)
	}
	made, err := p.node.runtime.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId: p.id, Config: config, SandboxConfig: p.config,
	})
	if err != nil {
		return nil, err
	}
	return &container{pod: p, id: made.ContainerId, log: filepath.Join(p.config.LogDirectory, config.LogPath)}, nil
}

// run makes and starts one.
func (p *pod) run(ctx context.Context, command []string, changes ...change) (*container, error) {
	c, err := p.create(ctx, command, changes...)
	if err != nil {
		return nil, err
	}
	_, err = p.node.runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	return c, err
}

const idleScript = `trap 'exit 0' TERM; cp /probes/PROBE /probe; echo ready; while :; do sleep 1000 & wait $!; done`

// shell is the container that most execs are in. It takes in what they leave behind.
func (n *node) shell(ctx context.Context) (*container, error) {
	if n.idle != nil {
		return n.idle, nil
	}
	p, err := n.pod(ctx, "shell")
	if err != nil {
		return nil, err
	}
	n.idle, err = p.idle(ctx)
	return n.idle, err
}

func (p *pod) idle(ctx context.Context) (*container, error) {
	script := strings.ReplaceAll(idleScript, "PROBE", filepath.Base(*probe))
	c, err := p.run(ctx, []string{"sh", "-c", script})
	if err != nil {
		return nil, err
	}
	return c, c.logs(ctx, "ready")
}

// logs waits for a word in the container's log.
func (c *container) logs(ctx context.Context, word string) error {
	return until(ctx, fmt.Sprintf("%q in the log", word), func() (bool, error) {
		text, err := os.ReadFile(c.log)
		return strings.Contains(string(text), word), err
	})
}

// until waits for an event.
func until(ctx context.Context, what string, come func() (bool, error)) error {
	for {
		done, err := come()
		if err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("did not come: %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// within is whether an event comes before a server has had more than enough time for it.
func within(ctx context.Context, come func() (bool, error)) (bool, error) {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := until(short, "", come)
	if short.Err() != nil && ctx.Err() == nil {
		return false, nil
	}
	return err == nil, err
}

// sync runs a script in the container beside the streams that are tested.
func (c *container) sync(ctx context.Context, script string) (string, error) {
	answer, err := c.pod.node.runtime.ExecSync(ctx, &runtime.ExecSyncRequest{
		ContainerId: c.id, Cmd: []string{"sh", "-c", script}, Timeout: 60,
	})
	if err != nil {
		return "", err
	}
	return string(answer.Stdout), nil
}

// runs is whether a process with this command line is in the container.
func (c *container) runs(ctx context.Context, command string) (bool, error) {
	found, err := c.sync(ctx, fmt.Sprintf("pgrep -fx '%s' >/dev/null && echo yes || echo no", command))
	return found == "yes\n", err
}

// exec is a command's request and its client's options.
type exec struct {
	command []string
	options remotecommand.StreamOptions
}

func script(text string) exec { return exec{command: []string{"sh", "-c", text}} }

// url asks for the streams that the options have.
func (c *container) url(ctx context.Context, e exec) (string, error) {
	answer, err := c.pod.node.runtime.Exec(ctx, &runtime.ExecRequest{
		ContainerId: c.id, Cmd: e.command, Tty: e.options.Tty,
		Stdin: e.options.Stdin != nil, Stdout: e.options.Stdout != nil, Stderr: e.options.Stderr != nil,
	})
	if err != nil {
		return "", err
	}
	return answer.Url, nil
}

// exec runs a command to its end. The first error is the test's, the second the session's.
func (c *container) exec(ctx context.Context, d clients.Dialect, e exec) (err, end error) {
	url, err := c.url(ctx, e)
	if err != nil {
		return err, nil
	}
	return nil, d.Stream(ctx, url, e.options)
}

// A session of a moment that has not ended by now never will.
const hang = 30 * time.Second

// both runs a command with both outputs and notes them and the end.
func (c *container) both(ctx context.Context, d clients.Dialect, s *seen, e exec) error {
	var stdout, stderr bytes.Buffer
	e.options.Stdout, e.options.Stderr = &stdout, &stderr
	if e.options.Tty {
		e.options.Stderr = nil
	}
	short, cancel := context.WithTimeout(ctx, hang)
	defer cancel()
	err, end := c.exec(short, d, e)
	s.text("stdout", stdout.String())
	if !e.options.Tty {
		s.text("stderr", stderr.String())
	}
	s.end(end)
	return err
}

func (c *container) attach(ctx context.Context, d clients.Dialect, options remotecommand.StreamOptions) (err, end error) {
	answer, err := c.pod.node.runtime.Attach(ctx, &runtime.AttachRequest{
		ContainerId: c.id, Tty: options.Tty,
		Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil,
	})
	if err != nil {
		return err, nil
	}
	return nil, d.Stream(ctx, answer.Url, options)
}

// hide makes what differs from run to run the same.
func (n *node) hide() *strings.Replacer {
	var pairs []string
	for name, pod := range n.pods {
		pairs = append(pairs, pod.id, "POD-"+name)
	}
	return strings.NewReplacer(pairs...)
}

// restart ends the server and waits for the next one.
func (n *node) restart(ctx context.Context) error {
	if *restart == "" {
		return errors.New("no -restart was given")
	}
	if output, err := osexec.CommandContext(ctx, *restart).CombinedOutput(); err != nil {
		return fmt.Errorf("restart: %w: %s", err, output)
	}
	return until(ctx, "the next server", func() (bool, error) {
		_, err := n.runtime.Version(ctx, &runtime.VersionRequest{})
		return err == nil, nil
	})
}

// clean removes what was made.
func (n *node) clean() error {
	ctx := context.Background()
	for _, pod := range n.pods {
		if _, err := n.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod.id}); err != nil {
			return err
		}
		if _, err := n.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod.id}); err != nil {
			return err
		}
	}
	return os.RemoveAll(n.folder)
}
