# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# Starting, remembering and stopping processes. A process is remembered by pid, start time and boot, so that a pid that
# was given to somebody else after a crash is never taken for ours, nor signalled.

# Every process that we start carries this in its environment: `leaks` finds by it what no record names any more.
mark=JOULECAST_CLUSTER_PROCESS=$state

start_time() { sed -n 's/.*) //p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

record() { printf '%s %s %s\n' "$2" "$(start_time "$2")" "$(</proc/sys/kernel/random/boot_id)" >"$pids/$1"; }

# A process may be dying for a while (a node takes all its pods along): dead are also zombies, processes with a pending
# SIGKILL, and those that have given up their namespaces already.
dead() {
    [ -d "/proc/$1" ] || return 0
    grep -qsE '^State:[[:space:]]+[ZX]|^S(hd|ig)Pnd:[[:space:]]+[0-9a-f]*[13579bdf][0-9a-f]{2}$' "/proc/$1/status" && return 0
    ! readlink "/proc/$1/ns/net" >/dev/null
}

# pid_of NAME: the pid if that process lives, else false
pid_of() {
    local pid started boot
    { read -r pid started boot <"$pids/$1"; } 2>/dev/null || return 1
    [ -n "$started" ] && [ "$boot" = "$(</proc/sys/kernel/random/boot_id)" ] || return 1
    [ "$(start_time "$pid")" = "$started" ] && ! dead "$pid" && printf '%s\n' "$pid"
}
running() { pid_of "$1" >/dev/null; }

# Logs are kept over restarts and bounded: past 16 MiB at a start, the older part is one generation.
log_of() {
    local file=$logs/$1.log
    if [ -f "$file" ] && [ "$(stat -c %s "$file")" -gt $((16 << 20)) ]; then mv "$file" "$file.old"; fi
    printf '%s\n' "$file"
}

# background LOG COMMAND...: become that command, detached, in no directory, without our lock (file descriptor 9)
background() {
    local log=$1
    shift
    cd / && exec env "$mark" setsid "$@" >>"$log" 2>&1 </dev/null 9>&-
}

# daemon NAME COMMAND...: unless it runs, start it in the root namespaces
daemon() {
    local name=$1 log
    shift
    running "$name" && return
    log=$(log_of "$name")
    background "$log" "$@" &
    record "$name" $!
}

# inside NODE COMMAND...: run something in the node's namespaces
inside() {
    local init
    init=$(pid_of "$1.init") || { warn "node $1 is off"; return 1; }
    shift
    (cd / && exec nsenter -t "$init" -m -p -n -u -- "$@")
}

# node_daemon NODE NAME COMMAND...: unless it runs, start it in the node's namespaces
node_daemon() {
    local node=$1 name=$1.$2 init log
    shift 2
    running "$name" && return
    init=$(pid_of "$node.init") || { warn "node $node is off"; return 1; }
    log=$(log_of "$name")
    background "$log" nsenter -t "$init" -m -p -n -u -- "$@" &
    record "$name" "$(child_in_namespace $!)"
}

# nsenter and unshare wait for the process that they start in the other pid namespace: that one is recorded.
# (/proc/PID/task/PID/children is not in every kernel.)
child_in_namespace() {
    local outer=$1 ours file pid
    ours=$(readlink /proc/self/ns/pid)
    for _ in $(seq 200); do
        # shellcheck disable=SC2013  # file names without spaces
        for file in $(grep -lsE "^PPid:[[:space:]]+$outer\$" /proc/[0-9]*/status); do
            pid=${file#/proc/}
            pid=${pid%/status}
            if [ "$(readlink "/proc/$pid/ns/pid")" != "$ours" ]; then
                printf '%s\n' "$pid"
                return
            fi
        done
        kill -0 "$outer" 2>/dev/null || break
        sleep 0.02
    done
    warn "process $outer ended at once; its log is in $logs"
    return 1
}

all_dead() {
    local pid
    for pid in "$@"; do dead "$pid" || return 1; done
}

# stop SIGNAL NAME...: signal what lives, wait up to 5 s, then SIGKILL; forget all
stop() {
    local signal=$1 name pid found=()
    shift
    for name in "$@"; do
        if pid=$(pid_of "$name"); then found+=("$pid"); fi
    done
    if [ ${#found[@]} -gt 0 ]; then
        kill "-$signal" "${found[@]}" 2>/dev/null || true
        if ! retry 50 0.1 all_dead "${found[@]}"; then
            kill -KILL "${found[@]}" 2>/dev/null || true
            retry 50 0.1 all_dead "${found[@]}" || warn "still there after SIGKILL: ${found[*]}"
        fi
    fi
    for name in "$@"; do rm -f "$pids/$name"; done
}

# Pids that carry our mark, recorded or not.
marked() {
    local file
    { grep -lszxF -- "$mark" /proc/[0-9]*/environ || true; } | while read -r file; do
        file=${file#/proc/}
        printf '%s\n' "${file%/environ}"
    done
}
