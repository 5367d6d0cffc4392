# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases and MLflow, beside ``metrics.jsonl`` and TensorBoard.

A tracker has two methods: ``log(step, metrics)``, and ``close(figures)``, which takes the
image files of the workdir along. Where it writes to, and as whom, is said by its own
environment: WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI and so on. Add one as
a class with a line in :data:`TRACKERS`.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
from etils import epath

from vit_jax import config
from vit_jax.config import Config

_LOG = logging.getLogger(__name__)
_IDS = "trackers.json"  # in the workdir: which run there a run of ours is
_FIGURES = ("*.png", "figures/*.png")


class Tracker(Protocol):
    """One run in somebody's service. Both methods may raise whatever they like."""

    id: str  # by which the run is found again

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self, figures: Sequence[epath.Path]) -> None: ...


class Trackers:
    """The trackers that a config names; none on processes but 0.

    One that fails is left out from then on, with one warning: it never ends a run.

    Args:
      cfg: of the run.
      workdir: of the run.
      start: step that it continues from; from 0, a new run is begun.

    Raises:
      ModuleNotFoundError: its package is not installed.
    """

    def __init__(self, cfg: Config, workdir: str, start: int):
        self._folder = epath.Path(workdir)
        self._live: dict[str, Tracker] = {}
        names = cfg.trackers if jax.process_index() == 0 else ()
        ids = self._stored_ids() if start else {}
        for name in names:
            begin = TRACKERS[name]
            self._try(name, lambda n=name, b=begin: self._begin(n, b, cfg, ids))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, lambda t=tracker: t.log(step, metrics))

    def close(self) -> None:
        for name, tracker in list(self._live.items()):
            figures = sorted(p for g in _FIGURES for p in self._folder.glob(g))
            self._try(name, lambda t=tracker, f=figures: t.close(f))
        self._live.clear()

    def _begin(
        self, name: str, begin: "Begin", cfg: Config, ids: dict[str, str]
    ) -> None:
        self._live[name] = begin(cfg, self._folder, ids.get(name, ""))
        ids[name] = self._live[name].id
        (self._folder / _IDS).write_text(json.dumps(ids) + "\n")

    def _stored_ids(self) -> dict[str, str]:
        try:
            return dict(json.loads((self._folder / _IDS).read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ModuleNotFoundError:
            raise
        except Exception as e:
            self._live.pop(name, None)
            why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            _LOG.warning("config.trackers: %s gets no more metrics: %s", name, why)


class _Wandb:
    def __init__(self, cfg: Config, folder: epath.Path, known: str):
        import wandb  # pyright: ignore[reportMissingImports]

        self.id = known or uuid.uuid4().hex[:12]
        self._image = wandb.Image
        self._run = wandb.init(
            id=self.id,
            name=folder.name,
            config=config.to_dict(cfg),
            # Offline there is nobody to ask whether the run exists.
            resume="allow" if known else None,
            dir=None if "://" in str(folder) else str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, figures: Sequence[epath.Path]) -> None:
        for path in figures:
            self._run.log({path.stem: self._image(str(path))})
        self._run.finish()


class _Mlflow:
    def __init__(self, cfg: Config, folder: epath.Path, known: str):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._client = mlflow.MlflowClient()
        if known:
            self.id = known
            self._client.update_run(known, status="RUNNING")
        else:
            experiment = mlflow.set_experiment("vit_jax").experiment_id
            run = self._client.create_run(experiment, run_name=folder.name)
            self.id = run.info.run_id
        self._client.log_dict(self.id, config.to_dict(cfg), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self.id, name, value, step=step)

    def close(self, figures: Sequence[epath.Path]) -> None:
        for path in figures:
            self._client.log_artifact(self.id, str(path), "figures")
        self._client.set_terminated(self.id)


# (config, workdir, id of the run to go on with or "") -> tracker
Begin = Callable[[Config, epath.Path, str], Tracker]
TRACKERS: dict[str, Begin] = {"wandb": _Wandb, "mlflow": _Mlflow}
