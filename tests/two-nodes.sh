#!/usr/bin/env bash
# Runs a test program that takes nodes away: adds the second node, installs the chart with fast settings, runs it, and leaves
# the cluster with one node and the chart as it was. Arguments: faults, replanning or soak, then what goes to the test program, for
# example the name of one test.
set -euo pipefail
cd "$(dirname "$0")/.."
program=${1:?faults, replanning or soak}
shift
export KUBECONFIG="${KUBECONFIG:-${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig}"
set -a
# shellcheck source=/dev/null
. build/images/images.env
set +a
cluster=tests/cluster/cluster

one_node_again() {
	local result=$?
	$cluster up # whatever a failed test left off or cut
	$cluster node gpu-0 remove || result=1
	tests/install.sh >/dev/null || result=1
	echo "$program: two nodes for $SECONDS s"
	exit "$result"
}

SECONDS=0
$cluster up --nodes 2
trap one_node_again EXIT
# Images of this test alone, which no node has yet.
[ ! -r "build/images/test-cuda-anywhere.tar" ] || $cluster load build/images/test-cuda-anywhere.tar
tests/install.sh --set operator.replicas=2,retries.unreachableSeconds=5,retries.firstSeconds=1,retries.stragglerSeconds=5 >/dev/null
cargo test --release --workspace --test "$program" -- --test-threads=1 --nocapture "$@"
