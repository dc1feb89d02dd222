#!/usr/bin/env bash
# Builds the images of the demo and the cluster tests into build/images, named in images.env: operator and runtime as
# shipped, and the runtime with the demo model in it, which puts the model onto a volume.
set -euo pipefail
cd "$(dirname "$0")/../.."
charts/images/build --extra demo-model=tests/demo/model
# The command line that belongs to them stands where the project's tools are.
mkdir -p build/bin
for name in joulecast kubectl-joulecast; do
	ln -sfn ../../target/release/joulecast "build/bin/$name"
done
