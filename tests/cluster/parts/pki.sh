# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# The cluster's certificates and kubeconfigs, made once with openssl, and all again when they are about to expire.

days=365

# certificate NAME SUBJECT [-CA FILE -CAkey FILE] EXTENSION...: key and certificate, unless they are there
certificate() {
    local name=$1 subject=$2 authority=() extensions=() extension
    shift 2
    [ -f "$pki/$name.crt" ] && return
    if [ "$1" = -CA ]; then
        authority=("${@:1:4}")
        shift 4
    fi
    for extension in "$@"; do extensions+=(-addext "$extension"); done
    # an empty configuration, because the system's would make every certificate a CA
    openssl req -x509 -config <(printf '[req]\ndistinguished_name=dn\n[dn]\n') -days "$days" -subj "$subject" \
        -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout "$pki/$name.key" -out "$pki/$name.new" \
        "${authority[@]}" "${extensions[@]}" 2>"$pki/openssl.log" || fail "openssl: $(<"$pki/openssl.log")"
    mv "$pki/$name.new" "$pki/$name.crt" # so a certificate that is there is complete, and so is its key
}

# signed NAME SUBJECT USAGE [SUBJECT_ALT_NAME]
signed() {
    certificate "$1" "$2" -CA "$pki/ca.crt" -CAkey "$pki/ca.key" basicConstraints=critical,CA:FALSE \
        keyUsage=critical,digitalSignature "extendedKeyUsage=$3" ${4:+"subjectAltName=$4"}
}

# write_kubeconfig NAME FILE: self-contained, so that it can be copied
write_kubeconfig() {
    (umask 077 && cat >"$2.new") <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: joulecast-local
    cluster:
      server: https://$api_address:$api_port
      certificate-authority-data: $(base64 -w0 "$pki/ca.crt")
users:
  - name: $1
    user:
      client-certificate-data: $(base64 -w0 "$pki/$1.crt")
      client-key-data: $(base64 -w0 "$pki/$1.key")
contexts:
  - name: joulecast-local
    context: {cluster: joulecast-local, user: $1}
current-context: joulecast-local
YAML
    mv "$2.new" "$2"
}

make_pki() {
    mkdir -p "$pki"
    chmod 0700 "$pki"
    # the authority is the oldest of them, so it expires first
    if [ -f "$pki/ca.crt" ] && ! openssl x509 -in "$pki/ca.crt" -noout -checkend $((7 * 86400)) >/dev/null; then
        say "the certificates expire within a week: making new ones"
        find "$pki" -type f ! -name 'service-accounts.*' -delete
    fi
    certificate ca /CN=joulecast-local basicConstraints=critical,CA:TRUE keyUsage=critical,keyCertSign,digitalSignature
    signed apiserver /CN=kube-apiserver serverAuth \
        "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$api_address,IP:$service_address"
    signed apiserver-to-kubelet /O=system:masters/CN=kube-apiserver clientAuth
    signed admin /O=system:masters/CN=admin clientAuth
    signed kube-controller-manager /CN=system:kube-controller-manager clientAuth
    signed kube-scheduler /CN=system:kube-scheduler clientAuth
    signed volume-provisioner /CN=joulecast-local:volume-provisioner clientAuth
    local node address name
    for node in $(node_names); do
        address=$(node_address "$node")
        signed "kubelet-$node" "/O=system:nodes/CN=system:node:$node" clientAuth
        signed "kubelet-$node-server" "/O=system:nodes/CN=system:node:$node" serverAuth "DNS:$node,IP:$address"
        write_kubeconfig "kubelet-$node" "$pki/kubelet-$node.conf"
    done
    if [ ! -f "$pki/service-accounts.pub" ]; then
        openssl genrsa -out "$pki/service-accounts.key" 2048 2>/dev/null
        openssl rsa -in "$pki/service-accounts.key" -pubout -out "$pki/service-accounts.pub" 2>/dev/null
    fi
    for name in kube-controller-manager kube-scheduler volume-provisioner; do write_kubeconfig "$name" "$pki/$name.conf"; done
    write_kubeconfig admin "$kubeconfig"
}
