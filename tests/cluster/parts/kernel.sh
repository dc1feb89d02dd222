# shellcheck shell=bash disable=SC2154  # what is named here and not set is set in settings.sh
# The kubelet sets some kernel parameters for the whole machine. They are noted before the first node and set back after the last.

kubelet_parameters=(vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes)

note_parameters() {
    local parameter
    [ ! -f "$state/kernel-parameters" ] || return 0
    for parameter in "${kubelet_parameters[@]}"; do
        [ ! -r "/proc/sys/$parameter" ] || printf '%s %s\n' "$parameter" "$(<"/proc/sys/$parameter")"
    done >"$state/kernel-parameters"
}

changed_parameters() {
    local parameter value
    [ -f "$state/kernel-parameters" ] || return 0
    while read -r parameter value; do
        [ "$(<"/proc/sys/$parameter")" = "$value" ] || say "$parameter"
    done <"$state/kernel-parameters"
}

restore_parameters() {
    local parameter
    for parameter in $(changed_parameters); do
        awk -v name="$parameter" '$1 == name {print $2}' "$state/kernel-parameters" >"/proc/sys/$parameter" ||
            warn "cannot set $parameter back"
    done
    rm -f "$state/kernel-parameters"
}
