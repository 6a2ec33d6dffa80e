# Shared by the oracle scripts: environments, models, and a service that ends with the script.

python=${PYTHON:-python3}
models=target/demo/models
oracle=target/oracle

# environment NAME REQUIREMENTS: makes or keeps target/oracle/NAME; the path is in $environment.
environment() {
    environment=$oracle/$1
    if ! cmp -s "$2" "$environment/requirements.txt"; then
        echo "oracles: installing $2" >&2
        rm -rf "$environment" && "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$2"
        cp "$2" "$environment/requirements.txt"
    fi
}

# serve: builds and starts the service on a free port; the address is in $url.
serve() {
    demo/prepare.sh --experts
    cargo build --locked
    local port
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    mkdir -p "$oracle"
    target/debug/cauldron serve --listen "127.0.0.1:$port" --data-dir "$oracle/data" --models-dir "$models" --log warn &
    server=$!
    trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
