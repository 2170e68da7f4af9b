// Bench measures what a CRI server takes for the steps of a pod's life, over its own socket, and prints
// the milliseconds of every repetition as JSON. It knows nothing of the server behind the socket.
//
//	bench -endpoint unix:///run/x.sock -image registry.k8s.io/e2e-test-images/busybox:1.29-2 -n 20
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	endpoint = flag.String("endpoint", "", "the server's socket, unix:///PATH")
	image    = flag.String("image", "", "an image with sh, echo and sleep")
	n        = flag.Int("n", 20, "repetitions")
	atOnce   = flag.Int("at-once", 10, "pods of the concurrent row")
	dense    = flag.Int("dense", 10, "pods of the memory row")
	pause    = flag.Duration("pause", 0, "before each repetition, as if nobody asked for a pod for so long")
	hold     = flag.String("hold", "", "with the memory row's pods up, write their ids here and wait until the file is gone")
)

// sample is the milliseconds of each repetition, by row.
type sample map[string][]float64

type client struct {
	runtime runtime.RuntimeServiceClient
	images  runtime.ImageServiceClient
	logs    string
	count   int
}

func main() {
	flag.Parse()
	connection, err := grpc.NewClient(*endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	logs, err := os.MkdirTemp("", "bench-logs-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(logs)
	c := &client{
		runtime: runtime.NewRuntimeServiceClient(connection),
		images:  runtime.NewImageServiceClient(connection),
		logs:    logs,
	}
	ctx := context.Background()
	if _, err := c.images.PullImage(ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: *image}}); err != nil {
		log.Fatal(err)
	}
	rows := sample{}
	// The first one is not counted: it fills caches that every node has filled.
	for i := 0; i <= *n; i++ {
		into := rows
		if i == 0 {
			into = sample{}
		}
		time.Sleep(*pause)
		if err := c.life(ctx, into); err != nil {
			log.Fatal(err)
		}
	}
	for i := 0; i < 3; i++ {
		if err := c.together(ctx, rows); err != nil {
			log.Fatal(err)
		}
	}
	if *hold != "" {
		if err := c.dense(ctx); err != nil {
			log.Fatal(err)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(rows); err != nil {
		log.Fatal(err)
	}
}

func (s sample) since(row string, start time.Time) {
	s[row] = append(s[row], float64(time.Since(start).Microseconds())/1000)
}

func (c *client) pod() *runtime.PodSandboxConfig {
	c.count++
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), c.count)
	return &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		LogDirectory: filepath.Join(c.logs, name),
		Linux:        &runtime.LinuxPodSandboxConfig{},
	}
}

func (c *client) container(script string) *runtime.ContainerConfig {
	return &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "c"},
		Image:    &runtime.ImageSpec{Image: *image},
		Command:  []string{"sh", "-c", script},
		LogPath:  "c.log",
		Linux:    &runtime.LinuxContainerConfig{},
	}
}

// start makes the container and starts it.
func (c *client) start(ctx context.Context, sandbox string, config *runtime.PodSandboxConfig, script string) (string, error) {
	made, err := c.runtime.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId: sandbox, Config: c.container(script), SandboxConfig: config,
	})
	if err != nil {
		return "", err
	}
	_, err = c.runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: made.ContainerId})
	return made.ContainerId, err
}

// life is one pod from its beginning to its end.
func (c *client) life(ctx context.Context, rows sample) error {
	config := c.pod()
	begin := time.Now()
	sandbox, err := c.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		return err
	}
	rows.since("RunPodSandbox", begin)
	id := sandbox.PodSandboxId
	step := time.Now()
	container, err := c.start(ctx, id, config, "echo ready; exec sleep 1000")
	if err != nil {
		return err
	}
	rows.since("CreateContainer + StartContainer", step)
	if err := c.firstLine(filepath.Join(config.LogDirectory, "c.log")); err != nil {
		return err
	}
	rows.since("RunPodSandbox to first log line", begin)
	for i := 0; i < 3; i++ {
		step = time.Now()
		answer, err := c.runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: container, Cmd: []string{"true"}, Timeout: 30})
		if err != nil || answer.ExitCode != 0 {
			return fmt.Errorf("exec: %v %v", answer, err)
		}
		rows.since("ExecSync(true)", step)
	}
	if err := c.streams(ctx, id, container, rows); err != nil {
		return err
	}
	step = time.Now()
	if _, err := c.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	rows.since("StopPodSandbox", step)
	step = time.Now()
	if _, err := c.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	rows.since("RemovePodSandbox", step)
	return nil
}

func (c *client) firstLine(path string) error {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), "ready") {
			return nil
		}
	}
	return fmt.Errorf("no line in %s within a minute", path)
}

// together starts pods at once, each with its first log line.
func (c *client) together(ctx context.Context, rows sample) error {
	configs := make([]*runtime.PodSandboxConfig, *atOnce)
	for i := range configs {
		configs[i] = c.pod()
	}
	ids := make([]string, *atOnce)
	errs := make([]error, *atOnce)
	var group sync.WaitGroup
	begin := time.Now()
	for i, config := range configs {
		group.Go(func() {
			sandbox, err := c.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
			if err != nil {
				errs[i] = err
				return
			}
			ids[i] = sandbox.PodSandboxId
			if _, err := c.start(ctx, ids[i], config, "echo ready; exec sleep 1000"); err != nil {
				errs[i] = err
				return
			}
			errs[i] = c.firstLine(filepath.Join(config.LogDirectory, "c.log"))
		})
	}
	group.Wait()
	rows.since(fmt.Sprintf("%d pods at once, to their first log lines", *atOnce), begin)
	for i, id := range ids {
		if errs[i] != nil {
			return errs[i]
		}
		if err := c.remove(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// dense holds pods for whoever measures their memory.
func (c *client) dense(ctx context.Context) error {
	var ids []string
	for i := 0; i < *dense; i++ {
		config := c.pod()
		sandbox, err := c.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
		if err != nil {
			return err
		}
		ids = append(ids, sandbox.PodSandboxId)
		if _, err := c.start(ctx, sandbox.PodSandboxId, config, "exec sleep 1000"); err != nil {
			return err
		}
	}
	if err := os.WriteFile(*hold, []byte(strings.Join(ids, "\n")), 0o600); err != nil {
		return err
	}
	for _, err := os.Stat(*hold); err == nil; _, err = os.Stat(*hold) {
		time.Sleep(50 * time.Millisecond)
	}
	for _, id := range ids {
		if err := c.remove(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) remove(ctx context.Context, id string) error {
	if _, err := c.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := c.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
