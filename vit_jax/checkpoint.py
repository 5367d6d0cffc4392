# SPDX-License-Identifier: Apache-2.0
"""Orbax behind three verbs: save, restore, load_params. The only module that knows
Orbax.

A checkpoint is a folder ``checkpoints/<step>/`` with the items ``params``, ``opt``
(optimizer state) and, with Polyak averaging, ``ema``. Orbax marks it when it is
complete, so a run that is killed while saving finds the one before. Nothing else is
needed to resume: data order and randomness follow from the step number.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from vit_jax.config import CheckpointConfig, smaller_is_better
from vit_jax.errors import UserError

FOLDER = "checkpoints"


class Checkpointer:
    """Saves and restores the States (``program.State``) of one run, asynchronously and on any number of
    processes."""

    def __init__(self, workdir: str, cfg: CheckpointConfig):
        keep: list[Any] = [preserve.LatestN(max(cfg.keep, 1))]
        metric = lambda m: m[cfg.keep_best]
        if cfg.keep_best:
            keep.append(
                preserve.BestN(
                    get_metric_fn=metric,
                    reverse=smaller_is_better(cfg.keep_best),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best = cfg.keep_best
        self._manager = ocp.CheckpointManager(
            _folder(workdir),
            item_handlers={
                k: ocp.StandardCheckpointHandler() for k in ("params", "opt", "ema")
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserve.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,  # of a process that was killed
                best_fn=metric if cfg.keep_best else None,
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Starts a save and returns; waits first for the one before. A step that is
        there is left alone."""
        if step in self._manager.all_steps():
            return
        items = {"params": state.params, "opt": {"opt_state": state.opt_state}}
        if jax.tree.leaves(state.ema):
            items["ema"] = state.ema
        args = ocp.args.Composite(
            **{k: ocp.args.StandardSave(v) for k, v in items.items()}
        )
        metrics = {k: float(v) for k, v in metrics.items()}
        use = metrics if self._best in metrics else None
        with self._explain_failed_save():
            self._manager.save(step, args=args, metrics=use, force=True)

    def restore(self, like: Any) -> Any:
        """The newest complete State, placed like ``like`` (shapes with shardings); None
        if there is none.

        Devices, hosts and the sharding strategy may differ from those that saved it.
        """
        step = self.latest
        if step is None:
            return None
        items = {"params": like.params, "opt": {"opt_state": like.opt_state}}
        if jax.tree.leaves(like.ema):
            items["ema"] = like.ema
        args = ocp.args.Composite(
            **{k: ocp.args.StandardRestore(v) for k, v in items.items()}
        )
        with self._explain_damage(step):
            self._check(step, items)
            found = self._manager.restore(step, args=args)
        count = jax.device_put(np.int32(step), like.step.sharding)
        return type(like)(
            found["params"], found["opt"]["opt_state"], count, found.get("ema", {})
        )

    def _check(self, step: int, items: dict[str, Any]) -> None:
        """UserError if the checkpoint holds other arrays than ``items``; Orbax's own
        errors name no array."""
        stored = self._manager.item_metadata(step)
        problems = []
        for name, like in items.items():
            if not stored.get(name) and (epath.Path(self.path(step)) / name).exists():
                raise FileNotFoundError(f"there is no metadata of {name}")
            there = _shapes(stored[name].tree if stored.get(name) else {})
            wanted = _shapes(like)
            problems += [f"{name}/{k} is missing" for k in wanted if k not in there]
            problems += [f"{name}/{k} is not wanted" for k in there if k not in wanted]
            problems += [
                f"{name}/{k} has shape {there[k]}, not {wanted[k]}"
                for k in wanted
                if k in there and there[k] != wanted[k]
            ]
        if problems:
            raise UserError(
                f"{self.path(step)} holds another model or optimizer than the config describes: "
                f"{'; '.join(problems[:5])} ({len(problems)} in all). Give the config it was trained with, "
                "or another --workdir"
            )

    @contextlib.contextmanager
    def _explain_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
            older = [self.path(s) for s in self._manager.all_steps() if s < step]
            raise UserError(
                f"{self.path(step)} is damaged ({_reason(e)}): remove that folder to "
                f"continue from {older[-1] if older else 'the beginning'}"
            ) from e

    @contextlib.contextmanager
    def _explain_failed_save(self) -> Iterator[None]:
        """What Orbax reports of a save that failed, at the next save or wait."""
        try:
            yield
        except (ValueError, OSError) as e:
            done = steps(str(self._manager.directory.parent))
            raise UserError(
                f"a checkpoint cannot be written to {self._manager.directory} "
                f"({_reason(e)}): make room or give access, and start the same command "
                f"to continue from {f'step {done[-1]}' if done else 'the beginning'}"
            ) from e

    def path(self, step: int) -> str:
        return str(self._manager.directory / str(step))

    def wait(self) -> None:
        """Returns when everything saved is complete.

        Raises:
          UserError: a save has failed, for example because the disk is full.
        """
        with self._explain_failed_save():
            self._manager.wait_until_finished()

    def close(self) -> None:
        # Orbax waits for its cleaning only before a save; a run that ends sooner would
        # cut it short with a traceback.
        self._manager._maybe_await_cleanup_tmp_directory()
        self._manager.close()


def steps(workdir: str) -> list[int]:
    """The steps that a workdir has checkpoints of, the newest last."""
    folder = epath.Path(_folder(workdir))
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def load_params(path: str) -> dict[str, Any]:
    """The parameters in a workdir, its ``checkpoints`` folder or one checkpoint, as
    numpy arrays on this host.

    The Polyak average is taken where there is one: it is what was evaluated.

    Raises:
      UserError: there is no complete checkpoint at ``path``.
    """
    folder = epath.Path(_absolute(path))
    if not (folder / "params").exists():
        root = folder / FOLDER if (folder / FOLDER).exists() else folder
        step = None
        if root.exists():
            options = ocp.CheckpointManagerOptions(read_only=True)
            with ocp.CheckpointManager(root, options=options) as manager:
                step = manager.latest_step()
        if step is None:
            raise UserError(
                f"{path} holds no complete checkpoint: give a workdir with {FOLDER}/<step>/ in it"
            )
        folder = root / str(step)
    item = folder / ("ema" if (folder / "ema").exists() else "params")
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(item).item_metadata.tree
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host), shapes
        )
        return jax.tree.map(np.asarray, reader.restore(item, like))


def _reason(error: Exception) -> str:
    text = str(error).split(" [tensorstore_spec")[0]
    return " ".join(text.split())[:500] or type(error).__name__


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape; positions in tuples and names of fields both count as names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda key: str(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    )
    return {"/".join(map(name, path)): tuple(x.shape) for path, x in leaves}


def _folder(workdir: str) -> str:
    return str(epath.Path(_absolute(workdir)) / FOLDER)


def _absolute(path: str) -> str:
    return path if "://" in path else str(epath.Path(path).expanduser().resolve())
