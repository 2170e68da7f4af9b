#!/usr/bin/env bash
# Fuzzes a parser of crates/streaming, guided by coverage, with the stable toolchain.
#
#   scripts/fuzz.sh spdy_frames|spdy_session|websocket [libFuzzer's options, e.g. -runs=10000000]
#
# The folder is cargo-fuzz's, so `cargo +nightly fuzz run TARGET` does the same with its sanitizers.
set -euo pipefail
target=${1:?usage: scripts/fuzz.sh TARGET [OPTION...]}
shift
folder=$(cd "$(dirname "$0")/../crates/streaming/fuzz" && pwd)
host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes, but for the sanitizers, which need a nightly toolchain: none of this code is unsafe.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
cargo build --quiet --release --manifest-path "$folder/Cargo.toml" --target "$host" --bin "$target"
mkdir -p "$folder/corpus/$target" "$folder/artifacts/$target"
exec "$folder/target/$host/release/$target" -artifact_prefix="$folder/artifacts/$target/" "$@" "$folder/corpus/$target"
