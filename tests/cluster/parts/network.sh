# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# A bridge in the root namespace, one virtual cable to each node, and a route to each node's pods. The root namespace gets
# no iptables rule and no changed setting; rules and forwarding are inside the nodes' own network namespaces.

cable() { printf 'jc-%s\n' "$1"; }

check_network() {
    local range taken
    for range in "$node_network.0/24" "$pod_network.0.0/16"; do
        taken=$(ip -4 route show root "$range" | grep -v "dev $bridge" || true)
        [ -z "$taken" ] || fail "$range is in use on this machine: $taken"
    done
}

bridge_up() {
    if ! ip link show "$bridge" >/dev/null 2>&1; then
        ip link add "$bridge" type bridge
        ip link set "$bridge" alias "$state" # tells a clone with another state directory whose cluster this is
    fi
    ip addr replace "$api_address/24" dev "$bridge"
    ip link set "$bridge" up
}

bridge_owner() { cat "/sys/class/net/$bridge/ifalias" 2>/dev/null || true; }

# connect NODE: cable and addresses; also mends what is half there, and joins a node that was cut off
connect() {
    local node=$1 init other
    init=$(pid_of "$node.init") || return 1
    if ! inside "$node" ip link show eth0 >/dev/null 2>&1; then
        ip link del "$(cable "$node")" 2>/dev/null || true # the other end of a cable to the last boot
        ip link add "$(cable "$node")" type veth peer name eth0 netns "$init"
    fi
    ip link set "$(cable "$node")" master "$bridge" up
    inside "$node" "$parts/node-network.sh" "$(node_address "$node")" "$service_range" "$service_address" "$api_address" "$api_port"
    for other in $(node_names); do
        [ "$other" = "$node" ] || inside "$node" ip route replace "$(node_pods "$other")" via "$(node_address "$other")"
    done
    ip route replace "$(node_pods "$node")" via "$(node_address "$node")" dev "$bridge" onlink
}

# A partition: the node runs on and reaches nobody.
cut_off() { ip link set "$(cable "$1")" down; }
plug_in() { ip link set "$(cable "$1")" up; }

disconnect() { ip link del "$(cable "$1")" 2>/dev/null || true; }

bridge_down() { ip link del "$bridge" 2>/dev/null || true; } # routes over it go with it
