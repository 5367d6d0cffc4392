# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run, and the files that hold its numbers."""

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping

import jax
from etils import epath
from tqdm import tqdm

METRICS = "metrics.jsonl"


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


class MetricsWriter:
    """``metrics.jsonl`` and TensorBoard event files of a workdir, from process 0 only.

    Args:
      workdir: local or gs:// folder.
      start: step that the run continues from; lines of later steps, written by a
        process that died before its checkpoint was complete, are removed, so that no
        step appears twice.
    """

    def __init__(self, workdir: str, start: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._path = epath.Path(workdir) / METRICS
        kept = [m for m in read_metrics(workdir) if m["step"] <= start]
        self._last = [_line(m) for m in kept if m["step"] == start]
        lines = "".join(_line(m) for m in kept)
        write_whole(self._path, lines)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._events = self._path.parent / name
        self._encode = _event_encoder()
        # Object stores cannot append: there, files are written anew.
        self._written = {} if _is_local(workdir) else {self._path: lines.encode()}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._active:
            return
        line = _line({"step": step, **metrics})
        if line in self._last:  # a finished run was evaluated again
            return
        self._append(self._path, line.encode())
        if self._encode:
            self._append(self._events, self._encode(step, metrics))

    def _append(self, path: epath.Path, more: bytes) -> None:
        if _is_local(path):
            with path.open("ab") as f:
                f.write(more)
        else:
            self._written[path] = self._written.get(path, b"") + more
            path.write_bytes(self._written[path])


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a process killed meanwhile leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl``, null as NaN; a last line that was cut by a kill is
    left out."""
    path = epath.Path(workdir) / METRICS
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found.append({k: math.nan if v is None else v for k, v in row.items()})
    return found


def _event_encoder():
    """``encode(step, metrics)`` -> bytes of a TensorBoard file; None where tensorboard
    is not installed.

    Only its record format is used: its writer takes seconds to import tensorflow.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        return None
    header = [Event(wall_time=time.time(), file_version="brain.Event:2")]

    def encode(step: int, metrics: Mapping[str, float]) -> bytes:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        records = io.BytesIO()
        for e in [*header, event]:
            RecordWriter(records).write(e.SerializeToString())
        header.clear()
        return records.getvalue()

    return encode


def _is_local(path: object) -> bool:
    return "://" not in str(path)


def _line(metrics: Mapping[str, float]) -> str:
    """A line of ``metrics.jsonl``; null where a value is no finite number."""
    values = {
        k: v if k == "step" else _number(v) if math.isfinite(v) else None
        for k, v in metrics.items()
    }
    return json.dumps(values) + "\n"


def _number(value: float) -> float:
    return float(f"{float(value):.7g}")


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
