# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# The files that containerd, its network plugins and the kubelet of one node read.

write_network_config() { # NODE FILE
    cat >"$2" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$(node_pods "$1")"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
}

# overlayfs does not work on every file system (not on another overlay, as in a container)
snapshotter() { # DIRECTORY
    local probe=$1/overlay-probe
    mkdir -p "$probe"/{lower,upper,work,merged}
    if unshare -m mount -t overlay overlay "$probe/merged" \
        -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" 2>/dev/null; then
        say overlayfs
    else
        say native
    fi
    rm -rf "$probe"
}

write_containerd_config() { # NODE FILE
    local directory
    directory=$(node_directory "$1")
    # restrict_oom_score_adj: root lacks CAP_SYS_RESOURCE in many containers and virtual machines, and then no sandbox starts
    cat >"$2" <<TOML
version = 2
root = "$directory/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$directory/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/joulecast/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "$registries"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$directory/network"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$(snapshotter "$directory")"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
TOML
}

write_kubelet_config() { # NODE FILE
    local node=$1 directory nodes memory_ki
    directory=$(node_directory "$node")
    nodes=$(node_names | wc -l)
    memory_ki=$(awk '/^MemTotal:/ {print $2}' /proc/meminfo)
    # Every node sees the whole machine, so each reserves what belongs to the others.
    # NeverVerify: an image that was loaded stays usable when the same one was pulled from a registry under another name.
    # clusterDNS: nothing answers there; without it each pod gets a warning event.
    cat >"$2" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /joulecast-$node
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
systemReserved:
  cpu: $(($(nproc) * 1000 * (nodes - 1) / nodes))m
  memory: $((memory_ki * (nodes - 1) / nodes))Ki
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
imageServiceEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: $directory/volume-plugins
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $pki/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: $pki/kubelet-$node-server.crt
tlsPrivateKeyFile: $pki/kubelet-$node-server.key
clusterDomain: cluster.local
clusterDNS: [${service_address%.*}.10]
resolvConf: ""
address: $(node_address "$node")
port: 10250
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
healthzPort: 10248
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
imageMinimumGCAge: 24h
containerLogMaxSize: 10Mi
nodeStatusUpdateFrequency: 2s
nodeStatusReportFrequency: 10s
nodeLeaseDurationSeconds: 8
syncFrequency: 10s
registerNode: true
imagePullCredentialsVerificationPolicy: NeverVerify
YAML
}
