# SPDX-License-Identifier: Apache-2.0
"""Orbax behind three verbs: save, restore, load_params. The only module that knows
Orbax.

A checkpoint is a folder ``checkpoints/<step>/`` with the items ``params``, ``opt``
(optimizer state) and, with Polyak averaging, ``ema``. Orbax gives it this name when it
is complete, so a run that is killed while saving finds the one before. Nothing else is
needed to resume: data order and randomness follow from the step number.

A fourth item, ``digests``, is a JSON file with a digest of every array. What is read is
compared with it; of a damaged checkpoint nothing is used.
"""

import contextlib
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vit_jax.config import CheckpointConfig
from vit_jax.errors import UserError

FOLDER = "checkpoints"
_LOG = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the States (``program.State``) of one run, asynchronously and
    on any number of processes.

    Args:
      workdir: of the run.
      cfg: what to keep.
      evaluations: rows of ``metrics.jsonl`` so far, which say what ``cfg.keep_best`` is.
      smallest: whether the best value of that metric is the smallest.
    """

    def __init__(
        self,
        workdir: str,
        cfg: CheckpointConfig,
        evaluations: Sequence[Mapping[str, float]] = (),
        smallest: bool = False,
    ):
        self._cfg, self._sign = cfg, -1 if smallest else 1
        self._root = _root(workdir)
        self._scores: dict[int, float] = {}
        for row in evaluations:
            self.evaluated(int(row["step"]), row)
        if jax.process_index() == 0:
            with self._explain_failed_save():
                self._root.mkdir(parents=True, exist_ok=True)
                for left in self._root.iterdir():  # by a process that was killed
                    if left.is_dir() and ocp.utils.is_tmp_checkpoint(left):
                        left.rmtree()
        _meet("checkpoints are cleaned")
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(_steps(self._root), default=None)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes note of an evaluation, which may follow the save. NaN ranks nowhere."""
        score = metrics.get(self._cfg.keep_best, math.nan)
        if math.isfinite(score):
            self._scores[step] = self._sign * score

    def save(self, state: Any, step: int) -> None:
        """Starts a save and returns; waits first for the one before. Does nothing if
        that step is saved."""
        self.wait()
        if step in _steps(self._root):
            return
        items = _items(state)
        args: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in items.items()}
        args["digests"] = ocp.args.JsonSave(_sealed(_describe(items)))
        with self._explain_failed_save():
            # A folder of that name without Orbax's mark is what a kill has left.
            self._writer.save(
                self._root / str(step), ocp.args.Composite(**args), force=True
            )

    def restore(self, like: Any) -> Any:
        """The newest intact State, placed like ``like`` (a State of shapes with
        shardings); None if there is none.

        Devices, hosts and the sharding strategy may differ from those that saved it.
        Damaged checkpoints are named and set aside.

        Raises:
          UserError: all are damaged, or the newest holds another model.
        """
        found = sorted(_steps(self._root), reverse=True)
        if not found:
            return None
        paths = [self._root / str(step) for step in found]
        path, items = _first_intact(paths, lambda path: _read_state(path, like))
        if jax.process_index() == 0:
            for damaged in paths[: paths.index(path)]:
                _move(damaged, self._root / f"damaged-{damaged.name}")
        _meet("damaged checkpoints are set aside")
        step = jax.device_put(np.int32(path.name), like.step.sharding)
        return like._replace(
            params=items["params"],
            opt_state=items["opt"]["opt_state"],
            step=step,
            ema=items.get("ema", {}),
        )

    def path(self, step: int) -> str:
        """Folder of a step."""
        return str(self._root / str(step))

    def wait(self) -> None:
        """Returns when everything saved is complete and what need not stay is removed.

        Raises:
          UserError: a save has failed, for example because the disk is full.
        """
        with self._explain_failed_save():
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                self._prune()

    def close(self) -> None:
        self._writer.close()

    def _prune(self) -> None:
        steps = _steps(self._root)
        keep = set(steps[-self._cfg.keep :])
        scored = [step for step in steps if step in self._scores]
        if scored:
            keep.add(max(scored, key=lambda step: self._scores[step]))
        for step in set(steps) - keep:
            _remove(self._root / str(step))

    @contextlib.contextmanager
    def _explain_failed_save(self) -> Iterator[None]:
        """What Orbax reports of a save that failed, at the next save or wait."""
        try:
            yield
        except Exception as e:  # on gs:// an error class of tensorflow's or gcsfs's own
            if "://" not in str(self._root) and not isinstance(e, ValueError | OSError):
                raise
            raise UserError(
                f"a checkpoint cannot be written to {self._root} "
                f"({_reason(e)}): make room or give access, and start the same command "
                f"to continue from {self._where_to_continue()}"
            ) from e

    def _where_to_continue(self) -> str:
        try:
            done = _steps(self._root) if self._root.exists() else []
        except Exception:  # what cannot be written may be out of reach as a whole
            return "the last checkpoint"
        return f"step {done[-1]}" if done else "the beginning"


