#!/usr/bin/env bash
# Builds the images of the demo and the cluster tests into build/images, named in images.env: operator, runtime and
# node agent as shipped, and the runtime with the demo model in it, which puts the model onto a volume.
set -euo pipefail
cd "$(dirname "$0")/../.."
programs=${CARGO_TARGET_DIR:-target}/release
features=()
# engines that the runtime has only on request, such as llamacpp
if [ -n "${RUNTIME_FEATURES:-}" ]; then
	for feature in ${RUNTIME_FEATURES//,/ }; do features+=(--features "joulecast-runtime/$feature"); done
	[[ $RUNTIME_FEATURES != *llamacpp* ]] || charts/images/llamacpp-tools
	if [[ $RUNTIME_FEATURES == *torch* ]]; then
		charts/images/torch
		export LIBTORCH=$PWD/build/torch
	fi
fi
cargo build --release --locked --bin joulecast --bin joulecast-operator --bin joulecast-runtime \
	--bin joulecast-device-plugin "${features[@]}"
charts/images/build
name=$(charts/images/layout.py image --name localhost/joulecast/demo-model --out build/images/demo-model.tar \
	--directory tests/demo/model=/demo-model "$programs/joulecast-runtime")
printf 'JOULECAST_DEMO_MODEL_IMAGE=%s\n' "$name" | tee -a build/images/images.env

# The command line that belongs to them stands where the project's tools are.
mkdir -p build/bin
for name in joulecast kubectl-joulecast; do
	ln -sfn "$(realpath "$programs/joulecast")" "build/bin/$name"
done
