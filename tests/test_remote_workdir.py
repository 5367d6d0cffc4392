# SPDX-License-Identifier: Apache-2.0
"""A workdir on gs://, with a folder standing in for the bucket. Orbax's own access to
Cloud Storage is not covered."""

import json

import pytest
from etils import epath
from etils.epath import backend, gpath
from tiny import TINY

from vit_jax import checkpoint, data
from vit_jax.checkpoint import Checkpointer
from vit_jax.config import CheckpointConfig, replace
from vit_jax.errors import UserError
from vit_jax.workdir import Claim, MetricsWriter, read_metrics

CFG = replace(TINY, model__num_classes=5, model__image_size=(16, 16))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket/... is a folder that can be replaced file by file, but not appended
    to."""
    fsspec = pytest.importorskip("fsspec")
    dirfs = pytest.importorskip("fsspec.implementations.dirfs")

    class Bucket(dirfs.DirFileSystem):
        def _open(self, path, mode="rb", **kwargs):
            assert "a" not in mode, "object stores cannot append"
            return super()._open(path, mode, **kwargs)

        def open(self, path, mode="rb", **kwargs):
            assert "a" not in mode, "object stores cannot append"
            return super().open(path, mode, **kwargs)

        def _join(self, path):
            return super()._join(
                path.removeprefix("gs://") if isinstance(path, str) else path
            )

    files = Bucket(str(tmp_path), fsspec.filesystem("file", auto_mkdir=True))
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: files)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return tmp_path


def test_a_run_writes_and_continues_its_metrics(bucket):
    workdir = "gs://bucket/run"
    with Claim(workdir, CFG, data.describe(CFG.data)) as claim:
        claim.write()
        writer = MetricsWriter(workdir, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1 / step})
    assert [m["step"] for m in read_metrics(workdir)] == [1, 2, 3]
    MetricsWriter(workdir, 2).write(3, {"train/loss": 0.5})
    assert [m["train/loss"] for m in read_metrics(workdir)] == [1.0, 0.5, 0.5]
    assert (
        json.loads((bucket / "bucket/run/dataset.json").read_text())["num_classes"] == 5
    )
    assert len(list((bucket / "bucket/run").glob("events*"))) in (
        1,
        2,
    )  # two in the same second share a name

    saved = bucket / "bucket/run/checkpoints/1"  # something to lose
    saved.mkdir(parents=True)
    (saved / "commit_success.txt").touch()
    other = Claim(workdir, replace(CFG, seed=1), data.describe(CFG.data))
    with pytest.raises(UserError, match="holds a run with another config"), other:
        pass


def test_a_bucket_out_of_reach_costs_the_line_and_not_the_run(
    bucket, monkeypatch, caplog
):
    """The libraries behind gs:// raise errors of their own, which are no OSError."""
    workdir = "gs://bucket/run"
    writer = MetricsWriter(workdir, 0)

    def refuse(self, data):
        raise RuntimeError("503 Service Unavailable")

    with monkeypatch.context() as unreachable:
        unreachable.setattr(type(epath.Path(workdir)), "write_bytes", refuse)
        writer.write(1, {"train/loss": 1.0})
    assert "no line of step 1: 503 Service Unavailable" in caplog.text
    writer.write(2, {"train/loss": 0.5})
    assert read_metrics(workdir)[-1] == {"step": 2, "train/loss": 0.5}


def test_a_checkpoint_in_a_bucket_is_deleted_by_its_mark_first(bucket, monkeypatch):
    """A process that is killed meanwhile leaves no half of a checkpoint."""
    folder = epath.Path("gs://bucket/run/checkpoints")
    for step in (1, 2):
        (folder / str(step)).mkdir(parents=True)
        (folder / str(step) / "commit_success.txt").write_text("")
    monkeypatch.setattr(type(folder), "rmtree", lambda self: None)
    checkpoint._remove(folder / "1")
    assert checkpoint.steps("gs://bucket/run") == [2]


def test_a_bucket_out_of_reach_of_a_save_is_one_message(bucket, monkeypatch):
    c = Checkpointer("gs://bucket/run", CheckpointConfig())

    def refuse(self):
        raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(type(epath.Path("gs://bucket/run")), "iterdir", refuse)
    message = r"cannot be written .*503 Service Unavailable.*from the last checkpoint"
    with pytest.raises(UserError, match=message):
        c.wait()
    c.close()


@pytest.mark.parametrize(
    "error",
    [PermissionError("403 Forbidden"), RuntimeError("storage.objects.get denied")],
)
def test_a_bucket_without_permission_is_one_message(error, monkeypatch):
    def refuse(self):
        raise error

    monkeypatch.setattr(type(epath.Path("gs://bucket/x")), "exists", refuse)
    match = rf"--workdir=gs://bucket/run cannot be written \({type(error).__name__}: {error}\): check the name of"
    refused = Claim("gs://bucket/run", CFG, data.describe(CFG.data))
    with pytest.raises(UserError, match=match), refused:
        pass
