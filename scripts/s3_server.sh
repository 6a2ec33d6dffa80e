#!/usr/bin/env bash
# Installs the S3 server that tests of the remote cache run on, under target/oracle/s3.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
environment s3 scripts/requirements-s3.txt
