#!/usr/bin/env bash
# Upgrades the release under running jobs, from the one before: its chart and images are built out of the git history, into
# build/previous. PREVIOUS names another commit. Needs the local cluster and build/images; leaves the chart as it was.
set -euo pipefail
cd "$(dirname "$0")/.."
export KUBECONFIG="${KUBECONFIG:-${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig}"
# Until there is a release: the last commit at which all pods of a job with `parallelism` were one indexed Job.
unreleased=b372678c1f9ed43e9ee128050a06369108ff4d7b
previous=${PREVIOUS:-$(git describe --tags --match 'v[0-9]*' --abbrev=0 2>/dev/null || echo "$unreleased")}
tree=$PWD/build/previous

rm -rf "$tree"
mkdir -p "$tree/build/bin"
git archive "$previous" | tar -x -C "$tree" ||
	{ echo "upgrade: $previous is not in this clone: fetch its history (git fetch --unshallow)" >&2; exit 1; }
ln -s "$PWD/build/onnxruntime" "$PWD/build/openvino" "$tree/build/"
# A build directory of its own: cargo takes crates of the same name and place in two trees for the same.
CARGO_BUILD_BUILD_DIR=$PWD/build/previous-target CARGO_TARGET_DIR=$tree/target "$tree/tests/demo/images.sh"
tests/cluster/cluster load "$tree"/build/images/{operator,runtime}.tar

set -a
# shellcheck source=/dev/null
. build/images/images.env
set +a
JOULECAST_PREVIOUS=$tree cargo test --release --workspace --test upgrade -- --nocapture
