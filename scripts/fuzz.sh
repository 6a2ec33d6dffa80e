#!/usr/bin/env bash
# Fuzzes the reader of safetensors files and indices: fuzz.sh [SECONDS] [header|index]. Each target runs for so many seconds
# (300), from crates/checkpoint/fuzz/corpus; what it learns stays in target/fuzz. Fails on a finding and keeps its input there.
# An ordinary test replays the committed corpus. Needs a C++ compiler, for libFuzzer.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-300}
targets=${2:-header index}
package=crates/checkpoint/fuzz
out=$PWD/target/fuzz

# Coverage for libFuzzer; sanitizers of memory have nothing to find in safe Rust.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
coverage+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Clink-dead-code -Ccodegen-units=1"
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target named, build scripts and proc macros are built without the flags.
RUSTFLAGS="$coverage" cargo build --release --locked --manifest-path "$package/Cargo.toml" --target-dir "$out/build" --target "$host"

for target in $targets; do
    mkdir -p "$out/$target"
    echo "fuzz: $target for $seconds s" >&2
    "$out/build/$host/release/$target" "$out/$target" "$package/corpus/$target" -dict="$package/words.dict" \
        -artifact_prefix="$out/$target-" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1
done
