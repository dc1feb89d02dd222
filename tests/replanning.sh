#!/usr/bin/env bash
# Runs tests/tests/replanning.rs on two nodes, one of which the test calls of class cuda. Builds for it a runtime whose cuda
# provider is a double that wants no GPU. Arguments go to the test program.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=${CARGO_TARGET_DIR:-target}/release
cargo build --release --locked -p joulecast-cuda-double
JOULECAST_TEST_CUDA_RUNTIME_IMAGE=$(charts/images/layout.py image --name localhost/joulecast/test-cuda-anywhere \
	--out build/images/test-cuda-anywhere.tar "$programs/joulecast-cuda-double-anywhere" "$programs/joulecast-runtime")
export JOULECAST_TEST_CUDA_RUNTIME_IMAGE
cargo test --release --workspace --no-run --test replanning
exec tests/two-nodes.sh replanning "$@"
