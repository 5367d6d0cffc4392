# SPDX-License-Identifier: Apache-2.0
"""What a command sets up before JAX starts: the platform, memory, garbage and compiled
programs; and where it may keep files."""

import ctypes
import gc
import glob
import os
import sys
from pathlib import Path

import jax

# What the drivers of GPUs and TPUs leave in /dev.
_ACCELERATORS = (
    "/dev/nvidia[0-9]*",
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
    "/dev/kfd",
    "/dev/dxg",
)


def prepare() -> None:
    """Call it before JAX looks for devices."""
    collect_rarely()
    keep_compiled()
    if sys.platform == "linux" and not any(map(glob.glob, _ACCELERATORS)):
        choose_cpu()
        keep_memory()


def collect_rarely() -> None:
    """Has Python look for unreachable cycles at every 100,000th object, not at every
    700th: tracing a model makes millions of objects that stay, and a fifth of its time
    went into walking them again and again."""
    gc.set_threshold(100_000, 20, 100)


def choose_cpu() -> None:
    """Keeps libtpu, where it is installed for planning, from looking for a TPU that is
    not there: it reports that in ten lines. ``JAX_PLATFORMS`` decides if it is set."""
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def keep_compiled() -> None:
    """Keeps compiled programs on disk, so that a run that starts again, or another like
    it, need not compile.

    In ``~/.cache/vit_jax/xla``, or where ``JAX_COMPILATION_CACHE_DIR`` says (gs://
    works); none with ``JAX_ENABLE_COMPILATION_CACHE=false`` or where the folder cannot
    be written.
    """
    wanted = jax.config.jax_enable_compilation_cache
    if jax.config.jax_compilation_cache_dir or not wanted:
        return
    folder = os.path.expanduser("~/.cache/vit_jax/xla")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)


def keep_memory() -> None:
    """Keeps memory that a step frees for the next one.

    XLA for CPUs takes its buffers from malloc, and glibc returns large ones to the
    system, which clears every page anew at the next step: a third of the time of a step
    of a small ViT. One arena, because only the main one can grow without limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's only
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def cache_folder() -> Path:
    """``VIT_JAX_CACHE``, or the user's cache folder."""
    folder = os.environ.get("VIT_JAX_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vit_jax"
    )
    return Path(folder).expanduser()
