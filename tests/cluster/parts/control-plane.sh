# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# etcd, API server, controller manager, scheduler and volume provisioner, in the root namespaces. The times are short so
# that a test sees a lost node within seconds: NotReady after 12 s, its pods evicted 8 s later.

api_ready() { [ "$(kube get --raw /readyz 2>/dev/null)" = ok ]; }

start_etcd() {
    # without fsync: a power cut of the whole machine may lose the state of a test cluster, nothing else does
    daemon etcd "$bin/etcd" --data-dir "$state/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
        --listen-peer-urls "http://127.0.0.1:$((etcd_port + 1))" \
        --initial-advertise-peer-urls "http://127.0.0.1:$((etcd_port + 1))" \
        --initial-cluster "default=http://127.0.0.1:$((etcd_port + 1))"
}

start_apiserver() {
    daemon kube-apiserver "$bin/kube-apiserver" --etcd-servers "http://127.0.0.1:$etcd_port" \
        --bind-address "$api_address" --secure-port "$api_port" --advertise-address "$api_address" \
        --endpoint-reconciler-type none --service-cluster-ip-range "$service_range" \
        --tls-cert-file "$pki/apiserver.crt" --tls-private-key-file "$pki/apiserver.key" --client-ca-file "$pki/ca.crt" \
        --anonymous-auth=false --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction,PodSecurity \
        --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$pki/service-accounts.pub" \
        --service-account-signing-key-file "$pki/service-accounts.key" \
        --kubelet-client-certificate "$pki/apiserver-to-kubelet.crt" --kubelet-client-key "$pki/apiserver-to-kubelet.key" \
        --kubelet-certificate-authority "$pki/ca.crt" --kubelet-preferred-address-types InternalIP \
        --default-not-ready-toleration-seconds 8 --default-unreachable-toleration-seconds 8 \
        --audit-policy-file "$config/audit-policy.yaml" --audit-log-path "$logs/audit.log" \
        --audit-log-maxsize 32 --audit-log-maxbackup 1 --allow-privileged=true --profiling=false
}

# component NAME FLAG...: one that knows the API server by its own kubeconfig
component() {
    local name=$1
    shift
    daemon "$name" "$bin/$name" --kubeconfig "$pki/$name.conf" --authentication-kubeconfig "$pki/$name.conf" \
        --authorization-kubeconfig "$pki/$name.conf" --leader-elect=false --bind-address 127.0.0.1 "$@"
}

control_plane_up() {
    start_etcd
    start_apiserver
    retry 300 0.1 api_ready || fail "the API server is not ready after 30 s: $(tail -n 3 "$logs/kube-apiserver.log")"
    component kube-controller-manager --use-service-account-credentials --root-ca-file "$pki/ca.crt" \
        --service-account-private-key-file "$pki/service-accounts.key" --service-cluster-ip-range "$service_range" \
        --cluster-signing-cert-file "$pki/ca.crt" --cluster-signing-key-file "$pki/ca.key" \
        --node-monitor-period 1s --node-monitor-grace-period 12s --node-startup-grace-period 20s
    component kube-scheduler
    daemon volume-provisioner "$bin/volume-provisioner" --kubeconfig "$pki/volume-provisioner.conf" --directory "$volumes"
    kube apply --server-side --force-conflicts -f "$config/storage.yaml" >/dev/null
}

# control_plane_down SIGNAL: etcd last, so that the others can finish their writes
control_plane_down() {
    stop "$1" volume-provisioner kube-scheduler kube-controller-manager kube-apiserver
    stop "$1" etcd
}
