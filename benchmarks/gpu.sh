#!/bin/sh
# The figures of a graphics card, in one JSON: sh benchmarks/gpu.sh FILE.json
# It builds nothing, needs no network, and takes at most 8 minutes. What must hold on a GPU is tried first.
set -u
out=${1:?"sh benchmarks/gpu.sh FILE.json"}
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")" && pwd)
"$python" -m pytest -q -p no:cacheprovider "$here/../tests/cuda" || failed=1
"$python" "$here/real_sizes.py" --device cuda --json "$out" || exit 1
exit "${failed:-0}"
