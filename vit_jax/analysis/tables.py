# SPDX-License-Identifier: Apache-2.0
"""The table of a study, and what it says of the paper's claims."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from vit_jax.scales import Claim, Row, Study


class Outcome(NamedTuple):
    """What became of a run."""

    metrics: dict[str, float]
    diverged: str  # why; "": it did not


class Summary(NamedTuple):
    """All seeds of a row."""

    name: str
    row: Row
    outcomes: Sequence[Outcome | None]  # by seed; None: not done

    def values(self, metric: str) -> list[float]:
        """By seed; nan where it is not done, diverged or has no such number."""
        return [o.metrics.get(metric, math.nan) if o and not o.diverged else math.nan for o in self.outcomes]  # fmt: skip

    def finite(self, metric: str) -> list[float]:
        return [v for v in self.values(metric) if math.isfinite(v)]

    @property
    def diverged(self) -> int:
        return sum(bool(o and o.diverged) for o in self.outcomes)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """nan where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def to_csv(study: Study, rows: Sequence[Summary]) -> str:
    """Every number; empty: not done, or diverged."""
    out = io.StringIO()
    seeds = len(rows[0].outcomes)
    write = csv.writer(out, lineterminator="\n").writerow
    write(["row", "metric", "mean", "std", "seeds", "diverged", "paper", *(f"seed_{i}" for i in range(seeds))])  # fmt: skip
    text = lambda v: f"{v:.6g}" if math.isfinite(v) else ""
    for r in rows:
        found = r.finite(study.metric)
        numbers = [text(v) for v in mean_and_std(found)]
        each = [text(v) for v in r.values(study.metric)]
        write([r.name, study.metric, *numbers, len(found), r.diverged, r.row.paper, *each])  # fmt: skip
    return out.getvalue()


def markdown(study: Study, rows: Sequence[Summary]) -> str:
    lines = [("row", study.metric, "seeds", "paper"), ("---",) * 4]
    for r in rows:
        found, n = r.finite(study.metric), len(r.outcomes)
        mean, std = mean_and_std(found)
        spread = f" ± {number(std)}" if math.isfinite(std) else ""
        value = f"{number(mean)}{spread}" if found else "not done"
        if r.diverged:
            part = f"diverged ({r.diverged} of {n})"
            value = f"{value}; {part}" if found else part
        lines.append((r.name, value, str(len(found)), r.row.paper))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda line: "| " + " | ".join(map(str.ljust, line, widths)) + " |"
    return "\n".join(map(pad, lines)) + "\n"


def number(value: float) -> str:
    """Shares with four decimals, speeds without any."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"


def verdict(study: Study, claim: Claim, rows: Sequence[Summary]) -> str:
    """What these runs say of a claim: the difference of the means, seed by seed, and
    its 95 % interval (Student's t)."""
    metric = claim.metric or study.metric
    by_name = {r.name: r for r in rows}

    def group(names: Sequence[str]) -> list[float]:
        each = [by_name[n].values(metric) for n in names]
        return [statistics.fmean(seed) for seed in zip(*each, strict=True)]

    high = group(claim.higher)
    low = group(claim.lower) if claim.lower else [0.0] * len(high)
    apart = [a - b for a, b in zip(high, low, strict=True) if math.isfinite(a - b)]
    if len(apart) < 3:
        return f"no verdict from {len(apart)} seed{'s' * (len(apart) != 1)}"
    mean, std = mean_and_std(apart)
    half = float(stats.t.ppf(0.975, len(apart) - 1)) * std / math.sqrt(len(apart))
    seen = abs(mean) > half
    if claim.equal:
        word = "differs" if seen else "no difference seen"
    else:
        word = "not resolved" if not seen else "agrees" if mean > 0 else "opposite"
    return f"{word}: {mean:+.3g} ± {half:.2g} over {len(apart)} seeds"


def claims(study: Study, rows: Sequence[Summary]) -> str:
    if not study.claims:
        return ""
    lines = ["| the paper's claim | here |", "| --- | --- |"]
    lines += [f"| {c.text} | {verdict(study, c, rows)} |" for c in study.claims]
    return "\n".join(lines) + "\n"
