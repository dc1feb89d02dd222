#!/usr/bin/env bash
# Gets what the local cluster needs, into build/bin and from Debian's packages; with the argument helm, helm alone. As root, on Debian with Rust and Go.
# What is there already is left alone: a second run does nothing and takes a second.
# With the argument cdi it gets a containerd that knows CDI (Debian's does not) into build/bin/cdi, for `make gpu-tests`, and nothing else.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
bin=$repository/build/bin
export PATH=$PATH:/usr/local/go/bin # where Go's own archive puts it
say() { printf 'setup: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

# package if that file is missing; why
wanted="
containerd              /usr/bin/containerd             runs the containers of each node
runc                    /usr/sbin/runc                  starts them
containernetworking-plugins /usr/lib/cni/bridge         gives pods their network
iptables                /usr/sbin/iptables              inside the nodes: the way from a pod to the API server
iproute2                /usr/sbin/ip                    network devices and routes
openssl                 /usr/bin/openssl                certificates of the components
ca-certificates         /usr/share/ca-certificates/mozilla  for the images
python3                 /usr/bin/python3                writes the images
gcc                     /usr/bin/cc                     links Rust programs, builds the pause program
libc6-dev               /usr/include/stdio.h            headers and the static C library for it
"
[ -z "${REGISTRY:-}" ] || wanted+="skopeo /usr/bin/skopeo pushes the images to \$REGISTRY"

install_packages() {
    local package file why missing=()
    while read -r package file why; do
        if [ -z "$package" ] || [ -e "$file" ] || [ -e "${file/\/sbin\//\/bin\/}" ]; then continue; fi
        say "needs the Debian package $package: $why"
        missing+=("$package")
    done <<<"$wanted"
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "no apt-get here: install ${missing[*]} (or what they are called here) and run this again"
    [ "$(id -u)" = 0 ] || fail "must be root to install packages: apt-get install ${missing[*]}"
    say "apt-get install ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# build NAME WHY DIRECTORY PACKAGE LDFLAGS: with Go, if the module or the tool chain changed since the last time
build() {
    local name=$1 why=$2 directory=$3 package=$4 ldflags=$5 stamp began=$SECONDS
    command -v go >/dev/null || fail "Go is not installed (nor in /usr/local/go): it builds $name"
    stamp=$({ go version; printf '%s\n' "$package" "$ldflags"; cat "$directory"/go.mod "$directory"/go.sum; find "$directory" -name '*.go' -exec cat {} +; } | sha256sum)
    if [ -x "$bin/$name" ] && [ "$(cat "$bin/$name.stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    say "building $name with Go: $why"
    rm -f "$bin/$name.stamp"
    (cd "$directory" && go build -buildvcs=false -ldflags "-s -w $ldflags" -o "$bin/$name.new" "$package")
    mv "$bin/$name.new" "$bin/$name" # a cluster that runs keeps the old one
    printf '%s\n' "$stamp" >"$bin/$name.stamp"
    say "built $name in $((SECONDS - began)) s"
}

build_kubernetes() {
    local version component major minor
    version=$(sed -n 's#^\tk8s.io/kubernetes v\([0-9.]*\).*#\1#p' "$here/kube-all/go.mod")
    IFS=. read -r major minor _ <<<"$version"
    build kube-all "Kubernetes $version and etcd in one program (7 minutes of two cores the first time)" "$here/kube-all" . \
        "-X k8s.io/component-base/version.gitVersion=v$version -X k8s.io/component-base/version.gitMajor=$major -X k8s.io/component-base/version.gitMinor=$minor"
    for component in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl volume-provisioner; do
        ln -sfn kube-all "$bin/$component"
    done
}

build_pause() {
    local tar=$repository/build/images/pause.tar source=$here/pause/pause.c
    if [ "$bin/pause" -nt "$source" ] && [ "$tar" -nt "$bin/pause" ]; then return; fi
    say "building the pause program and its image: it holds a pod's network, and is the first process of a node"
    cc -Os -static -s -Wall -Wextra -o "$bin/pause.new" "$source"
    mv "$bin/pause.new" "$bin/pause"
    "$repository/charts/images/layout.py" image --bare --name localhost/joulecast/pause --tag 1 --out "$tar" "$bin/pause" >/dev/null
}

build_helm() { build helm "renders and installs the chart (2 minutes of two cores the first time)" "$here/helm" helm.sh/helm/v4/cmd/helm ""; }

build_cdi() {
    local program
    mkdir -p "$bin/cdi"
    for program in containerd containerd-shim-runc-v2; do
        CGO_ENABLED=0 build "cdi/$program" "runs the containers of a node whose GPUs are given by CDI (minutes of two cores the first time)" \
            "$here/containerd" "github.com/containerd/containerd/v2/cmd/$program" ""
    done
}

mkdir -p "$bin" "$repository/build/images"
case ${1:-} in
    helm) build_helm ;;
    cdi) build_cdi ;;
    *)
        install_packages
        build_kubernetes
        build_pause
        build_helm
        ;;
esac
