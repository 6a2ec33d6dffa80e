#!/usr/bin/env bash
# The main job on real models: builds, starts the service on loopback, merges two experts, follows the merge, and asks
# the result. Ctrl-C leaves nothing running. `--keep` keeps the service up after the demo.
set -euo pipefail
cd "$(dirname "$0")/.."
demo/prepare.sh
cargo build --locked

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
target/debug/cauldron serve --listen "127.0.0.1:$port" --data-dir target/demo/data --models-dir target/demo/models \
    --log warn &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

python3 demo/client.py "http://127.0.0.1:$port"
if [ "${1:-}" = --keep ]; then
    echo
    echo "The service stays at http://127.0.0.1:$port (page: /docs). Ctrl-C ends it."
    wait "$server"
fi
