// Conformance asks a CRI server for exec, attach and port-forward as kubelet does, uses what it is given
// with Kubernetes' own clients, and prints what it saw: one line of JSON for each case. It knows nothing of
// the server behind the socket and has no opinion; `run` compares two servers.
//
//	conformance -endpoint unix:///run/x.sock -image IMAGE -probe PROBE [-restart PROGRAM] [-bytes N] [ONLY]
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"hash/crc32"
	"log"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	"a3s-box-cri/tests/streaming/clients"
	"a3s-box-cri/tests/streaming/pattern"
)

var (
	endpoint = flag.String("endpoint", "", "the server's socket, unix:///PATH")
	image    = flag.String("image", "", "an image with busybox")
	probe    = flag.String("probe", "", "the probe's program")
	restart  = flag.String("restart", "", "a program that restarts the server")
	skip     = flag.String("skip", "", "cases whose name matches are left out")
	volume   = flag.Int64("bytes", 64<<20, "how much the large transfers carry")
)

// Longest that a case may take beyond its bytes.
const patience = 3 * time.Minute

// seen is what a case saw, in its order.
type seen struct {
	lines [][2]string
	node  *node
}

// Ids, which are never the same.
var ids = regexp.MustCompile(`[0-9a-f]{64}|[0-9a-f]{32}|[A-Za-z0-9_-]{43}`)

func (s *seen) note(what, format string, values ...any) {
	text := ids.ReplaceAllString(s.node.hide().Replace(fmt.Sprintf(format, values...)), "ID")
	s.lines = append(s.lines, [2]string{what, text})
}

// end notes how a session ended.
func (s *seen) end(err error) { s.ended("end", err) }

func (s *seen) ended(what string, err error) {
	code, other := clients.ExitCode(err)
	if other != nil {
		s.note(what, "error: %v", other)
		return
	}
	s.note(what, "exit code %d", code)
}

// text notes bytes so that each of them shows, or their sum when they are too many to look at.
func (s *seen) text(what, text string) {
	if len(text) > longest {
		s.note(what, "%d bytes with sum %08x", len(text), crc32.Checksum([]byte(text), pattern.Table))
		return
	}
	s.note(what, "%q", text)
}

// Longest text that is noted as it is.
const longest = 1500

// A testCase reports what it saw; an error is one of the test's own, never of the server.
type testCase struct {
	name string
	run  func(context.Context, *node, *seen) error
}

func main() {
	flag.Parse()
	log.SetFlags(0)
	klog.SetLogger(logr.Discard())
	n, err := connect()
	if err != nil {
		log.Fatal(err)
	}
	// A server may need its time for the first pod.
	if _, err := n.shell(context.Background()); err != nil {
		log.Fatal(err)
	}
	failed, left := false, regexp.MustCompile(*skip)
	// Protocols that the server does not have: asked once.
	refused := map[string]bool{}
	for _, c := range all() {
		if !strings.Contains(c.name, flag.Arg(0)) || *skip != "" && left.MatchString(c.name) {
			continue
		}
		group := c.group()
		if refused[group] {
			continue
		}
		begin := time.Now()
		lines, err := n.try(c)
		for _, line := range lines {
			refused[group] = refused[group] || noUpgrade.MatchString(line[1])
		}
		if err != nil {
			failed = true
			lines = append(lines, [2]string{"the test itself failed", err.Error()})
		}
		line, _ := json.Marshal(map[string]any{"case": c.name, "seen": lines, "ms": time.Since(begin).Milliseconds()})
		fmt.Println(string(line))
	}
	if err := n.clean(); err != nil {
		log.Fatal(err)
	}
	if failed {
		os.Exit(1)
	}
}

var noUpgrade = regexp.MustCompile("bad handshake|unable to upgrade streaming request")

// group is the protocol that a case is about.
func (c testCase) group() string {
	return c.name[:strings.IndexAny(c.name, ":,")]
}

func (n *node) try(c testCase) ([][2]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Duration(*volume>>20)*time.Second/4)
	defer cancel()
	s := &seen{node: n}
	err := c.run(ctx, n, s)
	return s.lines, err
}

// all is the table.
func all() []testCase {
	var cases []testCase
	for _, d := range clients.Dialects {
		cases = append(cases, execCases(d)...)
	}
	for _, d := range []clients.Dialect{clients.Dialects[0], clients.Dialects[4], clients.Dialects[5]} {
		cases = append(cases, flowCases(d)...)
		cases = append(cases, terminalCases(d)...)
		cases = append(cases, attachCases(d)...)
	}
	cases = append(cases, forwardCases("forward over spdy", false)...)
	cases = append(cases, forwardCases("forward tunnelled", true)...)
	cases = append(cases, requestCases()...)
	cases = append(cases, syncCases()...)
	// Last: what restarts the server.
	return append(cases, restartCases()...)
}
