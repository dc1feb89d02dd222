# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# A node: namespaces of its own with containerd and a kubelet in them.

# The containerd of a node is Debian's, or one from build/bin/cdi that knows CDI: a file in the node's directory says so.
mark_cdi() { # NODE...: of those that are not there yet
    local node
    for node in "$@"; do
        node_names | grep -xF -- "$node" >/dev/null && continue
        mkdir -p "$(node_directory "$node")"
        touch "$(node_directory "$node")/cdi"
    done
}
containerd_path() { if [ -e "$(node_directory "$1")/cdi" ]; then printf '%s\n' "$bin/cdi:$PATH"; else printf '%s\n' "$PATH"; fi; }

ctr() { local node=$1; shift; inside "$node" ctr -n k8s.io "$@"; }
containerd_ready() { ctr "$1" version >/dev/null 2>&1; }
booted() { [ -e "$(node_directory "$1")/booted" ]; }

# "Power on": namespaces, network, cgroups, containerd. Idempotent.
machine_up() {
    local node=$1 directory log outer
    directory=$(node_directory "$node")
    mkdir -p "$directory"/{kubelet,cni,log,cgroup,containerd,network,opt} /var/lib/kubelet /var/lib/cni
    if ! running "$node.init"; then
        stop KILL "$node.unshare" "$node.containerd" "$node.kubelet"
        rm -f "$directory/booted"
        remove_cgroups "$node"
        log=$(log_of "$node.init")
        background "$log" unshare -m -p -n -u --fork --kill-child=KILL \
            "$parts/node-init.sh" "$node" "$directory" "$bin/pause" &
        outer=$!
        record "$node.unshare" "$outer"
        record "$node.init" "$(child_in_namespace "$outer")"
        retry 250 0.02 booted "$node" || fail "node $node did not boot: $(tail -n 3 "$logs/$node.init.log")"
    fi
    make_cgroups "$node"
    connect "$node"
    write_network_config "$node" "$directory/network/10-pods.conflist"
    if ! running "$node.containerd"; then
        write_containerd_config "$node" "$directory/containerd.toml"
        node_daemon "$node" containerd env PATH="$(containerd_path "$node")" containerd -c "$directory/containerd.toml"
    fi
    retry 150 0.1 containerd_ready "$node" || fail "containerd of $node is not ready: $(tail -n 3 "$logs/$node.containerd.log")"
    [ -n "$(ctr "$node" images ls -q name==localhost/joulecast/pause:1)" ] || load_image "$node" "$pause_image" >/dev/null
}

# load_image NODE TAR: prints the names; from standard input, because the node may not see every mount of this machine
load_image() { ctr "$1" images import - <"$2" | sed -n 's/^unpacking \([^ ]*\) .*/\1/p'; }

# A node that is new gets the images that the others have been given before.
copy_images() {
    local node=$1 other missing
    for other in $(node_names); do
        if [ "$other" = "$node" ] || ! running "$other.containerd"; then continue; fi
        mapfile -t missing < <(comm -13 <(image_names "$node") <(image_names "$other"))
        [ ${#missing[@]} -eq 0 ] || ctr "$other" images export - "${missing[@]}" | ctr "$node" images import - >/dev/null
    done
}
image_names() { ctr "$1" images ls -q name~=^localhost/ | sort; }

kubelet_up() {
    local node=$1 directory
    directory=$(node_directory "$node")
    write_kubelet_config "$node" "$directory/kubelet.yaml.new"
    if ! cmp -s "$directory/kubelet.yaml.new" "$directory/kubelet.yaml"; then
        stop TERM "$node.kubelet" # it reads its file only at the start; pods run on
        mv "$directory/kubelet.yaml.new" "$directory/kubelet.yaml"
    fi
    rm -f "$directory/kubelet.yaml.new"
    node_daemon "$node" kubelet "$bin/kubelet" --config "$directory/kubelet.yaml" --kubeconfig "$pki/kubelet-$node.conf" \
        --hostname-override "$node" --node-ip "$(node_address "$node")"
}

# "Power cut": nothing in the node gets a chance to say goodbye.
machine_down() {
    local node=$1
    stop KILL "$node.init"
    stop KILL "$node.unshare" "$node.containerd" "$node.kubelet"
    disconnect "$node"
    remove_cgroups "$node"
}

# The others get their share of the machine back. Addresses go by position, so only the last one can go.
remove_node() {
    local node=$1 other
    [ "$(node_names | tail -n 1)" = "$node" ] && [ "$(node_names | wc -l)" -gt 1 ] ||
        fail "only the node that was added last can be removed, and not the only one; there are: $(node_names | tr '\n' ' ')"
    machine_down "$node"
    kube delete node "$node" --ignore-not-found >/dev/null
    sed -i '$d' "$state/node-names"
    rm -rf --one-file-system "$state/nodes/$node"
    for other in $(node_names); do kubelet_up "$other"; done
    for other in $(node_names); do wait_for_node "$other"; done
}

# Ready, with a heartbeat of this kubelet (what is stored may be of the last boot), and pods may be placed there.
node_ready() {
    local node=$1 ready heartbeat taints
    running "$node.kubelet" || return 1
    IFS='|' read -r ready heartbeat taints < <(kube get node "$node" -o 'jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status}|{.lastHeartbeatTime}|{end}{.spec.taints[*].key}{"\n"}' 2>/dev/null) || return 1
    [ "$ready" = True ] && [ "$(date -d "$heartbeat" +%s)" -ge "$(stat -c %Y "$pids/$node.kubelet")" ] || return 1
    [[ $taints != *node.kubernetes.io/not-ready* && $taints != *node.kubernetes.io/unreachable* ]]
}

wait_for_node() {
    retry 300 0.2 node_ready "$1" || fail "node $1 is not ready after 60 s: $(tail -n 3 "$logs/$1.kubelet.log")"
}
