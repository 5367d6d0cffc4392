# SPDX-License-Identifier: Apache-2.0
"""Measures a checkpoint with every evaluator of a config.

    python -m vit_jax.evaluate SOURCE --config=configs/X.py [--config.key=value ...]
        [--out=DIR] [--json]

SOURCE is whatever ``vit_jax.load`` takes; a workdir brings its own config. Prints a
table, or with ``--json`` one object of metric names; ``--out`` keeps both, and the
arrays behind them. ``--vtab`` instead reads SOURCE as a folder of fine-tuned workdirs,
one per VTAB task.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from vit_jax import cli, config, data, evaluators, inference, weights, workdir
from vit_jax.config import Config
from vit_jax.errors import UserError, writing
from vit_jax.evaluators import vtab


def evaluate(source: str, cfg: Config | None = None, out: str = "") -> dict[str, float]:
    """``{"test/accuracy": ...}`` of a checkpoint on the data of a config.

    The architecture, the class names and, unless the config names transforms, the
    preprocessing are those of the checkpoint.

    Args:
      source: of the weights.
      cfg: what to measure on which data; None: the config of the workdir ``source``.
      out: folder for ``evaluation.json``, ``evaluation.txt`` and the arrays behind the
        numbers.

    Raises:
      UserError: no config or evaluator, another number of classes, or whatever an
        evaluator refuses.
    """
    cfg = cfg or workdir.stored_config(source)
    if cfg is None:
        raise UserError(
            f"{source} brings no config.json of a run: say what to measure with "
            "--config=configs/X.py"
        )
    evaluators.check(cfg)
    if not cfg.eval.evaluators:
        raise UserError(
            "config.eval.evaluators is empty, so there is nothing to measure: choose of "
            f"{', '.join(evaluators.EVALUATORS)}, for example "
            "--config.eval.evaluators=\"({'type':'fewshot'},)\""
        )
    if out:
        _check_writable(out)
    context = _context(source, cfg, out)
    metrics = evaluators.run(context)
    if out:
        values = {"source": source, "metrics": cli.finite(metrics)}
        _write(out, "evaluation.json", json.dumps(values, indent=2) + "\n")
        _write(out, "evaluation.txt", table(metrics) + "\n")
    return metrics


def table(metrics: Mapping[str, float]) -> str:
    """One line per number; VTAB with the paper's numbers beside."""
    tasks = {t: metrics[f"vtab/{t}"] for t in vtab.TASKS if f"vtab/{t}" in metrics}
    rest = {k: v for k, v in metrics.items() if not (tasks and k.startswith("vtab/"))}
    width = max(map(len, rest), default=0)
    lines = [
        f"{k:<{width}}  {v:>12,.0f}" if v % 1 == 0 and abs(v) > 1 else f"{k:<{width}}  {v:>12.5f}"
        for k, v in rest.items()
    ]  # fmt: skip
    if tasks:
        lines.append("VTAB-1k, linear probe on frozen features; the paper fine-tunes:")
        lines.append(vtab.table(tasks))
    return "\n".join(lines)


def _context(source: str, cfg: Config, out: str) -> evaluators.Context:
    size = cfg.model.image_size if any(cfg.model.image_size) else cfg.data.image_size
    found = weights.read(source, size or None, dtype=cfg.model.dtype)
    found.report.log()
    if not cfg.data.image_size:
        cfg = config.replace(cfg, data__image_size=max(found.cfg.image_size))
    about = found.metadata
    if about.transforms and not cfg.data.eval_transforms:
        ops = tuple(map(_square, about.transforms))
        cfg = config.replace(cfg, data__eval_transforms=ops)
    predictor = inference.create(found.cfg, found.params)
    info = data.describe(cfg.data)
    names = _class_names(about.class_names, info.class_names, found.cfg.num_classes)
    return evaluators.Context(cfg, predictor, info, names, out)


def _class_names(
    own: tuple[str, ...], of_data: tuple[str, ...], count: int
) -> tuple[str, ...]:
    """Names of the model's outputs: its own, else those of the data if there are as
    many."""
    if own:
        return own
    return of_data if len(of_data) == count else tuple(map(str, range(count)))


def _square(transform: dict[str, Any]) -> dict[str, Any]:
    """The same with one number for a (height, width) of equal sides: the images of a
    data set are squares, and its operations take the side."""
    size = transform.get("size")
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        return {**transform, "size": size[0]}
    return transform


def _check_writable(folder: str) -> None:
    """Fails before the work, not after it."""
    with writing(f"--out={folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _write(folder: str, name: str, text: str) -> None:
    if not jax.process_index():
        with writing(f"--out={folder}"):
            Path(folder, name).write_text(text)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UserError(
            f"expected one SOURCE, got {arguments}: python -m vit_jax.evaluate SOURCE "
            "--config=configs/X.py"
        )
    options = flags.FLAGS
    with cli.only_json(options.json):
        if options.vtab:
            found = vtab.read(arguments[0])
            metrics = {f"vtab/{k}": v for k, v in (found | vtab.means(found)).items()}
            text = vtab.table(found)
        else:
            cli.connect()
            cfg = None if options.config is None else cli.read_config()
            metrics = evaluate(arguments[0], cfg, options.out)
            text = table(metrics)
    if not jax.process_index():
        cli.print_json(metrics) if options.json else print(text)
    return 0


def define_flags() -> None:
    flags.DEFINE_string("out", "", "Folder for the results and the arrays behind them.")
    flags.DEFINE_boolean("json", False, "Print one JSON object instead of a table.")
    flags.DEFINE_boolean(
        "vtab", False, "SOURCE holds a workdir per VTAB task: print the table."
    )
    cli.define_config_flag()
    cli.define_process_flags()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
