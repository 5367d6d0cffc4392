# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, and rules that turn silent mistakes into errors."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fast import FAST_COMPILE

# What Orbax's tasks leave of a failed read is logged when they are collected, in any
# later test; writing its traceback can break Python 3.11's parser if that is at work.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# Must be set before JAX starts. TPU_SKIP_MDS_QUERY keeps libtpu, where it is installed,
# from looking for a TPU.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {FAST_COMPILE}"
)
# Many tests compile the same tiny program, in this process and in others: it is
# compiled once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parent.parent / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

from commands import Command  # noqa: E402

from vit_jax import runtime  # noqa: E402

runtime.collect_rarely()

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, those that start processes before all: a worker
    that begins one when the other has nothing left is waited for."""
    rank = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        own = 0 if "process" in marks else 1 if "heavy" in marks else 2
        rank[item.path] = min(own, rank.get(item.path, 2))
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data and golden files that do not ship with the project."""
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED.name}/ beside the project")
    return SHARED


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls a command in this process."""
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="session")
def reference() -> Callable[..., np.ndarray]:
    """Logits of ``images`` by a model in the real transformers or timm; see
    ``reference_torch.py``."""
    python = os.environ.get("VIT_JAX_REFERENCE_PYTHON", "")
    if not python and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch; or set VIT_JAX_REFERENCE_PYTHON")

    def run(kind, model, images, folder):
        np.savez(folder / "io.npz", images=images)
        command = [
            python or sys.executable,
            str(Path(__file__).parent / "reference_torch.py"),
            kind,
            str(model),
            str(folder / "io.npz"),
            str(folder / "out.npz"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = np.load(folder / "out.npz")
        return found["logits"] if "logits" in found.files else found

    return run
