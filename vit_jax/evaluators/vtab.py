# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k: 19 tasks of 1,000 training examples, the group means, and the paper's
numbers beside.

The paper fine-tunes every task (``configs/vtab.py``); ``python -m vit_jax.evaluate DIR --vtab``
puts the results of 19 such workdirs into this table. The evaluator ``vtab`` is the
quick look: a linear probe on frozen features, for which the paper has no numbers, so
they are shown only for orientation.
"""

from collections.abc import Mapping, Sequence

from etils import epath

from vit_jax import config
from vit_jax.config import choose
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Amounts, Context
from vit_jax.evaluators.linear_probe import L2_GRID, linear_probe
from vit_jax.vtab_tasks import GROUPS, PAPER, TASKS
from vit_jax.workdir import read_metrics


def vtab(
    context: Context,
    *,
    tasks: Sequence[str] = (),
    l2: Amounts = L2_GRID,
) -> dict[str, float]:
    """Linear probe on each task: accuracy per task, mean per group and over all tasks.

    Args:
      context: the model.
      tasks: some of ``TASKS``; (): all 19. Means need all tasks of a group.
      l2: strengths of regularisation that ``linear_probe`` chooses from on 200 of the
        1,000 examples.
    """
    for task in tasks:
        choose("VTAB task", task, TASKS)
    found = {}
    for task in tasks or TASKS:
        data = context.other_data({"name": f"vtab/{task}", "eval_transforms": ()})
        probe = linear_probe(context, data=config.to_dict(data), l2=l2)
        found[task] = probe["accuracy"]
    return found | means(found)


def means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """``mean_natural``, ... and ``mean`` over the 19 tasks, of what is complete."""
    result = {}
    for group in (*GROUPS, ""):
        members = [t for t, row in TASKS.items() if group in ("", row.group)]
        if all(t in accuracies for t in members):
            mean = sum(accuracies[t] for t in members) / len(members)
            result[f"mean_{group}" if group else "mean"] = mean
    return result


def read(folder: str) -> dict[str, float]:
    """Last ``test/accuracy`` of the workdirs ``folder/<task>`` that exist.

    Raises:
      UserError: there is none.
    """
    found = {}
    for task in TASKS:
        for row in read_metrics(str(epath.Path(folder) / task)):
            if "test/accuracy" in row:
                found[task] = row["test/accuracy"]
    if not found:
        raise UserError(
            f"{folder} holds no workdir with test/accuracy named after a VTAB task: "
            f"train configs/vtab.py:TASK with --workdir={folder}/TASK, TASK one of {list(TASKS)}"
        )
    return found


def table(accuracies: Mapping[str, float]) -> str:
    """Text with one line per task in %, group means, and Table 9 beside."""
    head = f"{'task':<18}{'measured':>10}" + "".join(f"{p:>10}" for p in PAPER)
    lines = [head]
    overall = means(accuracies)
    for group in GROUPS:
        members = [t for t, row in TASKS.items() if row.group == group]
        lines += [
            _line(f"  {TASKS[t].title}", accuracies.get(t), _paper([t]))
            for t in members
        ]
        lines.append(_line(group, overall.get(f"mean_{group}"), _paper(members)))
    lines.append(_line("mean of 19", overall.get("mean"), _paper(list(TASKS))))
    return "\n".join(lines)


def _paper(tasks: Sequence[str]) -> list[float]:
    return [sum(getattr(TASKS[t], p) for t in tasks) / len(tasks) for p in PAPER]


def _line(name: str, measured: float | None, paper: Sequence[float]) -> str:
    shown = "-" if measured is None else f"{100 * measured:.2f}"
    return f"{name:<18}{shown:>10}" + "".join(f"{p:>10.2f}" for p in paper)
