# SPDX-License-Identifier: Apache-2.0
"""What is measured of a running loop: means and speed between lines, and a trace."""

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vit_jax import data
from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.feed import Feed


class Interval:
    """Means of the metrics over the steps that were not skipped, and speed, since the
    last logged step. Time spent on evaluating and saving is left out."""

    def __init__(self, cfg: Config):
        self._cfg = cfg

    def restart(self, feed: Feed) -> None:
        self._feed = feed
        self._start, self._waited = time.perf_counter(), feed.waited
        self._sums = {"loss": 0.0}
        self._good = self._skipped = 0

    def add(self, values: dict[str, float]) -> None:
        if values["skipped"]:
            self._skipped += 1
            return
        self._good += 1
        for k, v in values.items():
            self._sums[k] = self._sums.get(k, 0.0) + v

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def summary(self, step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        per_step = seconds / (self._good + self._skipped)
        line = {
            f"train/{k}": v / self._good if self._good else math.nan
            for k, v in self._sums.items()
            if k != "skipped"
        }
        line |= {
            "train/skipped_steps": float(self._skipped),
            "train/bad_examples": float(len(data.bad_examples())),
            "train/images_per_second": self._cfg.batch / per_step,
            "train/step_ms": 1e3 * per_step,
            "train/data_wait": min((self._feed.waited - self._waited) / seconds, 1.0),
            "train/eta_seconds": (self._cfg.steps - step) * per_step,
        }
        self.restart(self._feed)
        return line


class Profiler:
    """Traces the steps "first:last" of the config into the workdir, for TensorBoard's
    profile tab. ``last`` is the last step of the run."""

    def __init__(self, steps: str, workdir: str, last: int):
        self._workdir, self._running = workdir, False
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        self._first, self._last = map(int, match.groups()) if match else (0, 0)
        if steps and not 1 <= self._first < self._last:
            raise UserError(
                f"config.profile={steps!r}: write FIRST:LAST, for example 100:110; the first step is 1"
            )
        if self._first > last:
            raise UserError(
                f"config.profile={steps!r} begins after the last step, config.steps={last}"
            )

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._workdir)
            self._running = True
        if step == self._last and self._running:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
