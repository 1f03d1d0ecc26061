#!/usr/bin/env bash
# Known vulnerabilities in the locked versions and in torch: fails when there is one; says so and passes when the
# vulnerability service cannot be reached.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
if ! "$folder/venv/bin/pip" install --quiet pip-audit==2.10.1 >"$folder/log" 2>&1; then
    echo "audit skipped: pip-audit cannot be installed here" >&2
    exit 0
fi
{ cat runs/lock-dev.txt; } >"$folder/requirements.txt"
audit() { "$folder/venv/bin/pip-audit" --progress-spinner off --timeout 30 --no-deps "$@"; }
audited() {
    code=0
    audit "$@" >"$folder/log" 2>&1 || code=$?
    if [ "$code" != 0 ] && grep -qiE 'ServiceError|ConnectionError|ConnectError|Max retries|timed out|HTTPError|Name or service' "$folder/log"; then
        echo "audit skipped: the vulnerability service cannot be reached" >&2
        exit 0
    fi
    cat "$folder/log"
    [ "$code" = 0 ] || exit "$code"
}
audited --require-hashes --disable-pip -r "$folder/requirements.txt"
sed -n 's/^TORCH=/torch==/p' runs/setup.sh >"$folder/torch.txt"
audited --disable-pip -r "$folder/torch.txt"
