#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a Cloud TPU slice of any size: asks for it, installs this folder on every host, runs, starts again after
# a preemption, and deletes it at the end, whatever the end is.
#   export PROJECT=my-project ZONE=us-west4-a
#   TYPE=v5litepod-64 launch/tpu_vm.sh --config=configs/vit_b16.py --workdir=gs://my-bucket/vit_b16
# NAME=vit-jax   TYPE=v5litepod-8   VERSION=v2-alpha-tpuv5-lite (the runtime that fits TYPE)   SPOT=1 (0: on demand)
# KEEP=1 leaves the slice there at the end; `launch/tpu_vm.sh delete` deletes it     POLL=30 seconds
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

name=${NAME:-vit-jax} type=${TYPE:-v5litepod-8} version=${VERSION:-v2-alpha-tpuv5-lite} poll=${POLL:-30}
need_command gcloud "see cloud.google.com/sdk/docs/install"
need PROJECT my-project
need ZONE us-west4-a
tpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on_all() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }
state() { tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }
delete() { [[ $(state) == NONE ]] || tpu queued-resources delete "$name" --force --quiet; }

[[ ${1:-} != delete ]] || { delete; exit; }
need_run "$@"
need_bucket "$@"
code=$(mktemp -d)
trap 'rm -rf "$code"; [[ -n ${KEEP:-} ]] || delete' EXIT

# What gcloud refuses before a slice was ever there it will always refuse; later it may only be out of reach for a while.
worked=
create() {
  local spot=() now
  ((${SPOT:-1})) && spot=(--spot)
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" "${spot[@]}" \
    || [[ -n $worked ]] || fail "gcloud refuses to create $name, a $type in $ZONE: see above"
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in FAILED | SUSPENDED | NONE) return 1 ;; esac
    echo "launch: $name is $now"; sleep "$poll"
  done
  tar --exclude=.git --exclude=.venv --exclude=__pycache__ -czf "$code/vit_jax.tar.gz" .
  tpu tpu-vm scp "$code/vit_jax.tar.gz" "$name:" --worker=all
  on_all 'mkdir -p vit_jax && tar -xzf vit_jax.tar.gz -C vit_jax && cd vit_jax && (command -v python3.11 python3.12 >/dev/null ||
    sudo apt-get install -y -qq python3.11 python3.11-venv) && make install'
}

# The same command on every host. A process that a cut connection left behind is told to save first. Each host says
# its exit status, which ssh to many hosts does not pass on.
run="pid=\$(cat run.pid 2>/dev/null) && kill \$pid 2>/dev/null && while kill -0 \$pid 2>/dev/null; do sleep 1; done
cd vit_jax && . .venv/bin/activate && set -- $(printf '%q ' "$@")
python -m vit_jax.main \"\$@\" & echo \$! > ../run.pid; wait \$!; echo \"launch: exit status \$?\""

while true; do
  if [[ $(state) != ACTIVE ]]; then delete; create || { sleep "$poll"; continue; }; fi
  worked=1
  on_all "$run" 2>&1 | tee "$code/log" || true
  grep -Eq 'launch: exit status (1|2|126|127)$' "$code/log" && exit 2
  grep -q 'launch: exit status 0$' "$code/log" && ! grep -q 'launch: exit status [^0]' "$code/log" && exit 0
  echo "launch: interrupted ($name is $(state)), continuing"; sleep "$poll"
done
