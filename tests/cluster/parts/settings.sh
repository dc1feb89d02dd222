# shellcheck shell=bash disable=SC2034  # the names below are read by the other parts
# Where things are and which addresses are used. One cluster per machine: bridge and addresses are fixed.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
bin=$repository/build/bin
parts=$repository/tests/cluster/parts
config=$repository/tests/cluster/config
pause_image=$repository/build/images/pause.tar

# The same directory for every clone, so that a second clone finds the cluster that runs.
state=$(realpath -m "${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}")
pki=$state/pki
logs=$state/log
pids=$state/pids
volumes=$state/volumes
registries=$state/registries           # HOST:PORT/hosts.toml, as containerd reads them whenever it pulls
kubeconfig=$state/kubeconfig
owner_mark=$state/.joulecast-cluster   # `up` makes it, `down --wipe` removes nothing without it
lock_file=/run/lock/joulecast-cluster.lock

bridge=jcbr0                 # in the root namespace; the API server listens on its address
node_network=10.240.0        # .1 is the bridge, .11 the first node, .12 the second
api_address=$node_network.1
api_port=16443
etcd_port=12379
service_range=10.96.0.0/16
service_address=10.96.0.1    # what pods know as the API server
pod_network=10.244           # 10.244.N.0/24 are the pods of the N-th node
default_nodes=(cpu-0 gpu-0 cpu-1 gpu-1)
most_nodes=8

say() { printf '%s\n' "$*"; }
warn() { printf 'cluster: %s\n' "$*" >&2; }
fail() { warn "$*"; exit 1; }
kube() { "$bin/kubectl" --kubeconfig "$kubeconfig" "$@"; }

# retry TRIES SECONDS COMMAND...: until the command succeeds; false if it never did
retry() {
    local tries=$1 pause=$2
    shift 2
    while ! "$@"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep "$pause"
    done
}

# The nodes in the order in which they were added, one a line; the position gives the addresses.
node_names() { if [ -f "$state/node-names" ]; then cat "$state/node-names"; fi; }

node_number() {
    local n
    n=$(node_names | grep -nxF -- "$1" | cut -d: -f1 || true)
    [ -n "$n" ] || fail "no node $1; there are: $(node_names | tr '\n' ' ')"
    printf '%s\n' "$n"
}
node_address() { printf '%s.%s\n' "$node_network" "$((10 + $(node_number "$1")))"; }
node_pods() { printf '%s.%s.0/24\n' "$pod_network" "$(node_number "$1")"; }
node_directory() { printf '%s/nodes/%s\n' "$state" "$1"; }

# add_nodes NAME...: remembers names that are not there yet
add_nodes() {
    local name
    for name in "$@"; do
        [[ $name =~ ^[a-z]([a-z0-9-]{0,10}[a-z0-9])?$ ]] ||
            fail "node name \"$name\": at most 12 of a-z, 0-9 and -, beginning with a letter (it is part of an interface name)"
        node_names | grep -xF -- "$name" >/dev/null && continue
        [ "$(node_names | wc -l)" -lt "$most_nodes" ] || fail "at most $most_nodes nodes"
        printf '%s\n' "$name" >>"$state/node-names"
    done
}