def steps(workdir: str) -> list[int]:
    """The steps that a workdir has complete checkpoints of, the newest last."""
    root = _root(workdir)
    return _steps(root) if root.exists() else []


def load_params(path: str) -> dict[str, Any]:
    """The parameters in a workdir, its ``checkpoints`` folder or one checkpoint, as
    numpy arrays on this host.

    The Polyak average is taken where there is one: it is what was evaluated. Of a
    workdir the newest intact checkpoint is read.

    Raises:
      UserError: there is no complete and intact checkpoint at ``path``.
    """
    folder = epath.Path(_absolute(path))
    paths = [folder]
    if not (folder / "params").exists():
        root = folder / FOLDER if (folder / FOLDER).exists() else folder
        found = _steps(root) if root.is_dir() else []
        if not found:
            raise UserError(
                f"{path} holds no complete checkpoint: give a workdir with {FOLDER}/<step>/ in it"
            )
        paths = [root / str(step) for step in reversed(found)]
    # A run that starts from it computes on all devices; what is read lies on one.
    with jax.set_mesh(None):  # type: ignore[reportGeneralTypeIssues]
        _, params = _first_intact(paths, _read_params)
    return jax.tree.map(np.asarray, params)


# Reading ---------------------------------------------------------------------


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def _first_intact(
    paths: Sequence[epath.Path], read: Callable[[epath.Path], Any]
) -> tuple[epath.Path, Any]:
    """The first checkpoint that can be read, and what ``read`` gives of it."""
    damage = []
    for path in paths:
        try:
            found = read(path)
        except _Damaged as e:
            damage.append(f"{path} is damaged ({e})")
            continue
        for reason in damage:
            _LOG.warning("%s: %s is used instead", reason, path)
        return path, found
    raise UserError(
        f"{'; '.join(damage)}: no intact checkpoint is left, restore one from a copy or "
        "start again in another folder"
    )


def _read_state(path: epath.Path, like: Any) -> dict[str, Any]:
    """The items of a State, with the same outcome on every process."""
    wanted = _items(like)
    stored: dict[str, Any] = {}
    found: dict[str, Any] = {}
    reason = ""
    try:
        stored = _stored(path)
        if stored:
            _check_same_arrays(path, stored, wanted)
        found = {name: _read_item(path / name, x) for name, x in wanted.items()}
    except UserError:
        raise
    except Exception as e:  # Orbax raises whatever it meets
        reason = _reason(e)
    if not _everywhere(not reason):
        raise _Damaged(reason or "another process cannot read it")
    _compare(path, stored, found)
    return found


def _read_params(path: epath.Path) -> Any:
    """The parameters that were evaluated, on this host."""
    try:
        stored = _stored(path)
        averaged = any(name.startswith("ema/") for name in stored)
        item = "ema" if averaged or (path / "ema").exists() else "params"
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        tree = ocp.StandardCheckpointHandler().metadata(path / item).tree
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host), tree
        )
        found = {item: _read_item(path / item, like)}
    except Exception as e:
        raise _Damaged(_reason(e)) from e
    _compare(path, stored, found)
    return found[item]


def _read_item(path: epath.Path, like: Any) -> Any:
    # Not through a Checkpointer: it makes the processes wait for each other, for ever
    # if one of them cannot read.
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(path, args=ocp.args.StandardRestore(like))


