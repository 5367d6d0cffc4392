# SPDX-License-Identifier: Apache-2.0
"""Uploads to a Hub on this machine, by the real huggingface_hub and back."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from test_weights_fetch import COMMIT, Handler, Site
from trained import trained_workdir

import vit_jax
from vit_jax import sharing, weights
from vit_jax.errors import UserError
from vit_jax.weights import fit

GOOD = "hf_good"
# Of huggingface_hub's own calls.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class HubHandler(Handler):
    """The part of the Hub's API that creates a repository and commits to it."""

    def do_POST(self):
        path, hub = self.path.split("?")[0], self.site
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {GOOD}":
            self._answer(401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {})
        elif "/preupload/" in path:
            mode = lambda name: (
                "lfs" if hub.lfs and "safetensors" in name else "regular"
            )
            files = [
                {
                    "path": f["path"],
                    "uploadMode": mode(f["path"]),
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"objects": objects, "transfer": "basic"})
        elif "/commit/" in path:
            self._commit(path.split("/commit/")[0].removeprefix("/api/models/"), body)

    def do_PUT(self):
        self.site.large[self.path.split("/")[-1]] = self._body()
        self._answer(200)

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "strangers":
            self._answer(403)
        elif name in self.site.repositories:
            said = {"error": "You already created this model repo"}
            self._answer(409, {**said, "url": f"{self.site.url}/{name}"})
        else:
            self.site.repositories[name] = {}
            self.site.visibility[name] = wanted.get("visibility", "public")
            self._answer(200, {"url": f"{self.site.url}/{name}"})

    def _commit(self, name, body):
        if self.site.broken:
            self._answer(400, {"error": "no space"})
            return
        files = self.site.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.site.large[value["oid"]]
        self.site.repository(name, files)
        url = f"{self.site.url}/{name}/commit/{COMMIT}"
        self._answer(200, {"commitUrl": url, "commitOid": COMMIT})

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self, status, values=None):
        data = json.dumps(values or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub = Site(HubHandler)
    hub.repositories, hub.visibility, hub.large = {}, {}, {}
    hub.lfs, hub.broken = True, False
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", GOOD)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    # Its own protocol for large files has no server here; LFS is the other one.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.stop()


def same_bits(a, b):
    a, b = fit.flatten(a), fit.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), name)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["hf", "timm"])
@pytest.mark.parametrize("large", [True, False])
def test_up_and_down_are_the_same_bits(hub, monkeypatch, layout, large):
    run = trained_workdir()
    hub.lfs = large
    # What is not large goes through the pipeline of newer versions.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", large)
    where, _ = sharing.share(run, "hf://me/tiny", layout, licence="mit", private=True)
    assert where == f"{hub.url}/me/tiny"
    assert bool(hub.large) == large
    assert hub.visibility == {"me/tiny": "private"}
    stored, loaded = weights.read(run), weights.read("hf://me/tiny")
    same_bits(stored.params, loaded.params)
    assert stored.metadata.class_names == loaded.metadata.class_names
    assert stored.metadata.transforms == loaded.metadata.transforms
    images = np.linspace(-1, 1, 2 * 16 * 16 * 3, dtype=np.float32)
    logits = [
        model.apply({"params": params}, images.reshape(2, 16, 16, 3))
        for model, params in map(vit_jax.load, (run, "hf://me/tiny"))
    ]
    np.testing.assert_array_equal(*logits)
    assert np.asarray(logits).any()


