# shellcheck shell=bash disable=SC2154  # sourced by selftest.sh, which sets what is named here
# One probe pod per node, of the `restricted` profile, all on one volume: a small web server that writes a file first.

load_probe() {
    # a shell and a web server; unpacked only, so that nothing of the machine changes
    (cd "$scratch" && { download busybox 2>/dev/null || { apt-get update -qq && download busybox; }; } && dpkg-deb -x busybox_*.deb unpacked)
    busybox=$scratch/unpacked/bin/busybox
    probe_image=$("$repository/charts/images/layout.py" image --name localhost/joulecast/probe \
        --out "$scratch/probe.tar" "$busybox" "$(command -v openssl)" 2>/dev/null)
    local loaded name
    loaded=$(cluster load "$scratch/probe.tar")
    for name in "${names[@]}"; do contains "$name: $probe_image" "$loaded"; done
}

download() { apt-get download -qq -o APT::Sandbox::User=root "$1"; }

run_probes() {
    local name
    kubectl apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Namespace
metadata:
  name: probe
  labels: {pod-security.kubernetes.io/enforce: restricted}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: probe}
spec:
  accessModes: [ReadWriteMany]
  resources: {requests: {storage: 1Mi}}
YAML
    eventually 20 kubectl get -n probe serviceaccount default
    for name in "${names[@]}"; do probe_pod "$name" | kubectl apply -f - >/dev/null; done
    kubectl wait -n probe --for=condition=Ready pod --all --timeout=60s >/dev/null || fail "no probe pod runs: $(kubectl describe -n probe pods)"
}

probe_pod() {
    cat <<YAML
apiVersion: v1
kind: Pod
metadata: {name: on-$1, namespace: probe}
spec:
  nodeName: $1
  terminationGracePeriodSeconds: 0
  tolerations: [{operator: Exists}]
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: probe
      image: $probe_image
      imagePullPolicy: Never
      args: [sh, -c, 'echo "\$(busybox id -u) on $1" >>/data/$1 && echo written && exec busybox httpd -f -v -p 8080 -h /data']
      readinessProbe: {httpGet: {path: /$1, port: 8080}, periodSeconds: 1}
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 32Mi}}
      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
YAML
}

in_probe() { # NODE COMMAND...
    local name=$1
    shift
    kubectl exec -i -n probe "on-$name" -- "$@"
}

check_probes() {
    local name other address volume served
    volume=$(kubectl get -n probe pvc data -o 'jsonpath={.spec.volumeName}')
    for name in "${names[@]}"; do
        contains "65532 on $name" "$(cat "$state/volumes/$volume/$name")"
        contains written "$(kubectl logs -n probe "on-$name")"
        address=$(kubectl get -n probe pod "on-$name" -o 'jsonpath={.status.podIP}')
        contains "65532 on $name" "$(timeout 5 "$busybox" wget -qO- "http://$address:8080/$name")" # from the root namespace
        for other in "${names[@]}"; do # the same volume, and the network from pod to pod
            contains "65532 on $other" "$(in_probe "$name" busybox cat "/data/$other")"
            contains "65532 on $name" "$(in_probe "$other" busybox timeout 5 busybox wget -qO- "http://$address:8080/$name")"
        done
        # the API server under its service address, by a certificate that the pod's own CA bundle vouches for
        # shellcheck disable=SC2016  # the pod expands it
        in_probe "$name" busybox sh -c 'exec /usr/bin/openssl s_client -verify_return_error -verify_ip $KUBERNETES_SERVICE_HOST \
            -CAfile /var/run/secrets/kubernetes.io/serviceaccount/ca.crt -connect $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT' \
            </dev/null >/dev/null 2>"$scratch/tls" || fail "$name: no way to the API server: $(cat "$scratch/tls")"
    done
    check_port_forward
    # what must be refused
    name=${names[0]}
    refused "violates PodSecurity" "$(probe_pod "$name" | sed 's/runAsNonRoot: true/runAsNonRoot: false/; s/name: on-.*, names/name: root, names/' | kubectl apply -f - 2>&1 || true)"
    refused "cannot list resource \"secrets\"" "$(kubectl --kubeconfig "$state/pki/kubelet-$name.conf" get secrets -A 2>&1 || true)"
    refused "is not allowed to modify labels" "$(kubectl --kubeconfig "$state/pki/kubelet-$name.conf" label node "$name" node-restriction.kubernetes.io/x=y 2>&1 || true)"
    refused "Unauthorized" "$(kubectl --kubeconfig /dev/null --server https://10.240.0.1:16443 --insecure-skip-tls-verify --token no get pods 2>&1 || true)"
    grep -q '"verb":"create".*"resource":"persistentvolumeclaims","namespace":"probe","name":"data"\|"verb":"patch".*"resource":"persistentvolumeclaims"' "$state/log/audit.log" || fail "the claim is not in the audit log"
    [ "$(stat -c %a "$KUBECONFIG")" = 600 ] || fail "$KUBECONFIG is readable by others"
}

refused() { contains "$1" "$2"; }

check_port_forward() {
    local forwarder
    kubectl port-forward -n probe "pod/on-${names[0]}" :8080 >"$scratch/forward" &
    forwarder=$!
    eventually 10 grep -q Forwarding "$scratch/forward"
    served=$(timeout 5 "$busybox" wget -qO- "http://127.0.0.1:$(sed -n '1s/.*127.0.0.1:\([0-9]*\) .*/\1/p' "$scratch/forward")/${names[0]}")
    kill "$forwarder"
    wait "$forwarder" 2>/dev/null || true
    contains "65532 on ${names[0]}" "$served"
}
