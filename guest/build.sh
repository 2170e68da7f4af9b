#!/usr/bin/env bash
# Makes the guest: OUT_DIR/vmlinuz and OUT_DIR/initramfs, from the distribution's kernel package
# (unpacked, never installed) and the static agent.
#
#   guest/build.sh OUT_DIR AGENT_BINARY
#
# The package is kept in GUEST_CACHE (OUT_DIR/cache). KERNEL_PACKAGE chooses another one; it must be 6.12 or
# newer (file-backed EROFS, idmapped FUSE). The initramfs is the same for the same input.
set -euo pipefail

out=${1:?usage: guest/build.sh OUT_DIR AGENT_BINARY}
agent=${2:?usage: guest/build.sh OUT_DIR AGENT_BINARY}

# What the guest loads at boot, in this order, each after what it depends on.
# The last for containers that may make network devices: the guest cannot load modules later.
boot_modules=(virtio_blk virtio_mem virtio_scsi sd_mod virtio_net virtio-rng overlay erofs bridge)

say() { printf 'guest: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ -x "$agent" ] || die "$agent is not an executable file: build a3s-box-agent first"
for tool in apt-get dpkg-deb depmod modprobe xz cpio; do
	command -v "$tool" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || die "$tool is missing"
done
PATH=$PATH:/usr/sbin:/sbin

# The concrete package behind the newest installable 6.12+ cloud kernel.
kernel_package() {
	local meta concrete
	for meta in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64; do
		concrete=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
		[ -n "$concrete" ] || continue
		if dpkg --compare-versions "$(apt-cache show "$concrete" | sed -n 's/^Version: //p' | head -n 1)" ge 6.12; then
			printf '%s\n' "$concrete"
			return
		fi
	done
	die "no cloud kernel of 6.12 or newer is known to apt: run apt-get update, or set KERNEL_PACKAGE"
}

mkdir -p "$out" "${cache:=${GUEST_CACHE:-$out/cache}}"
out=$(cd "$out" && pwd)
cache=$(cd "$cache" && pwd)
agent=$(readlink -f "$agent")

deb=$(find "$cache" -name 'linux-image-*.deb' -print -quit)
if [ -z "$deb" ]; then
	package=${KERNEL_PACKAGE:-$(kernel_package)}
	say "fetching $package"
	# _apt cannot write into a private folder; fetching as root is what apt falls back to anyway.
	(cd "$cache" && apt-get -o APT::Sandbox::User=root -qq download "$package")
	deb=$(find "$cache" -name 'linux-image-*.deb' -print -quit)
fi

work=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

unpacked=$cache/$(basename "$deb" .deb)
if [ ! -d "$unpacked" ]; then
	say "unpacking $(basename "$deb")"
	dpkg-deb -x "$deb" "$work/kernel"
	release=$(basename "$work"/kernel/lib/modules/* "$work"/kernel/usr/lib/modules/* 2>/dev/null | grep -v '\*' | head -n 1)
	[ -d "$work/kernel/lib/modules" ] || mv "$work/kernel/usr/lib" "$work/kernel/lib"
	depmod -b "$work/kernel" "$release"
	# Another build may have been faster.
	mv -T "$work/kernel" "$unpacked" 2>/dev/null || [ -d "$unpacked" ]
fi
release=$(basename "$unpacked"/lib/modules/*)

root=$work/root
mkdir -p "$root"/{modules,proc,sys,dev,run,tmp,share,scratch}
install -m 0755 "$agent" "$root/init"
: >"$root/modules/order"
for module in "${boot_modules[@]}"; do
	# --show-depends lists what has to be loaded, dependencies first; "builtin NAME" needs nothing.
	modprobe -d "$unpacked" -S "$release" --show-depends "$module" | while read -r verb file _; do
		[ "$verb" = insmod ] || continue
		name=$(basename "${file%%.ko*}").ko
		grep -qx "$name" "$root/modules/order" && continue
		case $file in
		*.xz) xz -dc "$file" ;;
		*.zst) zstd -dcq "$file" ;;
		*) cat "$file" ;;
		esac >"$root/modules/$name"
		printf '%s\n' "$name" >>"$root/modules/order"
	done
done

# Reproducible: sorted names, no times, no inode numbers.
find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc --reproducible -R 0:0) >"$work/initramfs"
install -m 0644 "$unpacked/boot/vmlinuz-$release" "$work/vmlinuz"
mv "$work/vmlinuz" "$out/vmlinuz"
mv "$work/initramfs" "$out/initramfs"
say "kernel $release, initramfs $(stat -c %s "$out/initramfs") bytes"
