# The one entry for people and CI. Every stage says what it does and how long it took; a second run is quick.
# Shell code of more than a few lines lives in the scripts that the targets call.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# State of the local cluster: certificates, etcd, containerd, logs, kubeconfig.
export JOULECAST_CLUSTER_DIR ?= /var/lib/joulecast-cluster
cluster_kubeconfig := $(JOULECAST_CLUSTER_DIR)/kubeconfig

# helm and the command line come from build/bin where they are there.
export PATH := $(CURDIR)/build/bin:$(PATH)

# First line of a recipe: announces the stage, and its time when it ends.
stage = @SECONDS=0; printf '\n== %s: %s\n' '$@' '$(1)'; \
	trap 'rc=$$?; [ $$rc = 0 ] && end=done || end="FAILED ($$rc)"; printf "== %s: %s after %s s\n" "$@" "$$end" "$$SECONDS"' EXIT

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what is missing: Debian packages, the Kubernetes binaries (Go modules), helm
	$(call stage,installs Debian packages and builds the Kubernetes binaries into build/bin where they are missing)
	tests/cluster/setup.sh

.PHONY: onnxruntime
onnxruntime: ## get ONNX Runtime's library into build/onnxruntime, for the tests, the images and programs that run here
	@charts/images/onnxruntime

.PHONY: openvino
openvino: ## get OpenVINO's libraries into build/openvino, for the tests, the images and programs that run here
	@charts/images/openvino

# Not part of `check`: llama.cpp is minutes of C++.
.PHONY: engine-llamacpp
engine-llamacpp: onnxruntime openvino ## build joulecast-runtime with the llama.cpp engine (from source) and test it; RUNTIME_FEATURES=llamacpp make images puts it into the image
	$(call stage,builds llama.cpp from source and tests its engine)
	charts/images/llamacpp-tools
	cargo clippy --release -p joulecast-runtime --features llamacpp --all-targets -- -D warnings
	cargo test --release -p joulecast-runtime --features llamacpp

.PHONY: torch
torch: ## get libtorch for CPUs and its headers into build/torch, for the engines torch and torchscript
	@charts/images/torch

# Not part of `check`: its libraries are a download of half a gigabyte, and the binding is minutes of C++.
.PHONY: engine-torch
engine-torch: export LIBTORCH := $(CURDIR)/build/torch
engine-torch: export LD_LIBRARY_PATH := $(CURDIR)/build/torch/lib
engine-torch: onnxruntime openvino torch ## build joulecast-runtime with the engines on libtorch and test them; RUNTIME_FEATURES=torch make images puts them into the image
	$(call stage,builds the binding to libtorch and tests its engines)
	cargo clippy --release -p joulecast-runtime --features torch --all-targets -- -D warnings
	cargo test --release -p joulecast-runtime --features torch

.PHONY: check
check: onnxruntime openvino ## format, clippy with warnings denied, unit tests, generated files, chart, scripts; needs no cluster
	$(call stage,format - clippy - unit tests and generated files - chart - scripts)
	# Rust's minimal profile leaves both out.
	for component in fmt clippy; do
		cargo "$$component" --version >/dev/null 2>&1 || rustup component add "$${component/fmt/rustfmt}"
	done
	command -v helm >/dev/null || tests/cluster/setup.sh helm
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo test --release
	$(MAKE) kills
	tests/chart.sh
	tests/scripts.sh
	tests/readme.sh --static

.PHONY: kills
kills: ## kill the runtime wherever it writes, renames or reports, and start it anew (a build with fail points)
	$(call stage,kills joulecast-runtime at every fail point and resumes)
	# target/release/joulecast-runtime has the points in it afterwards; each build without them puts the other one back.
	cargo test --release --workspace --features joulecast-runtime/fail-points --test kills

.PHONY: test
test: export KUBECONFIG := $(cluster_kubeconfig)
test: setup check images cluster-selftest cluster-up demo demo-registry readme cluster-tests ## all tests: check, the local cluster itself, demo, README, tests on the cluster

.PHONY: demo
demo: ## the main job end to end; KUBECONFIG=... REGISTRY=... uses a cluster of yours, otherwise a local one starts
	$(call stage,runs an InferenceJob on a real cluster)
	tests/demo/demo.sh

.PHONY: readme
readme: ## runs the commands of README.md on the cluster that the demo left running
	$(call stage,runs the commands of README.md)
	tests/readme.sh

