# SPDX-License-Identifier: Apache-2.0
"""The files of a run, all but its checkpoints: ``config.json``, ``dataset.json``, the
lock, ``metrics.jsonl`` and TensorBoard's event files.

``metrics.jsonl`` has one object per line: ``step`` plus names such as ``train/loss`` and
``test/accuracy``; null stands for NaN. ``train/`` values are means over the steps since
the line before, or since the start of the process: the first line after a restart may
cover fewer steps than that of an undisturbed run.
"""

import contextlib
import io
import json
import logging
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
from vit_jax.errors import UserError, one_line
from vit_jax.progress import say

METRICS = "metrics.jsonl"
_LOG = logging.getLogger(__name__)

# A run may be resumed with other values of these only: they leave its model, the order
# of its training examples (of which dataset.json says how they are read) and its
# optimizer state as they are. A dot at the end stands for a whole section.
_MAY_CHANGE = (
    "steps", "eval.", "checkpoint.", "sweep.", "log_every", "profile", "trackers", "max_bad_steps", "sharding", "mesh", "accumulate",
    "model.remat", "model.attention", "data.path", "data.access", "data.disk_cache", "data.disk_cache_gib",
    "data.cache_gib", "data.max_bad", "data.eval_transforms", "data.test_split",
    "optim.learning_rate", "optim.schedule", "optim.end_learning_rate", "optim.warmup", "optim.cooldown", "optim.timescale",
)  # fmt: skip


def stored_config(source: str) -> Config | None:
    """The config of the run in the folder ``source``, local or remote; None if it holds
    none."""
    folder = epath.Path(source)
    # Hugging Face's folders hold a config.json as well.
    if "://" in source and not source.startswith(("gs://", "s3://")):
        return None
    if not (folder / checkpoint.FOLDER).exists():
        return None
    return config.read(folder / "config.json")


def check_place(flag: str, folder: str) -> None:
    """UserError if a folder to write to is neither local nor in a bucket."""
    if "://" in folder and not folder.startswith(("gs://", "s3://")):
        raise UserError(f"{flag}={folder}: give a local folder or a gs:// address")


class Claim:
    """The workdir of a run, for this process alone while the context is open.

    Raises:
      UserError: when entered: it cannot be written, another process is using it, or it
        holds a run with another model or other data.
    """

    def __init__(self, workdir: str, cfg: Config, info: DataInfo):
        self._workdir, self._cfg, self._info = workdir, cfg, info
        self._folder = epath.Path(workdir)
        self._held = contextlib.ExitStack()
        self._lock: Any = None

    def __enter__(self) -> "Claim":
        if jax.process_index() == 0:
            with self._explain_no_access():
                # A run that saved nothing has nothing to lose.
                if checkpoint.steps(self._workdir):
                    self._check_same_run()
                self._folder.mkdir(parents=True, exist_ok=True)
                if "://" not in self._workdir:
                    self._lock = self._held.enter_context(_lock(self._workdir))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self) -> None:
        """Writes ``config.json`` and ``dataset.json``, once nothing can be refused any
        more."""
        if jax.process_index() == 0:
            with self._explain_no_access():
                write_whole(self._folder / "config.json", config.to_json(self._cfg))
                text = json.dumps(self._dataset(), indent=2) + "\n"
                write_whole(self._folder / "dataset.json", text)

    def check(self) -> None:
        """UserError if the folder was removed or replaced meanwhile: what would be
        written now is no run that anything could read."""
        if self._lock:
            here = epath.Path(self._lock.name)
            mine = os.fstat(self._lock.fileno()).st_ino
            if not here.exists() or os.stat(here).st_ino != mine:
                raise UserError(
                    f"--workdir={self._workdir} was removed or replaced while this run "
                    "was writing to it: start the command again to begin anew"
                )

    @contextlib.contextmanager
    def _explain_no_access(self) -> Iterator[None]:
        remote = "://" in self._workdir
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
                f"--workdir={self._workdir} cannot be written ({type(e).__name__}: {reason}){hint}"
            ) from e

    def _check_same_run(self) -> None:
        stored = self._folder / "config.json"
        if not stored.exists():
            return
        changes = config.difference(config.read(stored), self._cfg)
        lines = {k: f"{k}: {old!r} -> {new!r}" for k, (old, new) in changes.items()}
        fatal = [line for k, line in lines.items() if not may_change(k)]
        fatal += self._other_examples()
        if fatal:
            raise UserError(
                f"{self._workdir} holds a run with another config ({'; '.join(fatal)}): give the same values, or another --workdir"
            )
        for line in lines.values():
            say(f"config       {line}")

    def _other_examples(self) -> list[str]:
        """What differs of the training examples, which a path alone does not say."""
        try:
            old = json.loads((self._folder / "dataset.json").read_text())
            new = self._dataset()
            # Runs of an earlier version do not say how their examples were read.
            old = {"in_sequence": new["in_sequence"]} | old
            keys = ("num_train", "num_classes", "class_names", "in_sequence")
            knob = {"in_sequence": " (config.data.access)"}
            return [
                f"{k} of the data{knob.get(k, '')}: {old[k]} -> {new[k]}"
                for k in keys
                if old[k] != new[k]
            ]
        except (OSError, ValueError, TypeError, LookupError):
            return []

    def _dataset(self) -> dict[str, Any]:
        """What a user of the checkpoint must know about the data."""
        cfg, info = self._cfg, self._info
        return {
            "source": cfg.data.source,
            "name": cfg.data.name,
            "num_classes": info.num_classes,
            "class_names": list(info.class_names),
            "num_train": info.num_train,
            "num_test": info.num_test,
            "in_sequence": info.in_sequence,
            "multilabel": info.multilabel,
            "image_size": list(cfg.model.image_size),
            "eval_transforms": config.to_dict(cfg.data)["eval_transforms"],
        }


