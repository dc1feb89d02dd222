#!/usr/bin/env bash
# The first process of a node, in fresh mount, pid, network and host name namespaces: makes them look like a machine of its
# own, then becomes the reaping pause program. Killing it is a power cut. Arguments: NAME DIRECTORY PAUSE
set -euo pipefail
name=$1 directory=$2 pause=$3

mount --make-rslave /
mount -t proc proc /proc
# a /sys of this network namespace, with the cgroup tree as it was
mount --rbind /sys/fs/cgroup "$directory/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$directory/cgroup" /sys/fs/cgroup
umount -l "$directory/cgroup"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock
for part in kubelet cni; do mount --bind "$directory/$part" "/var/lib/$part"; done
mount --bind "$directory/log" /var/log
hostname "$name"
mount --make-rshared / # pods' mounts must reach the containers that ask for them
touch "$directory/booted"
exec "$pause"
