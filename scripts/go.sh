#!/usr/bin/env bash
# Prints the path of a Go that builds the test tools: the one on the PATH if it is new enough, otherwise the
# pinned one, fetched from the module proxy into target/go.
set -euo pipefail

version=1.26.8
sha256=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7
tree=$(cd "$(dirname "$0")/.." && pwd)

for go in "$(command -v go || true)" /usr/local/go/bin/go; do
	[ -x "$go" ] || continue
	# From 1.21 a Go fetches the toolchain that go.mod names by itself.
	minor=$("$go" env GOVERSION | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
	[ "${minor:-0}" -lt 21 ] || { echo "$go"; exit; }
done

go=$tree/target/go/bin/go
if [ ! -x "$go" ]; then
	proxy=${GOPROXY:-https://proxy.golang.org}
	echo "go: fetching Go $version" >&2
	mkdir -p "$tree/target"
	work=$(mktemp -d "$tree/target/.go.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	curl -sSfL -o "$work/go.zip" "${proxy%%[,|]*}/golang.org/toolchain/@v/v0.0.1-go$version.linux-amd64.zip"
	echo "$sha256  $work/go.zip" | sha256sum --quiet -c
	python3 -m zipfile -e "$work/go.zip" "$work"
	unpacked=$work/golang.org/toolchain@v0.0.1-go$version.linux-amd64
	# Module archives carry no permissions.
	chmod -R u+rwX "$unpacked"
	chmod +x "$unpacked"/bin/* "$unpacked"/pkg/tool/linux_amd64/*
	rm -rf "$tree/target/go"
	mv "$unpacked" "$tree/target/go"
fi
echo "$go"
