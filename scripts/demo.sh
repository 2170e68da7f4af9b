#!/usr/bin/env bash
# The demo: a server of its own, a real image, a pod in a microVM, by crictl. Nothing is left afterwards.
#
#   scripts/demo.sh [IMAGE]
#
# Without an image it brings one, built from Debian packages and served by a registry on the node's own
# loopback. With one it pulls that from its own registry, which needs the internet.
set -euo pipefail

tree=$(cd "$(dirname "$0")/.." && pwd)
if [ "${1:-}" != inside ]; then
	export DEMO_IMAGE=${1:-} NODE_TOOLS=crictl
	if [ -n "$DEMO_IMAGE" ]; then export NODE_NETWORK=host; else DEMO_IMAGE=demo; fi
	exec "$tree/tests/node" a3s "$0" inside
fi

show() {
	printf '\n\033[1m$ %s\033[0m\n' "$*"
	"$@"
}

work=$NODE_DIR/demo
mkdir -p "$work/logs"
cat >"$work/pod.json" <<-JSON
	{"metadata": {"name": "hello", "namespace": "default", "uid": "hello-1"},
	 "log_directory": "$work/logs", "linux": {}}
JSON
cat >"$work/container.json" <<-JSON
	{"metadata": {"name": "main"}, "image": {"image": "$DEMO_IMAGE"}, "log_path": "main.log", "linux": {},
	 "command": ["sh", "-c", "echo hello from \$(hostname), kernel \$(uname -r); exec sleep 1000"]}
JSON

show crictl pull "$DEMO_IMAGE"
show crictl images
printf '\nBooting, once, the machine that pods are cloned from...\n'
sed 's/hello/first/g' "$work/pod.json" >"$work/first.json"
crictl rmp -f "$(crictl runp "$work/first.json" 2>/dev/null)" >/dev/null
started=$(date +%s%N)
show crictl runp "$work/pod.json"
pod=$(crictl pods -q)
printf '(%d ms for a virtual machine with its network)\n' $((($(date +%s%N) - started) / 1000000))
show crictl create "$pod" "$work/container.json" "$work/pod.json"
container=$(crictl ps -a -q)
show crictl start "$container"
show crictl pods
show crictl ps
for _ in $(seq 100); do [ -s "$work/logs/main.log" ] && break; sleep 0.1; done
show crictl logs "$container"
show crictl exec --sync "$container" uname -r
show uname -r
guest=$(crictl exec --sync "$container" uname -r)
[ "$guest" != "$(uname -r)" ] || { echo "the container runs on the host's kernel" >&2; exit 1; }
printf '\nThe kernel of the pod is %s, the kernel of the host is %s.\n' "$guest" "$(uname -r)"
show crictl stop --timeout 1 "$container"
show crictl rm "$container"
show crictl stopp "$pod"
show crictl rmp "$pod"
