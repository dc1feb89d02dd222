#!/usr/bin/env bash
# Loads the built images into the local cluster and installs the chart, as `make demo` and the cluster tests need it.
# With KUBECONFIG set from outside, images are not loaded: push them with REGISTRY=... make images first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/build/bin:$PATH"
# shellcheck source=/dev/null
. build/images/images.env
local_kubeconfig="${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig"
export KUBECONFIG="${KUBECONFIG:-$local_kubeconfig}"
if [ "$KUBECONFIG" = "$local_kubeconfig" ]; then
    tests/cluster/cluster load build/images/*.tar
fi
split() { # IMAGE -> repository and tag
    echo "${1%:*} ${1##*:}"
}
read -r operator_repository operator_tag <<<"$(split "$JOULECAST_OPERATOR_IMAGE")"
helm upgrade --install joulecast charts/joulecast --namespace joulecast-system --create-namespace --wait --timeout 2m \
    --set image.repository="$operator_repository" --set image.tag="$operator_tag" \
    --set "runtimes[0].image=$JOULECAST_RUNTIME_IMAGE" "$@"
