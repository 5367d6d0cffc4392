#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares a Colab runtime (CPU, GPU or TPU), and trains if there are arguments.
#
#   !bash launch/colab.sh
#   !bash launch/colab.sh --config=configs/digits.py --workdir=/content/digits
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh

need_command "${PYTHON:=python3}" "this is not a Colab runtime"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed: choose a newer runtime version"
(($# == 0)) || need_run "$@"

extra=
command -v nvidia-smi >/dev/null && extra=,cuda
compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null && extra=,tpu
"$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[all$extra]"
"$PYTHON" -c 'import jax; print(jax.device_count(), "x", jax.devices()[0].device_kind, "with jax", jax.__version__)'

python() { command "$PYTHON" "$@"; }
(($# == 0)) || python -m vit_jax.main "$@"
