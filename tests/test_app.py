# SPDX-License-Identifier: Apache-2.0
"""The page in the browser: what it answers, and how a real browser shows it."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from weights_files import small_model

from vit_jax import app, embed, photos, predict, space, weights
from vit_jax.analysis import attention
from vit_jax.errors import UserError
from vit_jax.weights import fit
from vit_jax.weights.contents import Metadata

NAMES = ("cat", "dog", "eel", "fox", "gnu")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    "",
)


def save(folder, **fields):
    model, flat = small_model(**fields)
    names = NAMES[: model.cfg.num_classes]
    params = fit.unflatten(flat)
    weights.save(folder / "x.npz", model.cfg, params, Metadata(class_names=names))
    return str(folder / "x.npz"), model, params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images of the model's size, and one that is not an image."""
    found = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(found / f"{i}.png")
    (found / "bad.jpg").write_text("<html>")
    return found


@pytest.fixture(scope="module")
def viewer(checkpoint, folder):
    return app.Viewer(checkpoint[0], str(folder))


@pytest.fixture(scope="module")
def url(viewer):
    with app.Server(viewer, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def levels(text, shape):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


@pytest.mark.heavy
def test_answers_are_those_of_the_commands(viewer, checkpoint, folder):
    source, model, params = checkpoint
    photo = folder / "1.png"
    found = viewer.look(photo.read_bytes())
    (said,) = predict.predict(source, [str(photo)], top=app.TOP)
    assert [e["class"] for e in found["top"]] == [e["class"] for e in said["top"]]
    for ours, theirs in zip(found["top"], said["top"], strict=True):
        assert abs(ours["probability"] - theirs["probability"]) < 1e-5
    pixels = np.asarray(Image.open(photo))[None]
    captured = attention.capture(model, params, pixels)  # (L, 1, k, S, S)
    layers, _, heads, *_ = captured.shape
    each = attention.token_map(captured[:, 0], (2, 2)).reshape(-1, 2, 2)
    rollout = attention.token_map(attention.rollout(captured[:, 0]), (2, 2))[None]
    for name, want in (("heads", each), ("rollout", rollout)):
        want = attention.bounded(np.asarray(want)) * 255
        np.testing.assert_allclose(levels(found[name], want.shape), want, atol=1.01)
    about = viewer.about()
    assert (about["layers"], about["heads"]) == (layers, heads)
    nearest, *others = found["near"]
    assert nearest["name"] == "1.png"
    assert nearest["similarity"] == pytest.approx(1, abs=1e-5)
    assert {x["name"] for x in others} == {"0.png", "2.png"}
    assert all(x["similarity"] < nearest["similarity"] for x in others)


def test_models_without_classes_and_without_attention(tmp_path, folder):
    photo = (folder / "0.png").read_bytes()
    source, *_ = save(tmp_path, num_classes=0)
    found = app.Viewer(source).look(photo)
    assert found.keys() == {"picture", "grid", "rollout", "heads"}
    sizes = dict.fromkeys(("depth", "width", "mlp_dim", "heads", "patch"), 0)
    source, *_ = save(tmp_path, resnet=(1,), image_size=32, **sizes)
    viewer = app.Viewer(source)
    assert viewer.look(photo).keys() == {"picture", "top"}
    assert viewer.about()["layers"] == 0


def request(url, content=None, **headers):
    """(status, body)."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, content, headers)
        ) as done:
            assert "default-src 'self'" in done.headers["Content-Security-Policy"]
            return done.status, done.read()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read()


def test_requests(url, folder, monkeypatch):
    photo = (folder / "0.png").read_bytes()
    assert b"<!doctype html>" in request(f"{url}/")[1]
    assert json.loads(request(f"{url}/about")[1])["images"] == 3
    assert len(json.loads(request(f"{url}/look", photo)[1])["near"]) == 3
    assert request(f"{url}/image/2")[1][:2] == b"\xff\xd8"
    for path in ("image/3", "image/-1", "image/x", "image/../x.npz", "elsewhere"):
        assert request(f"{url}/{path}")[0] == 404, path
    status, body = request(f"{url}/look", b"<html>")
    assert (status, list(json.loads(body))) == (400, ["error"])
    assert request(f"{url}/look", photo, Host="evil.example:80")[0] == 403
    assert request(f"{url}/", Host="evil.example")[0] == 403
    monkeypatch.setattr(photos, "LARGEST", 10)
    status, body = request(f"{url}/look", photo)
    assert (status, list(json.loads(body))) == (413, ["error"])


def test_mistakes(checkpoint, folder, tmp_path, command, url):
    page = lambda *args: command(checkpoint[0], *args, module="vit_jax.app").error
    assert "give one SOURCE, not 2" in page("x")
    assert "does not exist" in command("none.npz", module="vit_jax.app").error
    assert "holds no images" in page(f"--images={tmp_path}")
    (tmp_path / "text.npz").write_text("no zip")
    assert "not what vit-jax embed writes" in page(f"--images={tmp_path}/text.npz")
    np.savez(tmp_path / "short.npz", path=["a.png"], vector=np.ones((1, 3)))
    assert "holds vectors of 3 numbers" in page(f"--images={tmp_path}/short.npz")
    out = str(tmp_path / "grid.npz")
    embed.embed(checkpoint[0], [str(folder)], out, pooling="none", batch=1)
    assert "embed with --pooling=head" in page(f"--images={out}")
    port = url.rsplit(":", 1)[1]
    assert "cannot be listened on" in page(f"--port={port}")
    assert "--port" in page("--port=65536")


def test_a_space_holds_all_that_it_needs(checkpoint, tmp_path, command):
    made = tmp_path / "my: space"
    convert = lambda *args: command(checkpoint[0], *args, module="vit_jax.convert")
    done = convert(f"--space={made}", "--licence=mit")
    assert (done.returncode, done.stdout) == (0, f"wrote {made}\n"), done
    names = {p.name for p in made.iterdir()}
    assert names == {
        "app.py", "Dockerfile", "README.md", "requirements.txt", "vit_jax", "model.npz",
        "model.json",
    }  # fmt: skip
    assert (made / "vit_jax" / "app.html").exists()
    text = (made / "README.md").read_text()
    for line in (
        'title: "ViT: my: space"',
        "sdk: docker",
        "app_port: 7860",
        "license: mit",
    ):
        assert f"\n{line}\n" in text.split("\n---\n")[0] + "\n"
    pins = (made / "requirements.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins)
    assert any(pin.startswith("jax==") for pin in pins)
    assert "exists" in convert(f"--space={made}").error
    assert "must be a local path" in convert("--space=gs://bucket/space").error
    assert "--figure is of no use" in convert("--space=y", "--figure=x.png").error
    assert "--licence='MIT'" in convert("--space=y", "--licence=MIT").error
    assert "SOURCE and --space" in convert("x.npz", "--space=y").error


def test_a_full_disk_leaves_no_half_of_a_space(checkpoint, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(space.shutil, "copytree", full)
    with pytest.raises(UserError, match="No space left on device"):
        space.write(checkpoint[0], str(tmp_path / "space"))
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_space_runs_without_the_project(checkpoint, tmp_path, folder):
    space.write(checkpoint[0], str(tmp_path / "space"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path / "space", stdout=subprocess.PIPE,
        text=True, env={**environment, "PORT": "0"},
    ) as process:  # fmt: skip
        try:
            port = process.stdout.readline().strip().rsplit(":", 1)[1]
            url = f"http://127.0.0.1:{port}"
            answer = request(f"{url}/look", (folder / "0.png").read_bytes())[1]
            assert json.loads(answer)["top"][0]["class"] in NAMES
        finally:
            process.terminate()


@pytest.fixture
def page(url):
    """A page of Chromium, and the addresses that it asks."""
    api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("needs Chromium: apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page, asked, errors
        browser.close()


@pytest.mark.process
def test_a_browser_shows_the_answer(page, url, viewer, folder):
    page, asked, errors = page
    photo = folder / "1.png"
    want = viewer.look(photo.read_bytes())
    page.set_input_files("#file", photo)
    page.wait_for_selector("#answer", state="visible")
    words = page.locator("#classes > span").all_inner_texts()
    assert words[0] == want["top"][0]["class"]
    assert words[1] == f"{100 * want['top'][0]['probability']:.1f} %"
    assert page.inner_text("#shown") == "rollout through all layers"
    about = viewer.about()
    heads = about["layers"] * about["heads"]
    buttons = page.locator("#sheet button")
    assert buttons.count() == 1 + heads
    pixels = "document.getElementById('map').toDataURL()"
    rollout = page.evaluate(pixels)
    buttons.nth(heads).click()
    assert page.inner_text("#shown") == "layer 2, head 2"
    assert page.evaluate(pixels) != rollout
    assert page.inner_text("#near figcaption >> nth=0") == "1.000 1.png"
    page.wait_for_function("[...document.images].every((x) => x.naturalWidth > 0)")
    page.set_input_files("#file", folder / "bad.jpg")
    page.wait_for_selector("#error", state="visible")
    assert "cannot be read" in page.inner_text("#error")
    assert not errors
    assert all(x.startswith((f"{url}/", "data:")) for x in asked), asked
