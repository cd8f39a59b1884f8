#!/bin/bash
# A run on a Ray cluster that stands: launched, followed to its end, looked at. What is behind the script's name are more
# settings of the run or of `rlfusion launch`.
#   ROOT=/shared/runs bash examples/cluster/job.sh --updates 8
# The nodes and this machine see the same $ROOT. A cluster of this machine alone does for a trial:
#   ray start --head --dashboard-host=127.0.0.1     # with --env none; `ray stop` ends every Ray of this user here
set -euo pipefail

ROOT=${ROOT:?is the folder of all runs, which the nodes share}
NAME=${NAME:-ink}
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

rlfusion launch finetune --reward ink --root "$ROOT" --name "$NAME" --rollout.workers 2 "$@" --follow
rlfusion jobs status "$NAME"
rlfusion sample --checkpoint "$ROOT/$NAME" --out "$ROOT/$NAME.png"
