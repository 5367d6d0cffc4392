#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on this machine, and continues by itself after an interruption.
#
#   launch/local.sh --config=configs/digits.py --workdir=/tmp/digits
#
#   PROCESSES=8            one process per GPU; default: one process that drives every device
#   PORT=47110             where the processes meet
#   RETRIES=100            how often it starts again
#   PYTHON=.venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

processes=${PROCESSES:-1} port=${PORT:-47110}
need_run "$@"
need_command "${PYTHON:=python}" "make install, then PYTHON=.venv/bin/python launch/local.sh ..."
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$processes must be a number from 1"
python() { exec "$PYTHON" "$@"; }

children=() stopped=
trap 'stopped=1; kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT # they save, and exit with 75
start() { # start PROCESS ARGUMENTS...
  local flags=()
  if ((processes > 1)); then
    export JAX_LOCAL_DEVICE_IDS=$1
    flags=(--coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$1")
  fi
  shift
  set -- "$@" "${flags[@]}"
  python -m vit_jax.main "$@"
}

for ((try = 0; try <= ${RETRIES:-100}; try++)); do
  children=() status=0
  for ((i = 0; i < processes; i++)); do
    start "$i" "$@" &
    children+=($!)
  done
  for child in "${children[@]}"; do
    wait "$child" && code=0 || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
      wait "$child" && code=0 || code=$?
    done
    ((code == 0 || status == 1 || status == 2)) || status=$code
  done
  [[ -z $stopped ]] && mends "$status" || exit "$status"
  echo "launch: interrupted with status $status, continuing" >&2
done
exit "$status"
