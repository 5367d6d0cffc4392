# SPDX-License-Identifier: Apache-2.0
import argparse
import contextlib
import csv
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import apply
from PIL import Image
from weights_files import small_model

from vit_jax import photos, predict, weights
from vit_jax.errors import UserError
from vit_jax.weights import fit
from vit_jax.weights.contents import Metadata

NAMES = ("cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, flat = small_model()
    file = tmp_path_factory.mktemp("checkpoint") / "x.npz"
    weights.save(file, model.cfg, fit.unflatten(flat), Metadata(class_names=NAMES))
    return str(file), model, fit.unflatten(flat)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.png", "c.jpg"]):
        pixels = rng.integers(0, 256, (16 + 8 * i, 16 + 4 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.mark.heavy
def test_probabilities_and_names(checkpoint, images):
    """Against the model itself; a.png already has the model's size."""
    source, model, params = checkpoint
    (result,) = predict.predict(source, [str(images / "a.png")], top=5)
    pixels = np.asarray(Image.open(images / "a.png"), np.float32) / 127.5 - 1
    logits = np.asarray(apply(model, params, pixels[None]))[0]
    want = np.exp(logits - logits.max())
    want /= want.sum()
    assert [e["class"] for e in result["top"]] == [NAMES[i] for i in np.argsort(-want)]
    got = [e["probability"] for e in result["top"]]
    np.testing.assert_allclose(got, np.sort(want)[::-1], atol=1e-5)


@pytest.fixture
def command(checkpoint, monkeypatch, capsys):
    """``predict`` in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        parsed = argparse.Namespace(top=5, json=False, csv="", parquet="", image_size=0)
        for argument in arguments:
            if argument.startswith("--"):
                name, _, value = argument[2:].partition("=")
                kind = type(getattr(parsed, name))
                setattr(parsed, name, kind(value) if value else True)
        monkeypatch.setattr(predict.flags, "FLAGS", parsed)
        places = [a for a in arguments if not a.startswith("--")]
        try:
            status = predict.main([checkpoint[0], *places])
        except UserError as e:
            status = 2
            print(f"error: {e}", file=sys.stderr)
        return status, *capsys.readouterr()

    return run


def test_command(command, images):
    paths = [str(images / n) for n in ("a.png", "b.png", "c.jpg")]
    status, out, _ = command(*paths, "--json", "--top=2")
    assert status == 0
    results = [strict(line) for line in out.splitlines()]
    assert [r["image"] for r in results] == paths
    for result in results:
        assert [*result] == ["image", "top"]
        assert len(result["top"]) == 2
        assert {*result["top"][0]} == {"class", "probability"}
        assert result["top"][0]["probability"] >= result["top"][1]["probability"]


def strict(text):
    """JSON without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_images_that_are_all_bad_are_named_together(command, images, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    data = (images / "c.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    status, out, err = command(
        *(str(tmp_path / n) for n in ("text.jpg", "empty.png", "none.png"))
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    for part in ("text.jpg", "empty.png", "none.png does not exist"):
        assert part in err
    status, out, err = command(str(tmp_path / "cut.jpg"))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .*cut.jpg.*truncated.*\n", err)
    (tmp_path / "folder").mkdir()
    assert "holds no images" in command(str(tmp_path / "folder"))[2]


@pytest.mark.heavy
def test_a_bad_image_among_good_ones_is_reported_and_the_rest_goes_on(
    checkpoint, command, images, tmp_path
):
    """Folders, lists and tables; and the same answers as one by one."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.jpg"):
        (folder / "deep" / name).write_bytes((images / name).read_bytes())
    (folder / "b.jpg").write_text("<html>")
    (folder / "notes.md").write_text("left out")
    (tmp_path / "list.txt").write_text("photos/deep/c.jpg\n\nphotos/b.jpg\n")
    table, parquet_file = tmp_path / "x.csv", tmp_path / "x.parquet"
    status, out, err = command(
        str(folder),
        str(tmp_path / "list.txt"),
        "--json",
        f"--csv={table}",
        f"--parquet={parquet_file}",
    )
    assert status == 2
    assert err.count("error: ") == err.count("\n") == 2
    results = [strict(line) for line in out.splitlines()]
    assert [Path(r["image"]).name for r in results] == [
        "b.jpg", "a.png", "b.png", "c.jpg", "c.jpg", "b.jpg",
    ]  # fmt: skip
    assert "not an image" in results[0]["error"]
    for result in results[1:5]:
        (alone,) = predict.predict(checkpoint[0], [result["image"]])
        assert [e["class"] for e in alone["top"]] == [e["class"] for e in result["top"]]
        got, want = ([e["probability"] for e in r["top"]] for r in (result, alone))
        np.testing.assert_allclose(got, want, atol=1e-6)
    with table.open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 4 * 5
    assert rows[0]["image"].endswith("a.png")
    assert [r["class"] for r in rows[:5]] == [e["class"] for e in results[1]["top"]]
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = parquet.read_table(parquet_file).to_pydict()
    assert columns["image"] == [r["image"] for r in rows]
    np.testing.assert_allclose(
        columns["probability"], [float(r["probability"]) for r in rows], rtol=1e-6
    )


def test_a_folder_is_listed_as_for_training(images, tmp_path, monkeypatch):
    """Neither what archivers leave behind nor pipes, on which a reader would wait; no
    folder that cannot be read is left out without a word."""
    folder = tmp_path / "photos"
    for name in ("deep/1.jfif", "2.JPEG", "__MACOSX/._2.JPEG", ".hidden/3.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((images / "c.jpg").read_bytes())
    os.mkfifo(folder / "pipe.jpg")
    found = [str(folder / name) for name in ("2.JPEG", "deep/1.jfif")]
    assert photos.find([str(folder)]) == found
    scandir = os.scandir

    def closed(place):
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"cannot read the folder .*deep: Permission"):
        photos.find([str(folder)])


def test_lists(images, tmp_path):
    """With the mark that some editors begin a file with; within each other, but not in a
    circle."""
    (tmp_path / "x.txt").write_text(f"{images / 'a.png'}\r\ny.txt\r\n", "utf-8-sig")
    (tmp_path / "y.txt").write_text("b.png")
    found = [str(images / "a.png"), str(tmp_path / "b.png")]
    assert photos.find([str(tmp_path / "x.txt")]) == found
    (tmp_path / "y.txt").write_text("x.txt\nx.txt")
    with pytest.raises(UserError, match=r"list .*x.txt names itself"):
        photos.find([str(tmp_path / "x.txt")])


@pytest.fixture
def server(images):
    """Addresses on this machine: an image with its type and without, a page, something
    huge and something slow, one that sends elsewhere and one that writes to the terminal.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if "rude" in self.path:
                self.wfile.write(b"bad\x1b[2J news\r\n\r\n")
                return
            if "away" in self.path:
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1:1/cat.png")
                self.end_headers()
                return
            kind = "text/html" if "page" in self.path else "image/png"
            self.send_response(200)
            if "untyped" not in self.path:
                self.send_header("Content-Type", kind)
            self.end_headers()
            with contextlib.suppress(OSError):
                if "slow" in self.path:
                    for _ in range(100):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        stop.wait(0.05)
                elif "huge" in self.path:
                    self.wfile.write(bytes(10_000))
                elif "page" in self.path:
                    self.wfile.write(b"<!doctype html>")
                else:
                    self.wfile.write((images / "a.png").read_bytes())

        def log_message(self, *args):
            pass

    stop = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        stop.set()
        found.shutdown()


@pytest.mark.heavy
def test_addresses(checkpoint, images, server, monkeypatch):
    monkeypatch.setattr(photos, "PATIENCE", 0.5)
    monkeypatch.setattr(photos, "LARGEST", 5_000)
    names = ("untyped", "cat", "page", "huge", "slow", "away", "rude")
    places = [f"{server}/{n}.png" for n in names]
    places += ["http://example.com/cat.jpg", "ftp://example.com/x"]
    untyped, good, *bad = predict.predict(checkpoint[0], places)
    (same,) = predict.predict(checkpoint[0], [str(images / "a.png")])
    assert untyped["top"] == good["top"]
    assert good["image"] == places[1]
    assert good["top"][0]["class"] == same["top"][0]["class"]
    reasons = ("is a page (text/html)", "larger than", "too slow", "stays on https")
    reasons += (r"bad\x1b[2J news", "use https", "")
    for place, result, reason in zip(places[2:], bad, reasons, strict=True):
        assert result["image"] == place
        assert place in result["error"]
        assert reason in result["error"]
        assert result["error"].isprintable()


def test_probabilities_that_are_not_finite_are_an_error(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    broken = jax.tree.map(lambda x: np.full_like(x, 1e30), params)
    weights.save(tmp_path / "x.npz", model.cfg, broken)
    with pytest.raises(UserError, match=r"a.png is not finite"):
        list(predict.predict(str(tmp_path / "x.npz"), [str(images / "a.png")]))


@pytest.mark.heavy
def test_preprocessing_comes_from_the_checkpoint(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    about = Metadata(
        transforms=(
            {"op": "central_crop"},
            {"op": "normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
        )
    )
    weights.save(tmp_path / "x.npz", model.cfg, params, about)
    (result,) = predict.predict(str(tmp_path / "x.npz"), [str(images / "b.png")], top=1)
    pixels = np.asarray(Image.open(images / "b.png"), np.float32)[4:20, 2:18] / 255
    pixels = (pixels - [0.4, 0.5, 0.6]) / np.array([0.2, 0.3, 0.4])
    logits = np.asarray(
        model.apply({"params": params}, pixels[None].astype(np.float32))
    )
    assert result["top"][0]["class"] == str(logits.argmax())


def test_preprocessing_follows_the_image_size(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    about = Metadata(
        transforms=(
            {"op": "resize_small", "size": 20},
            {"op": "central_crop", "size": 16},
        )
    )
    weights.save(tmp_path / "x.npz", model.cfg, params, about)
    image = str(images / "b.png")
    assert list(predict.predict(str(tmp_path / "x.npz"), [image], 1, image_size=48))


def test_several_labels(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    weights.save(tmp_path / "x.npz", model.cfg, params, Metadata(multilabel=True))
    (result,) = predict.predict(str(tmp_path / "x.npz"), [str(images / "a.png")])
    assert abs(sum(e["probability"] for e in result["top"]) - 1) > 1e-3


def test_more_images_than_a_batch(checkpoint, images, monkeypatch):
    monkeypatch.setattr(predict, "_BATCH", 2)
    paths = [str(images / "a.png")] * 2 + [str(images / "b.png")]
    results = list(predict.predict(checkpoint[0], paths))
    assert [r["image"] for r in results] == paths
    first, second, third = ([e["probability"] for e in r["top"]] for r in results)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.abs(np.subtract(first, third)).max() > 1e-3  # and the padding is dropped


def test_model_without_a_head(images, tmp_path):
    model, flat = small_model(num_classes=0)
    weights.save(tmp_path / "x.npz", model.cfg, fit.unflatten(flat))
    with pytest.raises(UserError, match="no head"):
        list(predict.predict(str(tmp_path / "x.npz"), [str(images / "a.png")]))


@pytest.mark.process
def test_needs_no_tensorflow(checkpoint, images):
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from vit_jax import predict\n"
        f"print(list(predict.predict({checkpoint[0]!r}, [{str(images / 'a.png')!r}])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
