#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a SLURM cluster, one process per node that drives all its GPUs, and requeues itself after an interruption.
#
#   NODES=4 GPUS=8 launch/slurm.sh --config=configs/vit_b16.py --workdir=/shared/runs/vit_b16
#
#   NODES, GPUS            how many, and how many GPUs each has
#   PARTITION, ACCOUNT     passed on     TIME=24:00:00   limit of the job
#   PORT=47110             where the processes meet
#SBATCH --job-name=vit_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# SLURM runs a copy of this file, from the folder where it was submitted.
[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "$0")/.."
. launch/checks.sh
need_run "$@"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  need_command sbatch "submit on a login node of the cluster"
  need NODES 4
  need GPUS 8
  sbatch --nodes="$NODES" --gpus-per-node="$GPUS" --time="${TIME:-24:00:00}" \
    ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} launch/slurm.sh "$@"
  exit
fi

coordinator=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${PORT:-47110}
export PATH="$PWD/.venv/bin:$PATH"
status=0
# Single quotes: SLURM_PROCID differs from task to task. No task is killed because another stopped: all save.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c 'set -- "$@" --num_processes="$SLURM_NTASKS" --process_id="$SLURM_PROCID"
exec python -m vit_jax.main "$@"' bash "$@" --coordinator="$coordinator" || status=$?
if mends "$status"; then
  echo "launch: interrupted with status $status, requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
