// Calls UpdatePodSandboxResources, which crictl does not.
//
//	resize ENDPOINT POD MEMORY_BYTES CPU_QUOTA
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := resize(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func resize(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("usage: resize ENDPOINT POD MEMORY_BYTES CPU_QUOTA")
	}
	memory, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return err
	}
	quota, err := strconv.ParseInt(args[3], 10, 64)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(args[0], grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, err = cri.NewRuntimeServiceClient(connection).UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: args[1],
		Overhead:     &cri.LinuxContainerResources{},
		Resources: &cri.LinuxContainerResources{
			MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: 100000,
			// kubelet names every page size of the node.
			HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}},
		},
	})
	return err
}
