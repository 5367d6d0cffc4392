# SPDX-License-Identifier: Apache-2.0
"""A request to stop, which all processes answer at the same step."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM (which schedulers and the TPU maintenance handler send) without
    interrupting anything.

    ``requested()`` answers the same on every process, so that all save the same step.
    Every process must call it equally often.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._calls = 0
        self._single = jax.process_count() == 1
        self._previous = None
        # With several processes JAX listens for the signal and agrees on the call at
        # which all answer yes.
        if threading.current_thread() is threading.main_thread() and self._single:
            self._previous = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.signalled = True

    def requested(self) -> bool:
        if not self._single and not self.signalled:
            self._calls += 1
            self.signalled = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.signalled

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