.PHONY: demo-registry
demo-registry: ## the demo once more, as on a cluster of yours: images pushed to a registry, and pulled from it
	$(call stage,runs the demo once more: images pushed to a registry and pulled from it)
	tests/demo/registry.sh

# The last stage of `make test`: cargo's own closing lines stand at the end, so no stage line follows them.
.PHONY: cluster-tests
cluster-tests: export KUBECONFIG := $(cluster_kubeconfig)
cluster-tests: ## the tests that need the local cluster, which `make demo` leaves running
	@printf '\n== %s: %s\n' '$@' 'tests on the local cluster'
	# With the values of the tests: the README's own installation has the chart's.
	tests/install.sh
	set -a
	. build/images/images.env
	set +a
	export JOULECAST_TESTS_BEGAN=$$(date -u +%Y-%m-%dT%H:%M:%S)
	# They mostly wait: for pods, for the kubelet, for the end of a grace period.
	cargo test --release --workspace --test jobs --test energy_models --test release -- --test-threads=6
	cargo test --release --workspace --test permissions
	# Last, and by itself: the node agent stays for all tests of its program, and goes with the values that they set.
	tests=0
	cargo test --release --workspace --test node_agent || tests=$$?
	tests/install.sh >build/cluster-tests.log 2>&1 || { cat build/cluster-tests.log; exit 1; }
	exit $$tests

.PHONY: faults
faults: export KUBECONFIG := $(cluster_kubeconfig)
faults: setup images cluster-up kills-operator buckets upgrade replanning ## nodes powered off and cut, everything restarted under running jobs; adds a second node for some minutes
	$(call stage,takes nodes and daemons away under running jobs)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/two-nodes.sh faults

.PHONY: replanning
replanning: export KUBECONFIG := $(cluster_kubeconfig)
replanning: setup images cluster-up ## jobs that reality leaves the plan of: nodes lost, nodes that appear, a model that is slower than predicted; adds a second node for some minutes
	$(call stage,takes from running jobs what their plans stand on)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/replanning.sh

.PHONY: kills-operator
kills-operator: export KUBECONFIG := $(cluster_kubeconfig)
kills-operator: setup images cluster-up ## kill the operator in front of every write to the API, and start it anew (a build with fail points)
	$(call stage,kills joulecast-operator at every fail point while it works)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/install.sh >/dev/null
	cargo build --release --workspace --features joulecast-operator/fail-points --bin joulecast-operator
	cp target/release/joulecast-operator build/joulecast-operator-with-points
	# Puts the one without points back.
	cargo build --release --bin joulecast-operator
	set -a
	. build/images/images.env
	set +a
	JOULECAST_OPERATOR_WITH_POINTS=$(CURDIR)/build/joulecast-operator-with-points \
		cargo test --release --workspace --test kills_operator -- --nocapture

.PHONY: buckets
buckets: export KUBECONFIG := $(cluster_kubeconfig)
buckets: setup images cluster-up ## jobs from bucket to bucket, against an S3-compatible server that the tests start
	$(call stage,runs jobs from bucket to bucket)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/install.sh >/dev/null
	set -a
	. build/images/images.env
	set +a
	cargo test --release --workspace --test buckets

.PHONY: upgrade
upgrade: export KUBECONFIG := $(cluster_kubeconfig)
upgrade: setup images cluster-up ## helm upgrade from the release before, which it builds out of the git history, under running jobs
	$(call stage,upgrades the release under running jobs)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/upgrade.sh

.PHONY: gpu-tests
gpu-tests: export KUBECONFIG := $(cluster_kubeconfig)
gpu-tests: setup images cluster-up ## GPUs on the local cluster: a second node for some minutes, with a fake NVML library and a containerd that knows CDI
	$(call stage,runs the node agent over a fake NVML library on a node of its own)
	tests/cluster/setup.sh cdi
	tests/gpus.sh

.PHONY: soak
soak: export KUBECONFIG := $(cluster_kubeconfig)
soak: setup images cluster-up ## 30 minutes of random kills of everything, then every invariant (SOAK_SECONDS, SOAK_SEED)
	$(call stage,kills at random for a while and checks every invariant)
	tests/cluster/cluster load build/images/{operator,runtime,demo-model}.tar
	tests/two-nodes.sh soak

