#!/usr/bin/env bash
# Known vulnerabilities in the locked versions and in torch. Fails when there is one; where the vulnerability service
# cannot be reached, or does not know the packages, it says so and passes. PIP_AUDIT names an installed pip-audit.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PIP_AUDIT:-}" ]; then
    PIP_AUDIT="$folder/venv/bin/pip-audit"
    python3 -m venv "$folder/venv"
    if ! "$folder/venv/bin/pip" install --quiet pip-audit==2.10.1 >/dev/null 2>&1; then
        echo "audit skipped: pip-audit cannot be installed here" >&2
        exit 0
    fi
fi
# Version by version, without hashes: pip-audit takes these alone or not at all, and installs nothing with --disable-pip.
{ sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+).*/\1/p' runs/lock-dev.txt | sort -u; sed -n 's/^TORCH=/torch==/p' runs/setup.sh; } >"$folder/all"
# One file for each version of a package that the lock has twice, by Python version.
awk -F== '{ print > ("'"$folder"'/pins-" ++seen[$1] ".txt") }' "$folder/all"
total=0 unknown=0
for pins in "$folder"/pins-*.txt; do
    total=$((total + $(wc -l <"$pins")))
    if ! "$PIP_AUDIT" --disable-pip --no-deps --progress-spinner off --timeout 30 -r "$pins" >"$folder/log" 2>&1; then
        if grep -qE '^Found [0-9]+ known vulnerabilit' "$folder/log"; then
            cat "$folder/log"
            exit 1
        fi
        echo "audit skipped: $(tail -n 1 "$folder/log")" >&2
        exit 0
    fi
    unknown=$((unknown + $(grep -c 'could not be audited' "$folder/log" || true)))
done
if [ "$unknown" = "$total" ]; then
    echo "audit skipped: the vulnerability service here knows none of the $total packages" >&2
else
    echo "audit: no known vulnerability in $((total - unknown)) of $total packages, $unknown unknown to the service"
fi
