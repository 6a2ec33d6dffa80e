#!/usr/bin/env bash
# The loops of a merge over arrays in memory, beside memcpy and STREAM's scaling on the same threads: GB/s read and written, best
# of seven. A table on standard output; the figures in bench/results/kernels-DATE-CPU.json. Takes half a minute when built.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
found=$(cargo test --release --locked -p cauldron-merge --lib -- --ignored --nocapture --test-threads 1 kernel::bench)
grep -v '^JSON\|^test\|^running\|^$' <<<"$found"
sed -n 's/^JSON //p' <<<"$found" | PYTHONPATH=bench "$python" -c '
import json, pathlib, sys, time
from merge import machine, output_of
found = {"benchmark": "kernels", "date": time.strftime("%Y-%m-%d"), "commit": output_of("git", "rev-parse", "HEAD"),
         "machine": machine(pathlib.Path("."))} | json.load(sys.stdin)
name = "-".join(found["machine"]["cpu"].lower().split())
path = pathlib.Path(f"bench/results/kernels-{found['"'date'"']}-{name}.json")
path.write_text(json.dumps(found, indent=1) + "\n")
print(path)
'
