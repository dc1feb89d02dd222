#!/usr/bin/env bash
# Checks the chart without a cluster: lint, the rendering of the default values against tests/chart.golden.yaml (so that
# every change of a permission shows in a diff), the renderings of other values, and that wrong values are refused by
# name. REWRITE=1 rewrites the golden file. What needs an API server is in the cluster tests.
set -euo pipefail
cd "$(dirname "$0")/.."

chart=charts/joulecast
golden=tests/chart.golden.yaml
# A key of its own would differ in every rendering.
fixed=(--set progressKey.existingSecret=given)
PATH=$PWD/build/bin:$PATH
if ! command -v helm >/dev/null; then
	echo "chart: helm is not installed: make setup" >&2
	exit 1
fi

fail() {
	echo "chart: $*" >&2
	exit 1
}

render() { helm template joulecast "$chart" --namespace joulecast-system "$@"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

helm lint --strict --quiet "$chart"

render "${fixed[@]}" --set crds.install=false >"$work/rendered.yaml"
if [ -n "${REWRITE:-}" ]; then
	cp "$work/rendered.yaml" "$golden"
fi
diff -u "$golden" "$work/rendered.yaml" || fail "$golden is stale: run \`make generate\` and commit the result"

# Least privilege, stated once more where a reviewer of the golden file cannot overlook it.
sed -n '/^kind: \(Cluster\)\?Role$/,/^---/p' "$work/rendered.yaml" >"$work/roles.yaml"
grep -q '^rules:' "$work/roles.yaml" || fail "no roles in the rendering: this check looks at nothing"
if grep -nE '"\*"|\[\*\]|- \*|secrets|configmaps|impersonate|escalate|\bbind\b|pods/exec' "$work/roles.yaml"; then
	fail "a role holds a wildcard, Secrets or a verb that widens rights"
fi

# The node agent: what it sees of a node and what it may do stands in a golden file of its own.
agent_golden=tests/chart.agent.golden.yaml
agent=(--set agent.enabled=true)
for template in namespace rbac policy daemonset forget; do agent+=(-s "templates/agent/$template.yaml"); done
render "${fixed[@]}" "${agent[@]}" >"$work/agent.yaml"
if [ -n "${REWRITE:-}" ]; then
	cp "$work/agent.yaml" "$agent_golden"
fi
diff -u "$agent_golden" "$work/agent.yaml" || fail "$agent_golden is stale: run \`make generate\` and commit the result"
! grep -nE 'hostPID|hostNetwork|hostIPC|privileged: true|add:' "$work/agent.yaml" || fail "the agent asks for more than its hostPaths"
[ "$(grep -c 'hostPath:' "$work/agent.yaml")" = 5 ] || fail "the agent's hostPaths are not the five that docs/node-agent.md lists"
! grep -q 'device-plugin' "$work/rendered.yaml" || fail "agent.enabled=false leaves something of the agent"
render "${fixed[@]}" --set agent.enabled=true >"$work/slots.yaml"
grep -q 'slots: \[cpu\]' "$work/slots.yaml" || fail "with the agent, runs do not ask for slots"
# GPUs: a DaemonSet of their own, and none of it elsewhere.
gpus() { render "${fixed[@]}" --set agent.enabled=true,agent.cuda.enabled=true,agent.cuda.devices="$1"; }
gpus CDI >"$work/cdi.yaml"
[ "$(grep -c '^kind: DaemonSet' "$work/cdi.yaml")" = 2 ] || fail "GPUs have no DaemonSet of their own"
[ "$(grep -c 'path: /var/run/cdi' "$work/cdi.yaml")" = 1 ] || fail "CDI: its directory is to be mounted once"
for line in '--cuda=cdi' 'runtimeClassName: nvidia' 'nvidia.com/gpu.present, operator: NotIn' 'slots: \[cpu, cuda\]'; do
	grep -q -e "$line" "$work/cdi.yaml" || fail "agent.cuda: no $line"
done
gpus NvidiaPlugin >"$work/plugin.yaml"
grep -q 'gpuResource: nvidia.com/gpu' "$work/plugin.yaml" || fail "NVIDIA's plugin: runs do not ask for nvidia.com/gpu"
! grep -q '/var/run/cdi' "$work/plugin.yaml" || fail "NVIDIA's plugin: the agent has no use for CDI"

# The CRDs are there by default and stay on uninstall; the key is made unless one is given.
render >"$work/default.yaml"
crds=$(grep -c '^kind: CustomResourceDefinition$' "$work/default.yaml")
kept=$(grep -c 'helm.sh/resource-policy: keep' "$work/default.yaml")
if [ "$crds" -lt 4 ] || [ "$crds" != "$kept" ]; then
	fail "$crds CRDs, $kept of them kept on uninstall"
fi
grep -q '^kind: Secret$' "$work/default.yaml" || fail "no progress key by default"
! grep -q '^kind: Secret$' "$work/rendered.yaml" || fail "a progress key in spite of existingSecret"

render --set metrics.serviceMonitor.enabled=true --set metrics.serviceMonitor.labels.release=prometheus >"$work/monitor.yaml"
grep -q '^kind: ServiceMonitor$' "$work/monitor.yaml" || fail "serviceMonitor.enabled gives no ServiceMonitor"
render --set userRoles.install=false >"$work/no-roles.yaml"
! grep -q 'aggregate-to-view' "$work/no-roles.yaml" || fail "userRoles.install=false leaves roles"
render --set networkPolicy.enabled=false >"$work/open.yaml"
! grep -qi 'networkpolic' "$work/open.yaml" || fail "networkPolicy.enabled=false leaves a policy or the right to make one"
render --set 'extraRuntimes[0].image=r:1,extraRuntimes[0].engines={llamacpp},extraRuntimes[0].providers={cpu}' \
	--set watts.busyMilliwattsPerCpu=7000,watts.idleMilliwattsPerCpu=1500 \
	--set 'energyModels.learnFrom={Measured,Modelled}' \
	--set devices.cpu.memoryGigabytesPerSecond=80,devices.cpu.gigaflops=1500,devices.cpu.idleWatts=20,devices.cpu.maxWatts=120 \
	>"$work/more.yaml"
for text in 'image: "r:1"' 'engines: \["llamacpp"\]' 'busyMilliwattsPerCpu: 7000' 'learnFrom: \["Measured","Modelled"\]' 'gigaflops: 1500'; do
	grep -q "$text" "$work/more.yaml" || fail "the operator's configuration lacks $text"
done
helm template other "$chart" --namespace elsewhere >"$work/other.yaml"
grep -q '^  name: other-joulecast-operator$' "$work/other.yaml" || fail "the release's name does not prefix its objects"

# Each wrong value is refused, and the message names the field.
refused() {
	local field=$1
	shift
	if render "$@" >"$work/out" 2>"$work/err"; then
		fail "accepted: $*"
	fi
	grep -q "$field" "$work/err" || { cat "$work/err" >&2; fail "the refusal of $* does not name $field"; }
}
refused replica --set operator.replica=2
refused replicas --set operator.replicas=-1
refused unreachableSeconds --set retries.unreachableSeconds=0
refused engines --set 'runtime.engines={tensorrt}'
refused progressSeconds --set progressSeconds=0
refused idleMilliwattsPerCpu --set watts.busyMilliwattsPerCpu=7000
refused image --set operator.image=no-tag
refused providers --set 'extraRuntimes[0].image=r:1,extraRuntimes[0].engines={candle}'
refused learnFrom --set 'energyModels.learnFrom={Guessed}'
refused maxWatts --set devices.cpu.idleWatts=5
refused logFormat --set operator.logFormat=xml
refused imagePullPolicy --set operator.imagePullPolicy=Sometimes
refused install --set-string crds.install=yes
refused kubeletDirectory --set agent.kubeletDirectory=relative
refused idleWatts --set agent.idleWatts=-1
refused devices --set agent.cuda.devices=Everything
refused nodeSelector --set agent.cuda.nodeSelector=null
refused nodeAffinity --set agent.enabled=true,agent.cuda.enabled=true,agent.affinity.nodeAffinity.x=y
refused unknownThing --set unknownThing=1

echo "chart: lint, golden rendering and $(grep -c '^refused ' "$0") refusals are as expected"
