#!/usr/bin/env bash
# README.md promises nothing that is not run. Its commands are the lines that begin with "$ " in ```console blocks.
#   tests/readme.sh            runs them, in order and in one shell, on the cluster that `make demo` left running, and
#                              applies docs/examples to its API server as a dry run
#   tests/readme.sh --static   only checks what needs no cluster: which commands there are, targets, links
# `make` commands are not run again here: they must be part of `make test` or of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	echo "README.md: $*" >&2
	exit 1
}

# One command a line; a backslash at the end of a line goes on to the next.
commands() {
	awk '
		/^```/ { fenced = !fenced; console = fenced && $0 == "```console"; next }
		fenced && console && /^\$ / { sub(/^\$ /, ""); open = 1; text = "" }
		open { more = sub(/\\$/, ""); text = text $0; if (!more) { print text; open = 0 } }
	' README.md
}

mapfile -t commands < <(commands)
[ "${#commands[@]}" -ge 8 ] || fail "found ${#commands[@]} commands only: has the form of the blocks changed?"

# Shell in any other kind of block would escape this script.
if grep -nE '^```(sh|bash|shell)' README.md; then
	fail "a shell block that is not \`\`\`console"
fi

ci_runs() {
	local target=$1
	grep -qE "^test:([^#]* )?$target( |\$)" Makefile || grep -qE "(^|[ '])make $target(\$| )" .ci/run
}

for command in "${commands[@]}"; do
	case $command in
		make\ *) ci_runs "${command#make }" || fail "neither \`make test\` nor .ci/run runs: $command" ;;
	esac
done

# Commands inside the text must begin one of those in the blocks.
# shellcheck disable=SC2016 # the backticks are Markdown's
while IFS= read -r inline; do
	# No pipe: grep stops at the first match, and whoever still writes into it would count as failed.
	grep -qF -- "$inline" <<<"$(printf '%s\n' "${commands[@]}")" || fail "the text names a command that no block holds: $inline"
done < <(awk '/^```/ { fenced = !fenced } !fenced' README.md | grep -oE '`(make|kubectl|helm|joulecast|cargo) [^`]+`' | tr -d '`')

while IFS= read -r link; do
	[ -e "${link%%#*}" ] || fail "a link leads nowhere: $link"
done < <(grep -oE '\]\([^)]+\)' README.md | sed 's/^](//; s/)$//' | grep -vE '^https?:')

if [ "${1:-}" = --static ]; then
	echo "README.md: ${#commands[@]} commands, all of them run by a test or by CI; links lead somewhere"
	exit 0
fi

PATH=$PWD/build/bin:$PATH
# Always the local cluster: nobody's own is touched by a test.
export KUBECONFIG=${JOULECAST_CLUSTER_DIR:-/var/lib/joulecast-cluster}/kubeconfig
[ -r "$KUBECONFIG" ] || fail "no $KUBECONFIG: run \`make demo\` first"
namespace=demo

echo "README.md: examples against the API server"
kubectl apply --dry-run=server --validate=strict --namespace "$namespace" -f docs/examples

script=$(mktemp)
trap 'rm -f "$script"' EXIT
{
	echo 'set -euo pipefail'
	for command in "${commands[@]}"; do
		case $command in
			make\ *) ;;
			# README names the usual place of the local cluster's file; this run may use another.
			export\ KUBECONFIG=*) ;;
			*)
				printf 'printf "\\n$ %%s\\n" %q >&2\n%s\n' "$command" "$command"
				;;
		esac
	done
} >"$script"
# So that a repeated run waits for a run of its own.
kubectl delete --namespace "$namespace" -f docs/examples/job-small-input.yaml --ignore-not-found --timeout=2m
kubectl wait --namespace "$namespace" --for=delete jobs.batch,pods --selector joulecast.dev/inference-job=three-requests --timeout=2m
bash "$script"
echo "README.md: all commands done"
