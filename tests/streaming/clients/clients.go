// Package clients is Kubernetes' own clients of exec, attach and port-forward, by protocol version.
package clients

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	clientexec "k8s.io/client-go/util/exec"
)

// Dialect is a transport and a protocol version.
type Dialect struct {
	Name      string
	Protocol  string
	WebSocket bool
	// The end of stdin can be told.
	HalfClose bool
	ExitCodes bool
	Resizes   bool
}

// Dialects are all that client-go speaks.
var Dialects = []Dialect{
	{"spdy-v4", "v4.channel.k8s.io", false, true, true, true},
	{"spdy-v3", "v3.channel.k8s.io", false, true, false, true},
	{"spdy-v2", "v2.channel.k8s.io", false, true, false, false},
	{"spdy-v1", "channel.k8s.io", false, false, false, false},
	{"websocket-v5", "v5.channel.k8s.io", true, true, true, true},
	{"websocket-v4", "v4.channel.k8s.io", true, false, true, true},
}

func (d Dialect) executor(target string) (remotecommand.Executor, error) {
	if d.WebSocket {
		return remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{}, "GET", target, d.Protocol)
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return nil, err
	}
	parsed, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, "POST", parsed, d.Protocol)
}

// Stream carries the streams of an exec or attach to its end, or to the context's: client-go itself
// waits longer when a server does not read.
func (d Dialect) Stream(ctx context.Context, target string, options remotecommand.StreamOptions) error {
	executor, err := d.executor(target)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- executor.StreamWithContext(ctx, options) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(farewell):
		return ctx.Err()
	}
}

// Longest that a client may take to go.
const farewell = 2 * time.Second

// ExitCode is the command's, or an error that is none.
func ExitCode(err error) (int, error) {
	var exit clientexec.CodeExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		return exit.Code, nil
	default:
		return 0, err
	}
}

// Forward is a port-forward under way.
type Forward struct {
	stop  chan struct{}
	ended chan error
	ports map[uint16]uint16
}

// StartForward forwards free local ports to these, over SPDY or tunnelled in a WebSocket.
func StartForward(ctx context.Context, target string, tunnel bool, ports ...int) (*Forward, error) {
	dialer, err := dialer(target, tunnel)
	if err != nil {
		return nil, err
	}
	wanted := make([]string, len(ports))
	for place, port := range ports {
		wanted[place] = fmt.Sprintf("0:%d", port)
	}
	f := &Forward{stop: make(chan struct{}), ended: make(chan error, 1), ports: map[uint16]uint16{}}
	ready := make(chan struct{})
	forward, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, wanted, f.stop, ready, nil, nil)
	if err != nil {
		return nil, err
	}
	go func() { f.ended <- forward.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-f.ended:
		return nil, fmt.Errorf("not ready: %w", err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	forwarded, err := forward.GetPorts()
	for _, one := range forwarded {
		f.ports[one.Remote] = one.Local
	}
	return f, err
}

func dialer(target string, tunnel bool) (httpstream.Dialer, error) {
	parsed, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	if tunnel {
		return portforward.NewSPDYOverWebsocketDialer(parsed, &rest.Config{})
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", parsed), nil
}

// Address is the local one of a port.
func (f *Forward) Address(port int) string {
	return fmt.Sprintf("127.0.0.1:%d", f.ports[uint16(port)])
}

// Lost is whether it has ended by itself.
func (f *Forward) Lost() bool {
	return len(f.ended) > 0
}

// Stop ends it and all its connections.
func (f *Forward) Stop() error {
	close(f.stop)
	return <-f.ended
}

// Sizes is a terminal that is resized by sending.
type Sizes chan remotecommand.TerminalSize

// Next waits for the next size; nil once there are no more.
func (s Sizes) Next() *remotecommand.TerminalSize {
	size, more := <-s
	if !more {
		return nil
	}
	return &size
}
