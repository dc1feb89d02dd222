#!/usr/bin/env bash
# Every shell script of the repository parses and passes shellcheck, which is installed where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v shellcheck >/dev/null; then
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		echo "scripts: shellcheck is not installed: install the package shellcheck" >&2
		exit 1
	fi
	echo "scripts: apt-get install shellcheck"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends shellcheck >/dev/null
fi
# Many have no extension: the first line says what they are.
mapfile -t scripts < <(git grep -lE -m1 '^#!.*\bbash$')
[ ${#scripts[@]} -ge 15 ] || { echo "scripts: found ${#scripts[@]} only: has their first line changed?" >&2; exit 1; }
for script in "${scripts[@]}"; do bash -n "$script"; done
shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
echo "scripts: ${#scripts[@]} pass bash -n and shellcheck"