# The self-test has a cluster of its own, and a machine has room for one: it stops the other, whose state stays.
.PHONY: cluster-selftest
cluster-selftest: setup ## test the local cluster itself: start, crash, stop, and that nothing is left
	$(call stage,tests the local cluster itself)
	tests/cluster/cluster down
	tests/cluster/selftest.sh

.PHONY: cluster-up
cluster-up: setup ## start the local cluster (no effect if it runs)
	$(call stage,starts the local cluster)
	tests/cluster/cluster up

.PHONY: cluster-down
cluster-down: ## stop the local cluster; nothing of it keeps running
	$(call stage,stops the local cluster)
	tests/cluster/cluster down

.PHONY: images
images: setup ## build the release binaries and from them the images into build/images
	$(call stage,builds the release binaries and the images)
	tests/demo/images.sh

.PHONY: tools-test
tools-test: ## test tools/modelpack: every family of models, packed and compared with transformers (downloads several GB the first time)
	$(call stage,packs a tiny model of every family and compares it with transformers)
	tools/modelpack --selftest

.PHONY: generate
generate: ## rewrite generated files: CRDs from their types, the golden rendering of the chart
	$(call stage,rewrites the CRDs and the golden rendering of the chart)
	REWRITE=1 cargo test --release -p joulecast-crds --test generated_yaml
	REWRITE=1 tests/chart.sh

.PHONY: bench
bench: ## engine figures on this machine (SmolLM2-135M shape, random weights) beside its own limits; fails below 40 % of decode's
	$(call stage,prefill and decode rates beside the limits of this machine)
	cargo build --release --bin joulecast-runtime
	[ -e build/bench/smollm2/config.json ] || target/release/joulecast-runtime random-model --shape smollm2-135m --dtype f32 --out build/bench/smollm2
	target/release/joulecast-runtime bench --model build/bench/smollm2 --engine candle --provider cpu \
		--prompt-tokens 256 --gen-tokens 64 --batch 1 --repeat 5 --output json --least-decode-share 0.40

.PHONY: bench-agent
bench-agent: ## what the node agent costs: its process with 100 pods, a window's opening and closing, a step
	$(call stage,CPU time and memory of the node agent and the time that a window takes)
	cargo bench -p joulecast-device-plugin --bench overhead --bench windows

.PHONY: bench-engines
bench-engines: export LIBTORCH := $(CURDIR)/build/torch
bench-engines: onnxruntime openvino ## our engines and their peers in Python in turns, with ratios (installs several GB the first time); ARGS="--batch 1 8 16", RUNTIME_FEATURES=llamacpp,torch
	$(call stage,our engines and ONNX Runtime and transformers in Python in turns)
	case "$${RUNTIME_FEATURES:-}" in *torch*) charts/images/torch ;; esac
	cargo build --release -p joulecast-runtime --bin joulecast-runtime --features "$${RUNTIME_FEATURES:-default}"
	[ -e build/bench/smollm2/config.json ] || target/release/joulecast-runtime random-model --shape smollm2-135m --dtype f32 --out build/bench/smollm2
	[ -e build/bench/packs/openvino-f32 ] || { rm -rf build/bench/packs; tools/modelpack --model build/bench/smollm2 --out build/bench/packs --artifacts onnx:f32,onnx:int8,onnx:int4,openvino:f32,gguf:f32,gguf:q8_0,gguf:q4_0; }
	case "$${RUNTIME_FEATURES:-}" in *torch*)
		[ -e build/bench/packs/torchscript-f32 ] || tools/modelpack --model build/bench/smollm2 --out build/bench/packs --artifacts torchscript:f32,torchscript:bf16 ;;
	esac
	ORT_DYLIB_PATH=build/onnxruntime/libonnxruntime.so JOULECAST_OPENVINO=build/openvino/libopenvino_c.so build/tools/bin/python benches/engines.py $(ARGS)

# Not part of any test: it installs packages and takes minutes.
.PHONY: bench-planner
bench-planner: ## the planner beside OR-tools and HiGHS on the same instances (installs both into build/bench/venv)
	$(call stage,plans the same instances with joulecast - OR-tools - HiGHS)
	cargo build --release --bin joulecast
	[ -e build/bench/venv/bin/python ] || python3 -m venv build/bench/venv
	build/bench/venv/bin/pip install --quiet 'ortools>=9,<10' 'highspy>=1.7,<2' numpy scipy
	build/bench/venv/bin/python benches/planner.py --sizes 500 10000 100000 1000000
