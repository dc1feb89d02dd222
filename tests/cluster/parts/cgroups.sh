# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# One cgroup per node, /joulecast-NODE, in every hierarchy there is (cgroup v1, hybrid or v2). The kubelet puts the
# node's pods under it. Nothing that was there before is changed, but for v2 controllers that `release_cgroups` gives back.

cgroup_root=/sys/fs/cgroup

# The mounted hierarchies. On v1 the root is a tmpfs with one directory for each; co-mounted ones have links beside them.
hierarchies() {
    if [ -f $cgroup_root/cgroup.controllers ]; then
        say $cgroup_root
    else
        find $cgroup_root -mindepth 1 -maxdepth 1 -type d
    fi
}

make_cgroups() {
    local group=joulecast-$1 hierarchy controller wanted=
    while read -r hierarchy; do
        if [ -f "$hierarchy/cgroup.controllers" ]; then
            for controller in cpu cpuset memory pids io; do
                grep -qw "$controller" "$hierarchy/cgroup.controllers" || continue
                grep -qw "$controller" "$hierarchy/cgroup.subtree_control" || wanted+=" +$controller"
            done
            if [ -n "$wanted" ]; then
                printf '%s\n' "$wanted" 2>/dev/null >"$hierarchy/cgroup.subtree_control" ||
                    fail "cannot enable$wanted in $hierarchy/cgroup.subtree_control; in a container, start it with --cgroupns=host"
                printf '%s %s\n' "$hierarchy" "${wanted//+/-}" >>"$state/cgroup-controllers"
            fi
        fi
        mkdir -p "$hierarchy/$group"
        if [ -f "$hierarchy/cpuset.cpus" ] && [ ! -f "$hierarchy/cgroup.controllers" ]; then # v1: a new cpuset is empty and takes no process
            cat "$hierarchy/cpuset.cpus" >"$hierarchy/$group/cpuset.cpus"
            cat "$hierarchy/cpuset.mems" >"$hierarchy/$group/cpuset.mems"
        fi
    done < <(hierarchies)
}

# cgroups_left [NODE]: the node's top cgroups that still exist; without an argument every node's
cgroups_left() { find $cgroup_root -mindepth 1 -maxdepth 2 -type d -name "joulecast-${1:-*}" 2>/dev/null; }

no_cgroups_left() {
    local top
    for top in $(cgroups_left "$1"); do find "$top" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
    [ -z "$(cgroups_left "$1")" ]
}

# Removes a node's cgroups. Also before a boot: each container of the last boot costs the kubelet 3 s if its cgroup is left.
remove_cgroups() { retry 50 0.1 no_cgroups_left "$1" || warn "cgroups left: $(cgroups_left "$1" | tr '\n' ' ')"; }

release_cgroups() {
    local hierarchy controllers
    [ -f "$state/cgroup-controllers" ] || return 0
    while read -r hierarchy controllers; do
        # somebody else may use them by now, then they stay
        printf '%s\n' "$controllers" 2>/dev/null >"$hierarchy/cgroup.subtree_control" || true
    done <"$state/cgroup-controllers"
    rm -f "$state/cgroup-controllers"
}
