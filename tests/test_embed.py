# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.embed``: one vector per image, whatever happens meanwhile."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from compiled import apply
from data_files import write_folder, write_parquets, write_tars
from PIL import Image
from weights_files import small_model

from vit_jax import embed, models, photos, weights
from vit_jax.config import DataConfig
from vit_jax.data import sources, write_records
from vit_jax.errors import UserError
from vit_jax.weights import fit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, flat = small_model()
    file = tmp_path_factory.mktemp("checkpoint") / "x.npz"
    weights.save(file, model.cfg, fit.unflatten(flat))
    return str(file), model, fit.unflatten(flat)


@pytest.fixture
def folder(tmp_path, checkpoint):
    """Seven images of the model's size, and one that is not an image."""
    found = tmp_path / "photos"
    found.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 256, (*checkpoint[1].cfg.image_size, 3), np.uint8)
        Image.fromarray(pixels).save(found / f"{i}.png")
    (found / "3b.jpg").write_text("<html>")
    return found


def pixels(path):
    return np.asarray(Image.open(path), np.float32)[None] / 127.5 - 1


def arrays(path):
    with np.load(path) as found:
        return dict(found)


@pytest.mark.heavy
def test_vectors_are_what_the_head_reads(checkpoint, folder, tmp_path):
    source, model, params = checkpoint
    done = embed.embed(source, [str(folder)], str(tmp_path / "x.npz"), batch=1)
    assert done.written == 7
    assert len(done.failed) == 1
    assert "3b.jpg" in done.failed[0]
    found = arrays(tmp_path / "x.npz")
    assert found["path"].tolist() == [str(folder / f"{i}.png") for i in range(7)]
    for path, vector in zip(found["path"], found["vector"], strict=True):
        _, out = apply(model, params, pixels(path), method="forward")
        np.testing.assert_allclose(vector, out["pre_logits"][0], atol=1e-5)
    assert not (tmp_path / "x.npz.parts").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_layers_and_poolings(checkpoint, folder, tmp_path, layers, monkeypatch):
    """The last layer, normalised, is the layer 0."""
    source, model, params = checkpoint
    if layers == "scan":
        read = weights.read
        change = {"layers": "scan"}
        monkeypatch.setattr(weights, "read", lambda s, size: read(s, size, **change))
    places = [str(folder / "0.png")]
    found = {}
    depth = model.cfg.depth
    for layer, pooling in ((0, "none"), (0, "mean"), (0, "class"), (depth, "none")):
        out = str(tmp_path / f"{layer}{pooling}.npz")
        embed.embed(source, places, out, layer=layer, pooling=pooling, batch=1)
        found[layer, pooling] = arrays(out)["vector"][0]
    _, out = apply(model, params, pixels(places[0]), method="forward")
    tokens = np.asarray(out["tokens"])[0]
    grid = models.token_grid(model.cfg, model.cfg.image_size)
    assert found[0, "none"].shape == (*grid, model.cfg.width)
    np.testing.assert_allclose(
        found[0, "none"].reshape(-1, model.cfg.width), tokens[1:], atol=1e-5
    )
    np.testing.assert_allclose(found[0, "mean"], tokens[1:].mean(0), atol=1e-5)
    np.testing.assert_allclose(found[0, "class"], tokens[0], atol=1e-5)
    x = found[depth, "none"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + model.cfg.layer_norm_eps
    )
    norm = params["Transformer"]["encoder_norm"]
    np.testing.assert_allclose(
        x * norm["scale"] + norm["bias"], found[0, "none"], atol=1e-4
    )


