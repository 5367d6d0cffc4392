# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax
from tqdm import tqdm


def say(message: str) -> None:
    """One line on standard output, from process 0 only, above a progress bar if there
    is one."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Announces a part of the start-up while it runs, and how long it took."""
    start = time.perf_counter()
    if sys.stdout.isatty() and jax.process_index() == 0:
        print(f"{name:<12} ...", end="\r", flush=True)
    yield
    say(f"{name:<12} {time.perf_counter() - start:6.1f} s")


class Bar:
    """A progress bar on a terminal; elsewhere one plain line per logged step."""

    def __init__(self, steps: int, start: int):
        show = sys.stdout.isatty() and jax.process_index() == 0
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not show,
            file=sys.stdout,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._steps = steps

    def step(self) -> None:
        self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        loss = metrics["train/loss"]
        speed = metrics["train/images_per_second"]
        wait = metrics["train/data_wait"]
        eta = metrics["train/eta_seconds"]
        text = f"loss {loss:.4f}  {speed:,.0f} images/s  data wait {wait:.1%}"
        if self._bar.disable:
            say(f"step {step}/{self._steps}  {text}  ETA {_clock(eta)}")
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


def number(value: float) -> str:
    """A metric as a person reads it: counts without decimals."""
    return f"{value:,.0f}" if value % 1 == 0 and abs(value) > 1 else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
