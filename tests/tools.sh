#!/usr/bin/env bash
# The test tools, from the modules that go.mod pins, in target/tools.
#
#   tests/tools.sh [TOOL...]    those; all of them when none is named
set -euo pipefail
cd "$(dirname "$0")"
out=../target/tools
go=
# Looked for only when there is something to build.
build() { go=${go:-$(../scripts/go.sh)}; "$go" "$@"; }
mkdir -p "$out"
wanted=" $* "
newer() {
	[ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]] || return 1
	[ ! -e "$out/$1" ] || [ go.sum -nt "$out/$1" ] || [ "${2:-go.sum}" -nt "$out/$1" ]
}
export CGO_ENABLED=0
if newer crictl; then
	echo "tools: building crictl" >&2
	build build -o "$out/crictl" sigs.k8s.io/cri-tools/cmd/crictl
fi
if newer critest; then
	echo "tools: building critest" >&2
	build test -c -o "$out/critest" sigs.k8s.io/cri-tools/cmd/critest
fi
if newer resize e2e/resize/main.go; then
	echo "tools: building the client that resizes pods" >&2
	build build -o "$out/resize" ./e2e/resize
fi
if newer bench bench/main.go || newer bench bench/streams.go; then
	echo "tools: building the bench client" >&2
	build build -o "$out/bench" ./bench
fi
