# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the scripts of this folder check before anything is started. Sourced, in the repository's root.

usage() { # the comment at the head of the script that sources this file
  awk 'NR > 2 { if (/^#SBATCH/) next; if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}
case ${1:-} in -h | -help | --help) usage; exit 0 ;; esac
(($#)) || [[ $0 == *colab.sh ]] || { usage >&2; exit 2; }

fail() { echo "error: $*" >&2; exit 2; }

need() {  # need VARIABLE EXAMPLE
  [[ -n ${!1:-} ]] || fail "$1 is not set, for example: export $1=$2"
}

need_command() {  # need_command NAME WHERE-IT-COMES-FROM
  command -v "$1" >/dev/null || fail "the command $1 is not installed: $2"
}

flag() {  # flag NAME ARGUMENTS...   prints the value of --NAME=value
  local name=$1 argument value=
  shift
  for argument; do [[ $argument == "--$name="* ]] && value=${argument#*=}; done
  echo "$value"
}

need_run() {  # the two flags that every run has
  local config workdir
  config=$(flag config "$@") workdir=$(flag workdir "$@")
  [[ -n $config ]] || fail "--config is missing: give --config=configs/vit_b16.py or your own"
  [[ -f ${config%%:*} || -f configs/${config%%:*}.py ]] || fail "--config=$config names a file that does not exist in $PWD"
  [[ -n $workdir ]] || fail "--workdir is missing: give the folder that the run writes to"
}

need_bucket() {  # need_bucket ARGUMENTS...   --workdir must outlive the machines
  local workdir bucket
  workdir=$(flag workdir "$@")
  [[ $workdir == gs://?* ]] || fail "--workdir=$workdir must be gs://BUCKET/FOLDER: the machines' disks go with them"
  bucket=${workdir#gs://}
  gcloud storage ls "gs://${bucket%%/*}" >/dev/null 2>&1 \
    || fail "bucket gs://${bucket%%/*} does not exist, or you may not read it (try: gcloud storage ls gs://${bucket%%/*})"
}

# Exit statuses of the training command: 1 and 2 are errors that a restart does not mend, and 126 and 127 a python that
# is not there. All others are an interruption (75: saved or a peer was lost; 134: JAX noticed the loss; 137, 143:
# killed; 255: ssh was cut).
mends() { (($1 != 0 && $1 != 1 && $1 != 2 && $1 != 126 && $1 != 127)); }
