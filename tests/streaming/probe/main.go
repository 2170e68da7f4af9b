// Probe is what conformance cases run in a container: small, static, without a shell's opinions.
//
//	probe flood BYTES         writes the pattern
//	probe digest              reads stdin; prints how much it was and its sum
//	probe pressure FILE       writes for ever and keeps in FILE how much was taken
//	probe sizes WIDTH         prints the terminal's size at once and at each change, until that width
//	probe serve KIND ADDRESS  listens: echo, digest, flood (what follows /: how much), silent
package main

import (
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"a3s-box-cri/tests/streaming/pattern"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("probe: what?")
	}
	arguments := append(os.Args[2:], "", "")
	var err error
	switch os.Args[1] {
	case "flood":
		err = flood(os.Stdout, arguments[0])
	case "digest":
		err = digest(os.Stdin, os.Stdout)
	case "pressure":
		err = pressure(arguments[0])
	case "sizes":
		err = sizes(arguments[0])
	case "serve":
		err = serve(arguments[0], arguments[1])
	default:
		err = fmt.Errorf("%q is unknown", os.Args[1])
	}
	if err != nil {
		log.Fatalf("probe: %v", err)
	}
}

func flood(to io.Writer, count string) error {
	bytes, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, pattern.New(), bytes)
	return err
}

func digest(from io.Reader, to io.Writer) error {
	sum := crc32.New(pattern.Table)
	count, err := io.CopyBuffer(struct{ io.Writer }{hash.Hash(sum)}, struct{ io.Reader }{from}, make([]byte, 64<<10))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(to, "%d %08x", count, sum.Sum32())
	return err
}

func pressure(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	chunk, written := make([]byte, 4096), 0
	for {
		count, err := os.Stdout.Write(chunk)
		if err != nil {
			return err
		}
		written += count
		if _, err := file.WriteAt(fmt.Appendf(nil, "%d\n", written), 0); err != nil {
			return err
		}
	}
}

func sizes(until string) error {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	for {
		var size struct{ rows, columns, x, y uint16 }
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
		if errno != 0 {
			return errno
		}
		fmt.Printf("%dx%d\n", size.columns, size.rows)
		if strconv.Itoa(int(size.columns)) == until {
			return nil
		}
		<-changes
	}
}

func serve(kind, address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	kind, count, _ := strings.Cut(kind, "/")
	fmt.Println("listening")
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			switch kind {
			case "echo":
				io.Copy(connection, connection)
			case "digest":
				digest(connection, connection)
			case "flood":
				flood(connection, count)
			case "silent":
				// Says only that a client comes and goes.
				fmt.Println("a connection comes")
				io.Copy(io.Discard, connection)
				fmt.Println("a connection ends")
			}
		}()
	}
}
