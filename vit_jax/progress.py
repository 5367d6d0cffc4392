# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run."""

import contextlib
import shutil
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
    """A progress bar on a terminal; elsewhere one plain line per logged step.

    It appears with the first step, so that nothing of the start-up is printed into it.
    """

    def __init__(self, steps: int, start: int):
        self._steps, self._start = steps, start
        self._show = sys.stdout.isatty() and jax.process_index() == 0
        self._bar: tqdm | None = None

    def step(self) -> None:
        if self._show and self._bar is None:
            self._bar = tqdm(
                total=self._steps,
                initial=self._start,
                file=sys.stdout,
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {desc} {remaining}",
            )
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        loss = f"loss {metrics['train/loss']:.4f}"
        speed = f"{significant(metrics['train/images_per_second'])} images/s"
        wait = metrics["train/data_wait"]
        if self._bar is None:
            left = tqdm.format_interval(metrics["train/eta_seconds"])
            say(
                f"step {step}/{self._steps}  {loss}  {speed}  data wait {wait:.1%}  "
                f"ETA {left}"
            )
            return
        # Of 80 columns the bar itself needs a third.
        columns = shutil.get_terminal_size().columns
        parts = [loss, speed] if columns >= 72 else [loss] if columns >= 48 else []
        if wait >= 0.01 and columns >= 96:
            parts.append(f"data wait {wait:.0%}")
        self._bar.set_description_str("  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def significant(value: float) -> str:
    """Three significant digits, and all that stand before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def number(value: float) -> str:
    """A metric as a person reads it: counts without decimals."""
    return f"{value:,.0f}" if value % 1 == 0 and abs(value) > 1 else f"{value:.4f}"
