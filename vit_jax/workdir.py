# SPDX-License-Identifier: Apache-2.0
"""The files of a run, all but its checkpoints: ``config.json``, ``dataset.json``, the
lock, ``metrics.jsonl`` and TensorBoard's event files.
"""

import contextlib
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from vit_jax import checkpoint, config
from vit_jax.config import Config
from vit_jax.data import DataInfo
from vit_jax.errors import UserError
from vit_jax.progress import say

METRICS = "metrics.jsonl"

# A run may be resumed with other values of these only: they leave its model, data and
# optimizer state as they are.
_MAY_CHANGE = (
    "steps", "eval.", "checkpoint.", "sweep.", "log_every", "profile", "max_bad_steps", "sharding", "mesh", "accumulate",
    "model.remat", "data.cache_gib", "data.max_bad", "optim.learning_rate", "optim.schedule",
    "optim.end_learning_rate", "optim.warmup", "optim.cooldown", "optim.timescale",
)  # fmt: skip


@contextlib.contextmanager
def claim(workdir: str, cfg: Config, info: DataInfo) -> Iterator[None]:
    """Creates ``workdir`` with ``config.json`` and ``dataset.json``, or checks that it
    belongs to the same run.

    Raises:
      UserError: it cannot be written, another process is using it, or its config has
        another model or other data.
    """
    folder = epath.Path(workdir)
    stored = folder / "config.json"
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            with _explain_no_access(workdir):
                # A run that saved nothing has nothing to lose.
                if stored.exists() and checkpoint.steps(workdir):
                    _check_same_run(workdir, config.read(stored), cfg)
                folder.mkdir(parents=True, exist_ok=True)
                if "://" not in workdir:
                    stack.enter_context(_lock(workdir))
                write_whole(stored, config.to_json(cfg))
                write_whole(
                    folder / "dataset.json",
                    json.dumps(_dataset(cfg, info), indent=2) + "\n",
                )
        yield


@contextlib.contextmanager
def _explain_no_access(workdir: str) -> Iterator[None]:
    remote = "://" in workdir
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # on gs:// an error class of tensorflow's or gcsfs's own
        if not remote and not isinstance(e, OSError):
            raise
        hint = (
            ": check the name of the bucket and your permission to write there"
            if remote
            else ""
        )
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"--workdir={workdir} cannot be written ({type(e).__name__}: {reason}){hint}"
        ) from e


def _check_same_run(workdir: str, old: Config, new: Config) -> None:
    changes = config.difference(old, new)
    fatal = [c for c in changes if not c.startswith(_MAY_CHANGE)]
    if fatal:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(fatal)}): give the same values, or another --workdir"
        )
    for change in changes:
        say(f"config       {change}")


@contextlib.contextmanager
def _lock(workdir: str) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is locked

    with open(epath.Path(workdir) / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--workdir={workdir} is in use by another process: wait for it or give another --workdir"
            ) from None
        yield


def _dataset(cfg: Config, info: DataInfo) -> dict[str, Any]:
    """What a user of the checkpoint must know about the data."""
    return {
        "source": cfg.data.source,
        "name": cfg.data.name,
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
        "num_train": info.num_train,
        "num_test": info.num_test,
        "multilabel": info.multilabel,
        "image_size": list(cfg.model.image_size),
        "eval_transforms": config.to_dict(cfg.data)["eval_transforms"],
    }


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
