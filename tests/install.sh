#!/usr/bin/env bash
# Installs the chart with the images that build/images/images.env names, in the cluster of KUBECONFIG (absent: the local one).
# The demo and the cluster tests stand on it. The local cluster has no meters, so estimates may correct energy models there;
# with JOULECAST_LEARN_FROM set and empty the chart's own value holds. Further arguments go to helm.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/build/bin:$PATH"
export KUBECONFIG="${KUBECONFIG:-${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig}"
# shellcheck source=/dev/null
. build/images/images.env
learn=${JOULECAST_LEARN_FROM-'{Measured,Modelled}'}
helm upgrade --install joulecast charts/joulecast --namespace joulecast-system --create-namespace --wait --timeout 3m \
	--set-string operator.image="$JOULECAST_OPERATOR_IMAGE" --set-string runtime.image="$JOULECAST_RUNTIME_IMAGE" \
	--set-string agent.image="$JOULECAST_DEVICE_PLUGIN_IMAGE" \
	${learn:+--set "energyModels.learnFrom=$learn"} "$@"
