#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a Cloud TPU slice, v2 to v6e: asks for it, installs this folder on every host, runs, starts again after a
# preemption, and deletes it at the end, whatever the end is.
#
#   export PROJECT=my-project ZONE=us-west4-a
#   TYPE=v5litepod-64 launch/tpu_vm.sh --config=configs/vit_b16.py --workdir=gs://my-bucket/vit_b16
#   launch/tpu_vm.sh delete
#
# Google no longer develops the API behind it, which does not offer TPU7x and later: there, and for several slices at
# once, use launch/gke.sh.
#
#   NAME=vit-jax  TYPE=v5litepod-8   of the slice
#   VERSION       runtime; by default the one that fits TYPE
#   SPOT=1        0: on demand
#   WAIT=24h      how long to wait for capacity, each time
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT   passed on; INTERNAL_IPS=1: no public addresses
#   KEEP=1        leaves the slice there at the end
#   POLL=30       seconds between looks
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

name=${NAME:-vit-jax} type=${TYPE:-v5litepod-8} poll=${POLL:-30}
# As Google's page on runtime versions pairs them.
case $type in
  v2-* | v3-* | v4-*) fits=tpu-ubuntu2204-base ;;
  v5litepod-*) fits=v2-alpha-tpuv5-lite ;;
  v5p-*) fits=v2-alpha-tpuv5 ;;
  v6e-*) fits=v2-alpha-tpuv6e ;;
  *) fits= ;;
esac
version=${VERSION:-$fits}
need_command gcloud "see cloud.google.com/sdk/docs/install"
need PROJECT my-project
need ZONE us-west4-a
tpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on_all() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }
state() { tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }
delete() { [[ $(state) == NONE ]] || tpu queued-resources delete "$name" --force --quiet; }

[[ ${1:-} != delete ]] || { delete; exit; }
[[ -n $version ]] || fail "TYPE=$type is not a slice that this script knows (v5litepod-8, v6e-64, v5p-128, v4-32 ...): set VERSION too, or use launch/gke.sh"
need_run "$@"
need_bucket "$@"
code=$(mktemp -d)
trap 'rm -rf "$code"; [[ -n ${KEEP:-} ]] || delete' EXIT

options=(--valid-until-duration="${WAIT:-24h}")
((${SPOT:-1} == 0)) || options+=(--spot)
[[ -z ${NETWORK:-} ]] || options+=(--network="$NETWORK")
[[ -z ${SUBNETWORK:-} ]] || options+=(--subnetwork="$SUBNETWORK")
[[ -z ${SERVICE_ACCOUNT:-} ]] || options+=(--service-account="$SERVICE_ACCOUNT")
[[ -z ${INTERNAL_IPS:-} ]] || options+=(--internal-ips)

# What gcloud refuses before a slice was ever there it will always refuse; later it may only be out of reach for a while.
worked=
create() {
  local now
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" "${options[@]}" \
    || [[ -n $worked ]] || fail "gcloud refuses to create $name, a $type in $ZONE: see above"
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in FAILED | SUSPENDED | NONE) return 1 ;; esac
    echo "launch: $name is $now"; sleep "$poll"
  done
  tar --exclude=.git --exclude=.venv --exclude=__pycache__ -czf "$code/vit_jax.tar.gz" .
  tpu tpu-vm scp "$code/vit_jax.tar.gz" "$name:" --worker=all
  # The version of the package comes from git, which is not sent. The hosts expand what is quoted.
  # shellcheck disable=SC2016
  on_all 'mkdir -p vit_jax && tar -xzf vit_jax.tar.gz -C vit_jax && cd vit_jax &&
    { command -v python3.12 python3.11 || { sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv; }; } >/dev/null &&
    $(command -v python3.12 || command -v python3.11) -m venv .venv &&
    SETUPTOOLS_SCM_PRETEND_VERSION=0 .venv/bin/pip install -q -c constraints.txt -e ".[train,tpu]"'
}

# The same command on every host. A process that a cut connection left behind is told to save first. Each host says
# its exit status, which ssh to many hosts does not pass on; a random word keeps it apart from what a run may print.
word=status-$RANDOM$RANDOM
run="pid=\$(cat run.pid 2>/dev/null) && kill \$pid 2>/dev/null && while kill -0 \$pid 2>/dev/null; do sleep 1; done
cd vit_jax && . .venv/bin/activate && set -- $(printf '%q ' "$@")
python -m vit_jax.main \"\$@\" & echo \$! > ../run.pid; wait \$!; status=\$?; echo \"launch: ${word%%-*}-\"${word#*-} \$status"

while true; do
  if [[ $(state) != ACTIVE ]]; then delete; create || { sleep "$poll"; continue; }; fi
  worked=1
  on_all "$run" 2>&1 | tee "$code/log" || true
  grep -Eq "launch: $word (1|2|126|127)\$" "$code/log" && exit 2
  grep -q "launch: $word 0\$" "$code/log" && ! grep -q "launch: $word [^0]" "$code/log" && exit 0
  echo "launch: interrupted ($name is $(state)), continuing"; sleep "$poll"
done
