#!/bin/bash
# A run on SLURM: Ray on the nodes of one allocation, and the run under `supervise` on the first of them.
#   sbatch examples/cluster/slurm.sh
# Before the time is up, or when the nodes are wanted by others, SLURM sends SIGTERM: the run saves, ends with code 75, and
# the job is put into the queue again, where it goes on with the same run. All nodes see the same $HOME and the same root.
#SBATCH --job-name=rlfusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail

ROOT=${ROOT:-$HOME/runs}
NAME=${NAME:-ink}
source "${VENV:-$HOME/rlfusion-env}/bin/activate"

# Whoever has no token cannot use the cluster: other users of these nodes are others.
umask 077
mkdir -p "$ROOT"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$ROOT/.ray-token-$SLURM_JOB_ID"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --nodes=1 --ntasks=1 --nodelist="$HEAD" \
    ray start --head --block --port="$PORT" --dashboard-host=127.0.0.1 --num-cpus="$SLURM_CPUS_PER_TASK" &
sleep 30
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$HEAD" \
        ray start --block --address="$HEAD:$PORT" --num-cpus="$SLURM_CPUS_PER_TASK" &
    sleep 30
fi

if [ -f "$ROOT/$NAME/config.yaml" ]; then
    rlfusion supervise --restarts 5 -- finetune --resume "$ROOT/$NAME" &
else
    rlfusion supervise --restarts 5 -- finetune --reward ink --root "$ROOT" --name "$NAME" \
        --rollout.workers 8 --ray.gpus_per_worker 1 --ray.wait_s 900 --ray.address "$HEAD:$PORT" &
fi
RUN=$!
trap 'kill -TERM $RUN' TERM

CODE=0
wait $RUN || CODE=$?
if [ "$CODE" -gt 128 ]; then  # the trap ended the wait: the run is still saving
    CODE=0
    wait $RUN || CODE=$?
fi
rm -f "$RAY_AUTH_TOKEN_PATH"
if [ "$CODE" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
