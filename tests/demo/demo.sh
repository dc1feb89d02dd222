#!/usr/bin/env bash
# The main job, end to end: an InferenceJob goes through a real Kubernetes. Builds the images, starts the local cluster
# (or uses the one that KUBECONFIG names), installs the chart, puts a small model onto a volume, runs the prompts and
# shows what became of them. Everything stays up afterwards; a second run repeats the job.
#
#   KUBECONFIG             a cluster of yours; absent: the local one
#   REGISTRY               where to push the images for a cluster of yours, for example registry.example.com/team
#   IMAGES=loaded          the images of build/images are in that cluster's nodes already (kind load, k3d image import)
#   DEMO_TIMEOUT_SECONDS   longest wait for the job, 900 if absent
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
manifests=$root/tests/demo/manifests
bin=$root/build/bin
export PATH=$bin:$PATH

namespace=demo
system=joulecast-system
release=joulecast
job=demo
timeout_seconds=${DEMO_TIMEOUT_SECONDS:-900}
local_kubeconfig=$(realpath -m "${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}")/kubeconfig

# Announces a step, with the time since the start.
say() { printf '\n-- %3d s: %s\n' "$SECONDS" "$*"; }
in_demo() { kubectl --namespace "$namespace" "$@"; }

# What a person would look at first. Each command may fail: the cluster may not even answer.
diagnose() {
	local rc=$?
	[ $rc -ne 0 ] || return 0
	set +e
	{
		printf '\n-- The demo failed (exit status %s). What the cluster says:\n' "$rc"
		kubectl get nodes -o wide
		in_demo get inferencejobs,inferencemodels,jobs,pods,persistentvolumeclaims -o wide
		in_demo describe inferencejob "$job"
		in_demo describe pods
		in_demo get events --sort-by=.lastTimestamp
		in_demo logs --selector joulecast.dev/inference-job="$job" --all-containers --tail=50
		in_demo logs job/install-demo-model --tail=50
		kubectl --namespace "$system" get pods -o wide
		kubectl --namespace "$system" describe pods
		kubectl --namespace "$system" logs --selector app.kubernetes.io/instance="$release" --tail=100
		printf '\n-- The demo failed (exit status %s); the reason stands above.\n' "$rc"
	} >&2
	exit "$rc"
}

