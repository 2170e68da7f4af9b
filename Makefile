# What to type: `make demo`, `make build`, `make test`, `make lint`, `make conformance`, `make streaming`, `make bench`.

PACKAGES := qemu-system-x86 e2fsprogs erofs-utils libseccomp-dev containernetworking-plugins \
	docker-registry iptables iproute2 kmod cpio xz-utils zstd gcc libc6-dev busybox-static \
	containerd runc jq python3 util-linux procps curl ca-certificates

.PHONY: all build deps guest test lint fmt demo conformance streaming bench

all: build

# The same for all programs, so that what they share is compiled once.
SECCOMP = LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$$(dirname $$(gcc -print-file-name=libseccomp.a))

build: guest ## release binaries in target/release, the guest in target/guest
	$(SECCOMP) cargo build --release --locked -p a3s-box-cri -p a3s-box-shim

guest: deps ## the agent, which needs no library, and kernel and initramfs around it
	$(SECCOMP) cargo rustc --release --locked -p a3s-box-agent --bin a3s-box-agent -- -C target-feature=+crt-static
	guest/build.sh target/guest target/release/a3s-box-agent

deps: ## Debian packages that are missing
	scripts/deps.sh $(PACKAGES)

test: build ## every test; as root
	tests/run

demo: build ## a pod in a microVM, shown by crictl; IMAGE=... takes one from the internet
	scripts/demo.sh $(IMAGE)

SERVER ?= a3s
conformance: build ## critest; SERVER=containerd for Debian's containerd with runc
	tests/conformance/run $(SERVER) $(ARGS)

streaming: build ## exec, attach and port-forward beside containerd's, 1 GiB each way; writes docs/streaming.md
	tests/streaming/conformance/run both --full --write

bench: build ## beside Debian's containerd with runc
	bench/run

lint: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	scripts/check-crates.py
	scripts/check-deny.py

fmt:
	cargo fmt --all
