#!/usr/bin/env bash
# Runs the tests of GPUs: adds a second node whose containerd knows CDI, gives the machine device nodes that stand for GPUs,
# runs tests/tests/gpu_agent.rs with a fake NVML library, and leaves the cluster with one node and the chart as it was.
# Arguments go to the test program.
set -euo pipefail
cd "$(dirname "$0")/.."
export KUBECONFIG="${KUBECONFIG:-${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig}"
cluster=tests/cluster/cluster
programs=${CARGO_TARGET_DIR:-target}/release
nodes=(/dev/nvidia0 /dev/nvidia1 /dev/nvidiactl /dev/nvidia-uvm)
for node in "${nodes[@]}"; do
	[ ! -e "$node" ] || { echo "gpus: $node is there: these tests want a machine without GPUs" >&2; exit 1; }
done

# For tests alone: the node agent as it is shipped beside a fake NVML library, and a runtime whose cuda provider is a double.
cargo build --release --locked -p joulecast-fake-nvml -p joulecast-cuda-double
image() { charts/images/layout.py image --name "localhost/joulecast/$1" --out "build/images/$1.tar" "${@:2}"; }
JOULECAST_TEST_GPU_AGENT_IMAGE=$(image test-gpu-agent --library "$programs/libjoulecast_fake_nvml.so" "$programs/joulecast-device-plugin")
JOULECAST_TEST_CUDA_RUNTIME_IMAGE=$(image test-cuda-runtime "$programs/joulecast-cuda-double" "$programs/joulecast-runtime")
export JOULECAST_TEST_GPU_AGENT_IMAGE JOULECAST_TEST_CUDA_RUNTIME_IMAGE
cargo build --release --workspace --test gpu_agent

one_node_again() {
	local result=$?
	rm -f "${nodes[@]}"
	$cluster up # whatever a failed test left off
	$cluster node gpu-0 remove || result=1
	tests/install.sh >/dev/null || result=1
	echo "gpus: two nodes for $SECONDS s"
	exit "$result"
}

SECONDS=0
trap one_node_again EXIT
# What a program opens that stands for CUDA: devices that are always there.
for node in "${nodes[@]}"; do mknod -m 666 "$node" c 1 3; done
$cluster up --cdi gpu-0
$cluster load build/images/{operator,runtime,demo-model,test-gpu-agent,test-cuda-runtime}.tar
tests/install.sh --set retries.firstSeconds=1 >/dev/null
set -a
# shellcheck source=/dev/null
. build/images/images.env
set +a
cargo test --release --workspace --test gpu_agent -- --test-threads=1 --nocapture "$@"