choose_cluster() {
	if [ -z "${KUBECONFIG:-}" ] || [ "$(realpath -m "$KUBECONFIG")" = "$(realpath -m "$local_kubeconfig")" ]; then
		cluster=local
		export KUBECONFIG=$local_kubeconfig
		return
	fi
	cluster=given
	# The last line names it, wherever the reader then is. It may be a list of files.
	local file files=()
	IFS=: read -r -a files <<<"$KUBECONFIG"
	KUBECONFIG=
	for file in "${files[@]}"; do
		[ -r "$file" ] || { echo "demo: KUBECONFIG names $file, which cannot be read" >&2; exit 1; }
		KUBECONFIG+=${KUBECONFIG:+:}$(realpath "$file")
	done
	export KUBECONFIG
	if [ -z "${REGISTRY:-}" ] && [ "${IMAGES:-}" != loaded ]; then
		cat >&2 <<-END
			demo: the cluster of KUBECONFIG ($KUBECONFIG) cannot run images that only this machine has. Either
			  REGISTRY=registry.example.com/team make demo    pushes them where the cluster can pull them, or
			  IMAGES=loaded make demo                         if you have loaded build/images/*.tar into its nodes, or
			  env -u KUBECONFIG make demo                     uses a local cluster
		END
		exit 1
	fi
}

# A cluster of the user's own needs none of the local one's parts, if its tools are at hand.
set_up() {
	local tool tools=(kubectl helm python3 cc) missing=''
	[ -z "${REGISTRY:-}" ] || tools+=(skopeo)
	for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || missing+=" $tool"; done
	if [ "$cluster" = given ] && [ -z "$missing" ]; then return; fi
	say "installs what is missing"
	tests/cluster/setup.sh
}

build_images() {
	say "builds the release binaries and the images"
	tests/demo/images.sh
}

provide_images() {
	if [ "$cluster" = local ]; then
		say "starts the local cluster and loads the images"
		tests/cluster/cluster up
		tests/cluster/cluster load build/images/{operator,runtime,device-plugin,demo-model}.tar
	elif [ -n "${REGISTRY:-}" ]; then
		say "pushes the images to $REGISTRY"
		charts/images/push
	fi
	# Pushing has changed the names.
	# shellcheck source=/dev/null
	. build/images/images.env
}

install_chart() {
	say "installs the chart"
	if [ "$cluster" = local ]; then
		tests/install.sh
		return
	fi
	# What a release of theirs was given stays. Its energy models learn from estimates if its own values say so.
	local keep=()
	if helm status "$release" --namespace "$system" >/dev/null 2>&1; then
		echo "demo: upgrades the release $release that is there, with the values that it was given"
		keep=(--reset-then-reuse-values)
	fi
	JOULECAST_LEARN_FROM='' tests/install.sh "${keep[@]}"
}

prepare_namespace() {
	say "prepares namespace $namespace: volumes, prompts, model"
	kubectl apply --server-side -f "$manifests/namespace.yaml"
	# A job of an earlier run goes first: it may still hold the volumes.
	in_demo delete inferencejob "$job" --ignore-not-found --cascade=foreground --timeout=2m
	in_demo wait --for=delete jobs.batch,pods --selector joulecast.dev/inference-job="$job" --timeout=2m
	in_demo delete job install-demo-model --ignore-not-found --cascade=foreground --timeout=2m
	in_demo apply --server-side -f "$manifests/claims.yaml"
	in_demo create configmap demo-prompts --from-file=prompts.jsonl=tests/demo/prompts.jsonl --dry-run=client -o yaml |
		in_demo apply --server-side -f -
	local model
	model=demo-rust-$(cat tests/demo/model/* | sha256sum | cut -c1-12)
	sed "s|@MODEL_IMAGE@|$JOULECAST_DEMO_MODEL_IMAGE|; s|@MODEL@|$model|" "$manifests/install-model.yaml" | in_demo apply --server-side -f -
	in_demo wait --for=condition=Complete job/install-demo-model --timeout=5m
	sed "s|@MODEL@|$model|" "$manifests/model.yaml" | in_demo apply --server-side -f -
}

job_field() { in_demo get inferencejob "$job" -o "jsonpath=$1"; }
condition() { job_field "{.status.conditions[?(@.type==\"$1\")].status}"; }

# Prints the job's line whenever it changes, until the job is Complete (0) or Failed or out of time (1).
follow() {
	local line last='' started=$SECONDS
	in_demo get inferencejob "$job"
	while :; do
		line=$(in_demo get inferencejob "$job" --no-headers)
		# The age at the end changes all the time.
		if [ "${line% *}" != "$last" ]; then
			printf '%s\n' "$line"
			last=${line% *}
		fi
		if [ "$(condition Failed)" = True ]; then
			echo "demo: the job failed: $(job_field '{.status.conditions[?(@.type=="Failed")].message}')" >&2
			return 1
		fi
		if [ "$(condition Complete)" = True ]; then
			in_demo wait --for=condition=EnergyReported inferencejob/"$job" --timeout=60s
			return
		fi
		if [ $((SECONDS - started)) -ge "$timeout_seconds" ]; then
			echo "demo: the job was not complete after $timeout_seconds s (DEMO_TIMEOUT_SECONDS)" >&2
			return 1
		fi
		sleep 2
	done
}

show_result() {
	say "the job is complete"
	in_demo get inferencejob "$job" -o wide
	say "what it took"
	in_demo get inferencejob "$job" -o go-template-file=tests/demo/summary.tmpl
	say "the first three completions"
	joulecast results "$job" --namespace "$namespace" --limit 3
	say "the output"
	job_field 'file {.spec.output.persistentVolumeClaim.path} on the volume of claim {.spec.output.persistentVolumeClaim.claimName} in namespace {.metadata.namespace}
'
	cat <<-END
		all of it: joulecast results $job --namespace $namespace --output jsonl

		-- what to try next
		  export PATH=$bin:\$PATH
		  kubectl describe ij $job -n $namespace
		  kubectl joulecast explain $job -n $namespace
		  kubectl explain inferencejob.spec
		your own job: docs/inference-job.md and docs/examples; stop the local cluster: make cluster-down

	END
}

choose_cluster
set_up
build_images
trap diagnose EXIT
provide_images
install_chart
prepare_namespace
say "applies the InferenceJob and follows it"
in_demo apply --server-side -f "$manifests/job.yaml"
follow
show_result
trap - EXIT
echo "export KUBECONFIG=$KUBECONFIG"
