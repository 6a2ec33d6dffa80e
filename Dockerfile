# syntax=docker/dockerfile:1

# On the CPU:
#   docker build -t cauldron .
# With CUDA (a driver that knows CUDA 13.0 on the host, and its container toolkit):
#   docker build -t cauldron:cuda --build-arg FEATURES=cuda \
#     --build-arg BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#     --build-arg RUN_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
# CUDA_COMPUTE_CAP is the GPU's compute capability without the dot: 80 A100, 89 L4, 90 H100 and H200.

ARG BUILD_IMAGE=debian:bookworm-slim
ARG RUN_IMAGE=debian:bookworm-slim

# The toolchain, once for all stages that compile.
FROM ${BUILD_IMAGE} AS toolchain
ARG RUST_VERSION=1.95.0
ARG CARGO_CHEF_VERSION=0.1.78
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:$PATH
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates curl pkg-config \
    && rm -rf /var/lib/apt/lists/* \
    && curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs \
        | sh -s -- -y --profile minimal --no-modify-path --default-toolchain "$RUST_VERSION" \
    && cargo install cargo-chef --locked --version "$CARGO_CHEF_VERSION"
WORKDIR /build

# What the dependencies are: changes only when a manifest or the lock file does.
FROM toolchain AS plan
COPY . .
RUN cargo chef prepare --recipe-path recipe.json

# Dependencies first, in a layer of their own, then the program.
FROM toolchain AS build
ARG FEATURES=""
ARG CUDA_COMPUTE_CAP=90
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP}
COPY --from=plan /build/recipe.json recipe.json
RUN cargo chef cook --release --locked --package cauldron --features "$FEATURES" --recipe-path recipe.json
COPY . .
RUN cargo build --release --locked --package cauldron --features "$FEATURES" \
    && install -D target/release/cauldron /out/cauldron

FROM ${RUN_IMAGE} AS run
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --home-dir /data cauldron \
    && install -d -o cauldron -g cauldron /data /models /tasks
COPY --from=build /out/cauldron /usr/local/bin/cauldron
USER 10001
ENV CAULDRON_LISTEN=0.0.0.0:8080 \
    CAULDRON_TASKS_DIR=/tasks \
    CAULDRON_DATA_DIR=/data \
    CAULDRON_MODELS_DIR=/models \
    CAULDRON_LOG_FORMAT=json
VOLUME ["/data"]
EXPOSE 8080
# Beyond loopback the service does not start without keys: mount a file and set CAULDRON_API_KEY_FILE.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8080/readyz"]
# SIGTERM drains: 25 s for requests, then the running merge goes back to the queue.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/cauldron"]
CMD ["serve"]
