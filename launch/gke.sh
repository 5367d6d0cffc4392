#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on TPU slices of a GKE cluster, as a JobSet (gke.yaml) that starts again after a disruption.
#
#   docker build -f launch/Dockerfile -t us-docker.pkg.dev/my-project/repo/vit_jax . && docker push us-docker...
#   export IMAGE=us-docker.pkg.dev/my-project/repo/vit_jax
#   TOPOLOGY=4x8 launch/gke.sh --config=configs/vit_b16.py --workdir=gs://my-bucket/vit_b16
#   launch/gke.sh delete       stops it: the run saves first; the same command again continues it
#
#   NAME=vit-jax  NAMESPACE=default  SERVICE_ACCOUNT=default
#   ACCELERATOR=tpu-v5-lite-podslice  TOPOLOGY=4x4   as the node pool has them; tpu-v6e-slice, tpu-v5p-slice, tpu7x ...
#   CHIPS_PER_HOST=4           1 to 8, as the machine type of the pool; a v5e of 2x4 may be one host of 8
#   SLICES=1                   several: data parallel over the data-centre network
#   SPOT=1                     on Spot nodes
#   QUEUE=team-a               local queue of Kueue
#   REPLACE=1                  deletes a JobSet of that name that is still running
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

: "${NAME:=vit-jax}" "${NAMESPACE:=default}" "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}"
: "${CHIPS_PER_HOST:=4}" "${SLICES:=1}" "${SERVICE_ACCOUNT:=default}" "${SPOT:=}" "${QUEUE:=}"
[[ $SPOT != 0 ]] || SPOT=
kube() { kubectl --namespace="$NAMESPACE" "$@"; }
need_command kubectl "see kubernetes.io/docs/tasks/tools"
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "NAME=$NAME must be lower-case letters, digits and hyphens, from a letter, at most 40"
[[ ${1:-} != delete ]] || { kube delete jobset "$NAME" --ignore-not-found; exit; }
need_run "$@"
need IMAGE us-docker.pkg.dev/my-project/repo/vit_jax
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "TOPOLOGY=$TOPOLOGY must look like 4x4 or 2x2x4"
[[ $CHIPS_PER_HOST =~ ^[1-8]$ ]] || fail "CHIPS_PER_HOST=$CHIPS_PER_HOST must be a number from 1 to 8"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES must be a number from 1"
CHIPS=$((${TOPOLOGY//x/*})) HOSTS=$((${TOPOLOGY//x/*} / CHIPS_PER_HOST))
((HOSTS * CHIPS_PER_HOST == CHIPS)) || fail "TOPOLOGY=$TOPOLOGY has $CHIPS chips, which hosts of CHIPS_PER_HOST=$CHIPS_PER_HOST do not divide"
need_command gcloud "see cloud.google.com/sdk/docs/install"
need_bucket "$@"
kubectl get crd jobsets.jobset.x-k8s.io >/dev/null 2>&1 \
  || fail "the cluster of \`kubectl config current-context\` cannot be reached, or has no JobSet: see jobset.sigs.k8s.io"
# Empty where there is none of that name, "Completed" or "Failed" where it has ended.
if kube get jobset "$NAME" >/dev/null 2>&1 && [[ -z ${REPLACE:-} ]]; then
  [[ -n $(kube get jobset "$NAME" -o 'jsonpath={.status.terminalState}') ]] \
    || fail "the JobSet $NAME is there and has not ended: choose another NAME, or REPLACE=1"
fi

quote() { local a=${1//\\/\\\\}; printf '"%s", ' "${a//\"/\\\"}"; }
# shellcheck disable=SC2034 # read below by name
ARGUMENTS="[$(for a; do quote "$a"; done)]" # a YAML list: the "$@" of python -m vit_jax.main "$@"
manifest=$(<launch/gke.yaml)
for key in SPOT QUEUE; do # lines that end in "# if KEY"
  [[ -n ${!key} ]] || manifest=$(grep -v "# if $key\$" <<<"$manifest")
done
for key in NAME NAMESPACE QUEUE SLICES HOSTS SERVICE_ACCOUNT ACCELERATOR TOPOLOGY IMAGE ARGUMENTS CHIPS_PER_HOST; do
  manifest=${manifest//@$key@/"${!key}"}
done
kube delete jobset "$NAME" --ignore-not-found # of the last time; what it saved is in the bucket
kube apply -f - <<<"$manifest"
echo "launch: kubectl --namespace=$NAMESPACE logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME --max-log-requests=$((HOSTS * SLICES))"
