# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run, on terminals of several widths and in a log file."""

import io
import re

import pytest

from vit_jax import progress

METRICS = {
    "train/loss": 1.23456,
    "train/images_per_second": 12345.6,
    "train/data_wait": 0.25,
    "train/eta_seconds": 3725.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The states of the bar, as a terminal of so many columns shows them."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)
    bar = progress.Bar(1500, 0)
    with progress.phase("compile"):
        pass
    bar.step()
    bar.log(1, METRICS)
    bar.close()
    text = re.sub(r"\x1b\[\w", "", terminal.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_begins_after_the_phases_and_fits(columns, monkeypatch):
    lines = shown(columns, monkeypatch)
    assert re.fullmatch(r"compile +\d\.\d s", lines[1])
    assert lines[0].startswith("compile")
    bars = lines[2:]
    assert bars
    assert max(map(len, lines)) <= columns
    last = bars[-1]
    assert "1/1500" in last
    assert ("loss 1.2346" in last) == (columns >= 48)
    assert ("12,346 images/s" in last) == (columns >= 72)
    assert ("data wait 25%" in last) == (columns >= 96)


def test_a_log_file_gets_plain_lines(capsys):
    bar = progress.Bar(1500, 0)
    bar.step()
    bar.log(1, METRICS)
    bar.close()
    out = capsys.readouterr().out
    assert out == (
        "step 1/1500  loss 1.2346  12,346 images/s  data wait 25.0%  ETA 1:02:05\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (3.14159, "3.14"), (99.96, "100"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value, text):
    assert progress.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1359.0, "1,359"), (0.86125, "0.8612"), (1.0, "1.0000"), (2.5, "2.5000")],
)
def test_counts_have_no_decimals(value, text):
    assert progress.number(value) == text