def _compare(
    path: epath.Path, stored: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """_Damaged if an array is not what was saved."""
    if not stored:
        _LOG.warning("%s has no digests: it cannot be verified", path)
        return
    wrong = [k for k, v in _describe(found).items() if stored.get(k) != v]
    if wrong:
        raise _Damaged(
            f"{wrong[0]} is not what was saved ({len(wrong)} of {len(stored)} arrays)"
        )


def _check_same_arrays(
    path: epath.Path, stored: Mapping[str, Any], items: Mapping[str, Any]
) -> None:
    """UserError if the checkpoint holds other arrays than ``items``."""
    there = {k: tuple(v["shape"]) for k, v in stored.items()}
    wanted = {k: tuple(x.shape) for k, x in _named(items).items()}
    problems = [f"{k} is missing" for k in wanted if k not in there]
    problems += [f"{k} is not wanted" for k in there if k not in wanted]
    problems += [
        f"{k} has shape {there[k]}, not {wanted[k]}"
        for k in wanted
        if k in there and there[k] != wanted[k]
    ]
    if problems:
        raise UserError(
            f"{path} holds another model or optimizer than the config describes: "
            f"{'; '.join(problems[:5])} ({len(problems)} in all). Give the config it was trained with, "
            "or another --workdir"
        )


def _items(state: Any) -> dict[str, Any]:
    """What is saved of a State, by the name of its folder."""
    items = {"params": state.params, "opt": {"opt_state": state.opt_state}}
    return items | {"ema": state.ema} if jax.tree.leaves(state.ema) else items


# Digests ---------------------------------------------------------------------


def _describe(items: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and digest of every array."""
    arrays = _named(items)
    digests = []
    for x in arrays.values():
        digests.append(digest(x))
        if jax.default_backend() == "cpu":
            # The devices of a CPU share its threads: programs of which each waits for
            # all devices may, several at a time, wait for each other for ever.
            jax.block_until_ready(digests[-1])
    digests = jax.device_get(digests)
    return {
        k: {"shape": list(x.shape), "digest": "".join(f"{int(part):08x}" for part in d)}
        for (k, x), d in zip(arrays.items(), digests, strict=True)
    }


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """uint32 (2,), a function of the bits of an array and of where they stand.

    Sums of integers, so that it neither depends on how the array is divided among
    devices and processes nor needs it to leave them.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    stride, position = 1, jnp.zeros(x.shape, jnp.uint32)
    for axis in reversed(range(x.ndim)):
        counted = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += counted * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    once = _mix(bits + _mix(position + np.uint32(0x9E3779B9)))
    twice = _mix(once + np.uint32(0x7F4A7C15))
    return jnp.stack([once.sum(dtype=jnp.uint32), twice.sum(dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of a word changes half of the others."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sealed(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"arrays": arrays, "crc32": _crc32(arrays)}


def _stored(path: epath.Path) -> dict[str, Any]:
    """Array -> shape and digest as they were when saved; {} if it was saved without.

    Raises:
      _Damaged: the file with them is.
    """
    if not (path / "digests").exists():
        return {}
    try:
        found = json.loads((path / "digests" / "metadata").read_text())
        arrays, intact = found["arrays"], found["crc32"] == _crc32(found["arrays"])
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise _Damaged(f"digests: {_reason(e)}") from e
    if not intact:
        raise _Damaged("digests: their checksum is wrong")
    return arrays


def _crc32(arrays: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(arrays, sort_keys=True).encode())


def _named(tree: Any) -> dict[str, Any]:
    """Path -> array; positions in tuples and names of fields both count as names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda key: str(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    )
    return {"/".join(map(name, path)): x for path, x in leaves}


# Folders and processes -------------------------------------------------------


def _steps(root: epath.Path) -> list[int]:
    complete = ocp.utils.is_checkpoint_finalized
    # Written as steps are: "007" would be looked for as 7.
    named = [p for p in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name)]
    return sorted(int(p.name) for p in named if complete(p))


def _remove(path: epath.Path) -> None:
    """Removes a checkpoint so that a process killed meanwhile leaves none by halves."""
    if "://" in str(path):
        (path / "commit_success.txt").unlink(missing_ok=True)
        path.rmtree()
        return
    _move(path, path.with_name(f"{path.name}.orbax-checkpoint-tmp")).rmtree()


def _move(path: epath.Path, to: epath.Path) -> epath.Path:
    if to.exists():
        to.rmtree()
    return path.rename(to)


def _everywhere(ok: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.array(ok)).all())


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _reason(error: Exception) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]
    return " ".join(text.split())[:300] or type(error).__name__


def _root(workdir: str) -> epath.Path:
    return epath.Path(_absolute(workdir)) / FOLDER


def _absolute(path: str) -> str:
    return path if "://" in path else str(epath.Path(path).expanduser().resolve())
