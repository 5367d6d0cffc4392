# SPDX-License-Identifier: Apache-2.0
"""The files of a run: whose they are, and what damage or a full disk does to them."""

import dataclasses
import json
import math
import resource

import pytest
from tiny import TINY

from vit_jax import config, data
from vit_jax.errors import UserError
from vit_jax.workdir import Claim, MetricsWriter, read_metrics

CFG = config.replace(TINY, model__num_classes=5, model__image_size=(16, 16))


@pytest.fixture(scope="module")
def info():
    return data.describe(CFG.data)


@pytest.fixture
def saved(tmp_path, info):
    """A workdir that has something to lose."""
    with Claim(str(tmp_path), CFG, info) as claim:
        claim.write()
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    return tmp_path


def test_a_run_that_saved_nothing_may_be_corrected(info, tmp_path):
    with Claim(str(tmp_path), config.replace(CFG, seed=7), info) as claim:
        claim.write()
    with Claim(str(tmp_path), CFG, info) as claim:
        claim.write()
        assert config.read(tmp_path / "config.json") == CFG


def test_a_live_workdir_is_refused(info, tmp_path):
    with (
        Claim(str(tmp_path), CFG, info),
        pytest.raises(UserError, match="in use by another process"),
        Claim(str(tmp_path), CFG, info),
    ):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"data__path": "gs://elsewhere"},
        {"data__eval_transforms": ({"op": "resize", "size": 16},)},
        {"data__test_split": "validation"},
        {"data__disk_cache": "/elsewhere"},
        {"eval__every": 3},
    ],
)
def test_a_moved_data_set_and_what_only_evaluation_reads_may_change(
    saved, info, change, capsys
):
    with Claim(str(saved), config.replace(CFG, **change), info) as claim:
        claim.write()
    assert next(iter(change)).replace("__", ".") in capsys.readouterr().out


def test_what_only_begins_like_a_field_that_may_change_may_not(saved, info):
    """model.attention, which computes the same, is not model.attention_dropout."""
    with Claim(str(saved), config.replace(CFG, model__attention="xla"), info):
        pass
    other = config.replace(CFG, model__attention_dropout=0.1)
    with pytest.raises(UserError, match=r"model.attention_dropout: 0.0 -> 0.1"):
        Claim(str(saved), other, info).__enter__()


def test_examples_in_another_order_are_refused(saved, info):
    """Shards that moved to a bucket are read in sequence, unless data.access says
    otherwise."""
    moved = config.replace(CFG, data__path="gs://elsewhere")
    there = dataclasses.replace(info, in_sequence=True)
    message = r"in_sequence of the data \(config.data.access\): False -> True"
    with pytest.raises(UserError, match=message):
        Claim(str(saved), moved, there).__enter__()
    with Claim(str(saved), config.replace(moved, data__access="random"), info):
        pass


def test_other_examples_under_the_same_path_are_refused(saved, info):
    other = dataclasses.replace(info, num_train=7)
    with pytest.raises(UserError, match=r"num_train of the data: 1024 -> 7"):
        Claim(str(saved), CFG, other).__enter__()


@pytest.mark.parametrize("text", ["[]", "{}", "{", "7"])
def test_a_damaged_description_of_the_data_is_written_anew(saved, info, text):
    (saved / "dataset.json").write_text(text)
    with Claim(str(saved), CFG, info) as claim:
        claim.write()
    assert json.loads((saved / "dataset.json").read_text())["num_train"] == 1024


def test_damaged_lines_are_left_out(tmp_path):
    lines = [b'{"step": 1, "train/loss": 1.5}', b"\xff\xfe{", b"[1]", b"7", b'{"a": 1}']
    lines += [b'{"step": "2"}', b"\0\0\0", b'{"step": 3, "test/loss": null}']
    lines[0] = b'{"step": 1, "train/loss": 1.5, "note": "mine", "list": [1]}'
    lines += [b'{"step": 4, "train/l']  # killed while writing
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    first, last = read_metrics(str(tmp_path))
    assert first == {"step": 1, "train/loss": 1.5}
    assert last["step"] == 3
    assert math.isnan(last["test/loss"])


def test_a_full_disk_costs_the_line_and_not_the_run(tmp_path, caplog):
    """A limit on the size of files is the only full disk that a test can make."""
    writer = MetricsWriter(str(tmp_path), 0)
    writer.write(1, {"train/loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        writer.write(2, {"train/loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(3, {"train/loss": 3.0})
    assert "no line of step 2: File too large" in caplog.text
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