@pytest.mark.reference
@pytest.mark.process
def test_transformers_downloads_what_was_uploaded(
    hub, reference, monkeypatch, tmp_path
):
    """By the real huggingface_hub, into an empty cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run = os.environ.get("VIT_JAX_REFERENCE_RUN") or trained_workdir()
    sharing.share(run, "hf://me/tiny", licence="mit")
    model, params = vit_jax.load(run)
    size = (4, *model.cfg.image_size, model.cfg.channels)
    images = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    ours = np.asarray(model.apply({"params": params}, images))
    theirs = reference("hf", "me/tiny", images, tmp_path)
    assert ours.std() > 1e-3
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())


def test_command_writes_the_folder(hub, command, tmp_path):
    figure = tmp_path / "drawn.PNG"
    figure.write_bytes(b"pixels")
    folder = tmp_path / "out"
    run = shutil.copytree(trained_workdir(), tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    stored["data"]["path"] = "/home/me/secret"
    elsewhere = {"type": "accuracy", "data": {"path": "/home/me/secret"}}
    stored["eval"]["evaluators"] = [elsewhere]
    (run / "config.json").write_text(json.dumps(stored))
    done = command(
        run, "hf://me/tiny", "--licence=apache-2.0", f"--dry_run={folder}",
        f"--figure={figure}", module="vit_jax.convert",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"wrote {folder}\n"), done
    assert hub.requests == []
    assert hub.repositories == {}
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "config.json", "figure.png", "model.safetensors",
        "preprocessor_config.json",
    }  # fmt: skip
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    rows = (run / "metrics.jsonl").read_text().splitlines()
    value = json.loads(rows[-1])["test/accuracy"]
    for part in (
        f"| test/accuracy | {value:.7g} |",
        "After 4 steps, by `python -m vit_jax.evaluate RUN`",
        "`synthetic`: 5 classes",
        "optim.weight_decay = 0.1",
        "![](figure.png)",
        'vit_jax.load("hf://me/tiny")',
        "ViTForImageClassification",
    ):
        assert part in card.text, part
    assert "secret" not in card.text
    assert str(tmp_path) not in card.text


@pytest.mark.parametrize(
    ("dest", "flags", "message"),
    [
        ("hf://me/x", [], "--licence='': say under which licence"),
        ("hf://me/x", ["--licence=MIT: x"], "--licence='MIT: x'"),
        ("hf://me/x@dev", ["--licence=mit"], "write hf://me/x"),
        ("hf://x", ["--licence=mit"], "write hf://OWNER/NAME"),
        ("hf://me/x", ["--licence=mit", "--format=npz"], "--format=npz"),
        ("hf://me/x", ["--licence=mit", "--figure=x.gif"], "--figure=x.gif"),
        ("hf://me/x", ["--licence=mit", "--dry_run=."], "--dry_run=. exists"),
        ("x.npz", ["--licence=mit"], "--licence is for DEST=hf://OWNER/NAME"),
        ("gs://me/x", [], "DEST is a local path, or hf://"),
        ("hf://strangers/x", ["--licence=mit"], "the token may not write there"),
    ],
)
def test_mistakes(hub, command, dest, flags, message):
    done = command(trained_workdir(), dest, *flags, module="vit_jax.convert")
    assert message in done.error
    assert hub.repositories == {}


def test_name_that_is_taken(hub):
    run = trained_workdir()
    sharing.share(run, "hf://me/tiny", licence="mit")
    with pytest.raises(UserError, match="the name is taken: give another, or --update"):
        sharing.share(run, "hf://me/tiny", licence="cc0-1.0")
    assert b"license: mit" in hub.repositories["me/tiny"]["README.md"]
    sharing.share(run, "hf://me/tiny", licence="cc0-1.0", update=True)
    assert b"license: cc0-1.0" in hub.repositories["me/tiny"]["README.md"]


def test_upload_that_breaks_off_says_how_to_go_on(hub):
    hub.broken = True
    with pytest.raises(UserError, match=r"no space.*go on with --update") as e:
        sharing.share(trained_workdir(), "hf://me/tiny", licence="mit")
    assert "\n" not in str(e.value)
    hub.broken = False
    sharing.share(trained_workdir(), "hf://me/tiny", licence="mit", update=True)
    assert "model.safetensors" in hub.repositories["me/tiny"]


def test_no_token_a_bad_one_and_no_network(hub, monkeypatch, tmp_path):
    share = lambda: sharing.share(trained_workdir(), "hf://me/tiny", licence="mit")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(UserError, match="does not accept the token"):
        share()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no"))
    with pytest.raises(UserError, match="needs a token"):
        share()
    monkeypatch.setenv("HF_TOKEN", GOOD)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be uploaded: .*refused") as e:
        share()
    assert "\n" not in str(e.value)
