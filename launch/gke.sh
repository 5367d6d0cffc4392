#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on TPU slices of a GKE cluster, as a JobSet (gke.yaml) that starts again after a preemption.
#   export IMAGE=us-docker.pkg.dev/my-project/repo/vit_jax   # holds this folder, installed
#   TOPOLOGY=4x8 launch/gke.sh --config=configs/vit_b16.py --workdir=gs://my-bucket/vit_b16
# NAME=vit-jax   ACCELERATOR=tpu-v5-lite-podslice   TOPOLOGY=4x4   CHIPS_PER_HOST=4   SLICES=1   SERVICE_ACCOUNT=default
# launch/gke.sh delete   stops it: the run saves first. The same command again continues it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

: "${NAME:=vit-jax}" "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${CHIPS_PER_HOST:=4}" "${SLICES:=1}"
: "${SERVICE_ACCOUNT:=default}"
need_command kubectl "see kubernetes.io/docs/tasks/tools"
[[ ${1:-} != delete ]] || { kubectl delete jobset "$NAME" --ignore-not-found; exit; }
need IMAGE us-docker.pkg.dev/my-project/repo/vit_jax
need_run "$@"
[[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY must look like 4x4 or 2x2x4"
HOSTS=$((${TOPOLOGY//x/*} / CHIPS_PER_HOST))
((HOSTS > 0)) || fail "TOPOLOGY=$TOPOLOGY has fewer chips than CHIPS_PER_HOST=$CHIPS_PER_HOST"
need_command gcloud "see cloud.google.com/sdk/docs/install"
need_bucket "$@"
kubectl get crd jobsets.jobset.x-k8s.io >/dev/null 2>&1 \
  || fail "the cluster of \`kubectl config current-context\` cannot be reached, or has no JobSet: see jobset.sigs.k8s.io"

quote() { local a=${1//\\/\\\\}; printf '"%s", ' "${a//\"/\\\"}"; }
# shellcheck disable=SC2034 # read below by name
ARGUMENTS="[$(for a; do quote "$a"; done)]" # a YAML list: the "$@" of python -m vit_jax.main "$@"
manifest=$(<launch/gke.yaml)
for key in NAME SLICES HOSTS SERVICE_ACCOUNT ACCELERATOR TOPOLOGY IMAGE ARGUMENTS CHIPS_PER_HOST; do
  manifest=${manifest//@$key@/"${!key}"}
done
kubectl delete jobset "$NAME" --ignore-not-found # of the last time; what it saved is in the bucket
kubectl apply -f - <<<"$manifest"
echo "launch: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME --max-log-requests=$((HOSTS * SLICES))"
