#!/usr/bin/env bash
# The demo as on a cluster of one's own: the images are pushed to a registry and the nodes pull them from it. The cluster is
# the local one under another kubeconfig; the registry is Debian's docker-registry, on the cluster's bridge and without TLS.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/cluster/parts/settings.sh
. tests/cluster/parts/settings.sh
[ -r "$kubeconfig" ] || fail "no local cluster: run make cluster-up first"
registry=$api_address:15000
program=build/registry/usr/bin/docker-registry
work=$(mktemp -d)
served=''

end() {
	local rc=$?
	[ -z "$served" ] || kill "$served" 2>/dev/null || true
	# What comes after this uses the images of this machine.
	[ ! -f "$work/images.env" ] || cp "$work/images.env" build/images/images.env
	[ $rc -eq 0 ] || tail -20 "$work/registry.log" >&2 || true
	rm -rf "$work" "${registries:?}/$registry"
}
trap end EXIT

REGISTRY=$registry tests/cluster/setup.sh
if [ ! -x $program ]; then
	# Unpacked, not installed: the package would start a service.
	say "gets the Debian package docker-registry into build/registry"
	apt-get update -qq
	(cd "$work" && apt-get download -qq docker-registry)
	dpkg-deb -x "$work"/docker-registry_*.deb build/registry
fi

cat >"$work/registry.yml" <<YAML
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: $work/images}}
http: {addr: "$registry"}
YAML
$program serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
served=$!
retry 50 0.2 bash -c "true 2>/dev/null </dev/tcp/$api_address/15000" || fail "the registry does not answer"
# The nodes read it whenever they pull.
mkdir -p "$registries/$registry"
printf '[host."http://%s"]\ncapabilities = ["pull", "resolve"]\n' "$registry" >"$registries/$registry/hosts.toml"

cp build/images/images.env "$work/images.env"
cp "$kubeconfig" "$work/kubeconfig"
KUBECONFIG=$work/kubeconfig REGISTRY=$registry REGISTRY_TLS_VERIFY=false tests/demo/demo.sh | tee "$work/demo.log"

last=$(tail -1 "$work/demo.log")
[ "$last" = "export KUBECONFIG=$work/kubeconfig" ] || fail "the last line is not the kubeconfig of the user: $last"
for shown in STATE "-- what to try next" "file demo/results.jsonl on the volume" "joulecast results demo"; do
	grep -qF -- "$shown" "$work/demo.log" || fail "the demo does not end with: $shown"
done
[ "$(grep -c '^--- .* J (Modelled)$' "$work/demo.log")" = 3 ] || fail "the demo does not show three completions with their energy"
ran=$(kube get pods --namespace demo --selector joulecast.dev/inference-job=demo -o 'jsonpath={.items[*].spec.containers[*].image}')
case $ran in
	"$registry/joulecast/runtime:"*) ;;
	*) fail "the run's image is not the registry's: ${ran:-no pod}" ;;
esac
say "the demo ran from $registry"