def may_change(field: str) -> bool:
    """Whether a run may be resumed with another value of a field of the config."""
    section = field.split(".")[0] + "."
    return field in _MAY_CHANGE or section in _MAY_CHANGE


@contextlib.contextmanager
def _lock(workdir: str) -> Iterator[Any]:
    import fcntl  # not on Windows, where nothing is locked

    with open(epath.Path(workdir) / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--workdir={workdir} is in use by another process: wait for it or give another --workdir"
            ) from None
        yield f


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
        """Adds a line. What cannot be written is said and left out: a full disk must not
        end a run."""
        if not self._active:
            return
        line = _line({"step": step, **metrics})
        if line in self._last:  # a finished run was evaluated again
            return
        try:
            self._append(self._path, line.encode())
            if self._encode:
                self._append(self._events, self._encode(step, metrics))
        except Exception as e:  # on gs:// an error class of tensorflow's or gcsfs's own
            if _is_local(self._path) and not isinstance(e, OSError):
                raise
            why = getattr(e, "strerror", None) or one_line(e)
            _LOG.warning("%s has no line of step %d: %s", self._path, step, why)

    def _append(self, path: epath.Path, more: bytes) -> None:
        if not _is_local(path):
            self._written[path] = self._written.get(path, b"") + more
            path.write_bytes(self._written[path])
            return
        with open(path, "ab", buffering=0) as f:
            size = f.tell()
            try:
                while more:
                    more = more[f.write(more) :]
            except OSError:
                f.truncate(size)  # half a line would spoil the next one as well
                raise


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a process killed meanwhile leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """The numbers in the lines of ``metrics.jsonl``, null as NaN; damaged lines are left
    out, such as the last one of a process that was killed."""
    path = epath.Path(workdir) / METRICS
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                row = {k: math.nan if v is None else v for k, v in row.items()}
                found.append(
                    {k: v for k, v in row.items() if isinstance(v, int | float)}
                )
    return found


def is_evaluation(row: Mapping[str, float]) -> bool:
    """Whether a line of ``metrics.jsonl`` is that of an evaluation."""
    return any("/" in name and not name.startswith("train/") for name in row)


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
