# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# What of the cluster is on this machine: after `down` nothing may be. One line for each thing.

leaks() {
    local pid
    for pid in $(marked); do
        [ "$pid" = $$ ] || dead "$pid" || say "process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | cut -c 1-100)"
    done
    cgroups_left | sed 's/^/cgroup /'
    grep -lsE '/joulecast-' /proc/[0-9]*/cgroup | sed 's/^/process in a cgroup of ours: /' || true
    awk -v state="$state/" 'index($2 "/", state) == 1 {print "mount " $2}' /proc/mounts
    ip -o link | awk -F': ' -v bridge="$bridge" '{sub(/@.*/, "", $2)} $2 == bridge || $2 ~ /^jc-/ {print "link " $2}'
    ip -4 route show | grep -E "^($pod_network|$node_network)\.|dev $bridge" | sed 's/^/route /' || true
    rules | sed 's/^/iptables rule /'
    changed_parameters | sed 's/^/kernel parameter /'
    if [ -f "$state/cgroup-controllers" ]; then sed 's/^/cgroup controllers enabled: /' "$state/cgroup-controllers"; fi
}

# We make rules in the nodes' namespaces only; these would be ours, the kubelet's or a network plugin's that got out.
rules() {
    local program
    for program in iptables ip6tables; do
        command -v "$program-save" >/dev/null || continue
        "$program-save" 2>/dev/null | grep -E "^(-A|:).*(KUBE-|CNI-|$bridge|$pod_network\.|$node_network\.|${service_address}/)" || true
    done
}