def test_a_kill_loses_and_repeats_nothing(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART", 2)
    source, out = checkpoint[0], str(tmp_path / "x.npz")
    arguments = (source, [str(folder)])
    embed.embed(*arguments, str(tmp_path / "whole.npz"), batch=1)
    flush, flushed = embed._Parts.flush, []

    def killed(self):
        flush(self)
        flushed.append(1)
        if len(flushed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed._Parts, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(*arguments, out, batch=1)
    assert not (tmp_path / "x.npz").exists()
    (tmp_path / "x.npz.parts" / "00002.partial").write_bytes(b"half a part")
    with pytest.raises(UserError, match="holds parts of another command"):
        embed.embed(*arguments, out, pooling="mean", batch=1)
    monkeypatch.setattr(embed._Parts, "flush", flush)
    read = []
    monkeypatch.setattr(
        embed.photos,
        "read",
        lambda p, c, f=embed.photos.read: read.append(p) or f(p, c),
    )
    done = embed.embed(*arguments, out, batch=1)
    assert len(read) == 8 - 4, "finished parts were computed again"
    assert len(done.failed) == 1
    got, want = arrays(out), arrays(tmp_path / "whole.npz")
    np.testing.assert_array_equal(got["path"], want["path"])
    np.testing.assert_array_equal(got["vector"], want["vector"])


def test_parquet_holds_the_same(checkpoint, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npz", "parquet"):
        embed.embed(
            checkpoint[0],
            [str(folder)],
            str(tmp_path / f"x.{suffix}"),
            pooling="none",
            batch=1,
        )
    want = arrays(tmp_path / "x.npz")
    columns = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert columns["path"] == want["path"].tolist()
    for vector, shape, expected in zip(
        columns["vector"], columns["shape"], want["vector"], strict=True
    ):
        np.testing.assert_array_equal(np.reshape(vector, shape), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "x.csv"}, "unknown suffix of --out '.csv': .*'.npz', '.parquet'"),
        ({"layer": 9}, "--layer=9: the model has layers 1 to"),
        ({"layer": 1}, "--layer=1: the head reads the last layer only"),
        ({"pooling": "max"}, "unknown --pooling 'max'"),
        ({"out": "photos/0.png/x.npz"}, "--out=.*x.npz cannot be written"),
        ({"places": ["none.png"]}, "none.png does not exist"),
    ],
)
def test_mistakes(checkpoint, folder, tmp_path, change, message):
    options = {"out": "x.npz", "places": [str(folder)]} | change
    out = str(tmp_path / options.pop("out"))
    with pytest.raises(UserError, match=message):
        embed.embed(checkpoint[0], options.pop("places"), out, **options)


def test_a_file_that_exists_is_left_alone(checkpoint, folder, tmp_path):
    (tmp_path / "x.npz").write_text("mine")
    with pytest.raises(UserError, match="exists: delete it or name another"):
        embed.embed(checkpoint[0], [str(folder)], str(tmp_path / "x.npz"))
    assert (tmp_path / "x.npz").read_text() == "mine"


def test_a_model_without_class_token_says_so(folder, tmp_path):
    model, flat = small_model(head="gap")
    weights.save(tmp_path / "gap.npz", model.cfg, fit.unflatten(flat))
    assert dataclasses.asdict(model.cfg)["head"] == "gap"
    with pytest.raises(UserError, match="has no class token"):
        embed.embed(
            str(tmp_path / "gap.npz"),
            [str(folder)],
            str(tmp_path / "x.npz"),
            pooling="class",
        )


@pytest.mark.heavy
def test_sources_of_data_give_the_vectors_of_their_images(
    checkpoint, tmp_path, monkeypatch
):
    """In the order of the source, in several parts."""
    monkeypatch.setattr(embed, "PART", 4)
    photos = write_folder(tmp_path / "photos", {"a": 5, "b": 4}, ("train", "test"))
    expected = {}
    embed.embed(checkpoint[0], [str(photos / "train")], str(tmp_path / "x.npz"))
    with np.load(tmp_path / "x.npz") as found:
        for path, vector in zip(found["path"], found["vector"], strict=True):
            expected[Path(path).read_bytes()] = vector
    write_records.write(str(photos), str(tmp_path / "records"), shards=2)
    places = {
        "tar": str(write_tars(photos, tmp_path / "tar")),
        "parquet": str(write_parquets(photos, tmp_path / "parquet")),
        "records": str(tmp_path / "records"),
        "folder": str(photos),
    }
    for kind, path in places.items():
        out = str(tmp_path / f"{kind}.npz")
        done = embed.embed(checkpoint[0], [f"{kind}:{path}"], out)
        assert (done.written, done.failed) == (9, [])
        cfg = DataConfig(source=kind, path=path, test_split="train", access="random")
        split = sources.load(cfg).test
        images, _ = split.read(np.arange(9))
        with np.load(out) as found:
            assert found["path"].tolist() == [split.name_of(i) for i in range(9)]
            for image, vector in zip(images, found["vector"], strict=True):
                content = (
                    image if isinstance(image, bytes) else Path(image).read_bytes()
                )
                np.testing.assert_allclose(vector, expected[content], atol=1e-5)
    with pytest.raises(UserError, match=r"'tset'"):
        embed.embed(checkpoint[0], [f"tar:{places['tar']}"], "y.npz", split="tset")


def test_splits_of_sources(tmp_path):
    """Also of a set that has no training images, or no files."""
    names = lambda place, split: photos.OfDatasets([place], split).names
    folder = write_folder(tmp_path / "photos", {"a": 3, "b": 2}, ("val",))
    tars = write_tars(folder, tmp_path / "tar")
    for place in (f"folder:{folder}", f"tar:{tars}"):
        assert len(names(place, "val")) == len(names(place, "test")) == 5
    with pytest.raises(UserError, match=r"is 'train', but \S+ has \['val'\]$"):
        names(f"tar:{tars}", "train")
    train, test = (set(names("digits:", split)) for split in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(train | test) == 1797
    with pytest.raises(UserError, match="unknown split 'val'"):
        names("digits:", "val")
    with pytest.raises(UserError, match="there are none to read"):
        names("synthetic:", "train")
