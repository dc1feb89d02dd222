# shellcheck shell=bash disable=SC2154  # sourced by selftest.sh, which sets what is named here
# Restarts, partitions, power cuts and crashes.

restarts() { kubectl get -n probe pod "on-$1" -o 'jsonpath={.status.containerStatuses[0].restartCount}'; }
started() { kubectl get -n probe pod "on-$1" -o 'jsonpath={.status.containerStatuses[0].state.running.startedAt}'; }
ready_is() { [ "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = "$2" ]; }
probe_ready() { [ "$(kubectl get -n probe pod "on-$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
lines_written() { wc -l <"$state/volumes/$(kubectl get -n probe pvc data -o 'jsonpath={.spec.volumeName}')/$1"; }

written_again() { [ "$(lines_written "$1")" -gt "$2" ]; }

check_kubelet_restart() {
    local name=${names[0]} before
    before=$(started "$name")
    cluster kubelet "$name" stop
    eventually 30 ready_is "$name" Unknown
    cluster kubelet "$name" start
    eventually 30 ready_is "$name" True
    eventually 30 probe_ready "$name"
    [ "$(started "$name")" = "$before" ] || fail "the pod did not outlive its kubelet"
    step "kubelet stopped and started: the pod ran on"
}

check_partition() {
    local name=${names[1]} lines
    lines=$(lines_written "$name")
    cluster node "$name" cut
    eventually 30 ready_is "$name" Unknown
    cluster exec "$name" true || fail "a partitioned node does not run"
    cluster node "$name" join
    eventually 30 ready_is "$name" True
    eventually 30 probe_ready "$name"
    [ "$(lines_written "$name")" = "$lines" ] || fail "the pod was started again in a partition"
    step "partition: not ready, and ready again; the pod ran on"
}

check_power_cut() {
    local name=${names[1]} lines
    lines=$(lines_written "$name")
    cluster node "$name" off
    eventually 30 ready_is "$name" Unknown
    if cluster exec "$name" true 2>/dev/null; then fail "a node without power runs"; fi
    cluster node "$name" on
    eventually 30 ready_is "$name" True
    eventually 60 probe_ready "$name"
    written_again "$name" "$lines" || fail "the pod was not started again after a power cut"
    step "power cut: not ready, and ready again; the pod started again"
}

# Kills exactly what is recorded, and nothing has time to clean up.
check_crash() {
    local name pid began_up
    declare -A lines
    for name in "${names[@]}"; do lines[$name]=$(lines_written "$name"); done
    for name in "$state"/pids/*; do
        read -r pid _ <"$name"
        kill -KILL "$pid" 2>/dev/null || true
    done
    began_up=$SECONDS
    cluster up
    step "crash of everything, then up (in $((SECONDS - began_up)) s)"
    for name in "${names[@]}"; do
        eventually 60 probe_ready "$name"
        eventually 60 written_again "$name" "${lines[$name]}"
    done
    step "after the crash: the pods run again, the volume is what it was"
    # a lost record must not lose a process
    rm "$state/pids/kube-scheduler"
}

check_down_and_up() {
    cluster down
    cluster leaks || fail "down left something"
    cluster up
    cluster up | grep "^export KUBECONFIG=$KUBECONFIG\$" >/dev/null || fail "up does not end with the kubeconfig"
    cluster status >/dev/null || fail "the cluster is not complete"
    kubectl get -n probe pvc data >/dev/null || fail "down without --wipe forgot what was there"
    local volume
    volume=$(kubectl get -n probe pvc data -o 'jsonpath={.spec.volumeName}')
    kubectl delete -n probe pods,persistentvolumeclaims --all --timeout=60s >/dev/null
    eventually 30 [ ! -e "$state/volumes/$volume" ]
    step "down, up, and the volume went with its claim"
}
