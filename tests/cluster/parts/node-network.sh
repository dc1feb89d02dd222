#!/usr/bin/env bash
# Runs inside a node: addresses, forwarding, and the way to the API server. Idempotent.
# Arguments: ADDRESS SERVICE_RANGE SERVICE_ADDRESS API_ADDRESS API_PORT
set -euo pipefail
address=$1 service_range=$2 service=$3 api=$4 port=$5

echo 1 >/proc/sys/net/ipv4/ip_forward
if [ -e /proc/sys/net/ipv6 ]; then echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; fi
ip link set lo up
ip addr replace "$address/24" dev eth0
ip link set eth0 up
# the only service address that is served is the API server's; any other (a name server) fails at once
ip route replace unreachable "$service_range"
ip route replace "$service/32" via "$api"
for chain in PREROUTING OUTPUT; do
    rule=("$chain" -d "$service/32" -p tcp --dport 443 -j DNAT --to-destination "$api:$port")
    iptables -w -t nat -C "${rule[@]}" 2>/dev/null || iptables -w -t nat -A "${rule[@]}"
done
