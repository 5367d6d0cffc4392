# SPDX-License-Identifier: Apache-2.0
"""Several processes, and the signal that ends one of them."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vit_jax.errors import UserError


def initialize(coordinator: str, num_processes: int, process_id: int, timeout: int) -> None:
    """Connects this process to its peers. Does nothing for a single process.

    On TPU pods, SLURM and Kubernetes JAX finds the coordinator by itself; elsewhere all three flags are needed.

    Raises:
      UserError: flags that contradict each other, or peers that did not come within ``timeout`` seconds.
    """
    if not coordinator and num_processes <= 0 and process_id < 0:
        if _is_cluster():
            jax.distributed.initialize(initialization_timeout=timeout)
        return
    if not coordinator or num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator={coordinator!r} --num_processes={num_processes} --process_id={process_id}: give all "
            "three, with --process_id from 0 to --num_processes - 1"
        )
    print(
        f"process {process_id} of {num_processes}: waiting for the others at {coordinator} "
        f"(at most {timeout} s)", flush=True,
    )
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=timeout
    )


def _is_cluster() -> bool:
    return "TPU_WORKER_HOSTNAMES" in os.environ and "," in os.environ["TPU_WORKER_HOSTNAMES"] or int(
        os.environ.get("SLURM_NTASKS", "1")
    ) > 1


class Preemption:
    """Notices SIGTERM (which schedulers and the TPU maintenance handler send) without interrupting anything.

    ``requested(step)`` answers the same on every process, so that all save the same step.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._single = jax.process_count() == 1
        self._previous = None
        if threading.current_thread() is threading.main_thread() and self._single:
            self._previous = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.signalled = True

    def requested(self, step: int) -> bool:
        if self._single:
            return self.signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
