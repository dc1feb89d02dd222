#!/usr/bin/env bash
# Tests the local cluster itself: everything that the other tests rely on, then crashes, then that nothing is left.
# Argument: how many nodes (default 1; partition and power cut are tested with 2). Its state is its own, so a cluster that
# somebody works with is not touched; only one can run at a time.
set -euo pipefail
nodes=${1:-1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
export JOULECAST_CLUSTER_DIR=/var/lib/joulecast-cluster-selftest
state=$JOULECAST_CLUSTER_DIR
scratch=$(mktemp -d)
PATH=$repository/build/bin:$PATH
export KUBECONFIG=$state/kubeconfig

cluster() { "$here/cluster" "$@"; }
step() { printf '%6.1f s  %s\n' "$(awk -v began="$began" '{print $1 - began}' /proc/uptime)" "$*"; }
fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}
# eventually SECONDS COMMAND...
eventually() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "never came true: $*"
        sleep 0.2
    done
}
contains() { grep -qF -- "$1" <<<"$2" || fail "expected \"$1\" in: $2"; }

# What `down` must leave as it was.
machine() {
    ip -br link | awk '{print $1}'
    ip -4 route
    sort /proc/mounts
    iptables-save | sed '/^#/d'
    find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name '*joulecast*'
    lsns -n -t net -o NS
    for parameter in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops net/ipv4/ip_forward \
        kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
        printf '%s %s\n' "$parameter" "$(<"/proc/sys/$parameter")"
    done
    ls -d /var/lib/kubelet /var/lib/cni /opt/containerd /run/containerd /run/netns 2>/dev/null || true
}

finish() {
    local result=$?
    [ "$result" = 0 ] || cluster status || true
    cluster down --wipe || result=1
    [ -z "$(cluster leaks)" ] || result=1
    rm -rf "$scratch"
    exit "$result"
}

# shellcheck source=selftest/probe.sh
. "$here/selftest/probe.sh"
# shellcheck source=selftest/faults.sh
. "$here/selftest/faults.sh"

began=$(cut -d' ' -f1 /proc/uptime)
"$here/setup.sh"
left=$(cluster leaks) || fail "not a clean start: $left"
[ ! -e "$state" ] || fail "$state is there; remove it with JOULECAST_CLUSTER_DIR=$state $here/cluster down --wipe"
machine >"$scratch/before"
trap finish EXIT

up_began=$SECONDS
cluster up --nodes "$nodes"
[ $((SECONDS - up_began)) -le 30 ] || fail "up took $((SECONDS - up_began)) s"
mapfile -t names <"$state/node-names"
[ ${#names[@]} = "$nodes" ] || fail "wanted $nodes nodes, got ${names[*]}"
step "up from nothing"
load_probe
run_probes
check_probes
step "probe pods: volume, logs, exec, port-forward, scraping, API server, refusals, audit"
! cluster leaks >/dev/null || fail "leaks sees nothing of a cluster that runs: it would see nothing of one that is left behind"
check_kubelet_restart
if [ "$nodes" -gt 1 ]; then
    check_partition
    check_power_cut
fi
check_crash
check_down_and_up
cluster down --wipe
[ ! -e "$state" ] || fail "down --wipe left $state"
cluster leaks || fail "something is left"
machine >"$scratch/after"
diff "$scratch/before" "$scratch/after" || fail "the machine is not as it was"
step "passed with $nodes node(s)"
