# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server on this machine."""

import hashlib
import http.server
import json
import re
import threading
from functools import partial

import numpy as np
import pytest
from weights_files import assert_same, small_model

from vit_jax import checkpoint, weights
from vit_jax.errors import UserError
from vit_jax.weights import catalogue, fetch


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; understands Range; ``faults`` says how to misbehave."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def do_GET(self):
        self.site.requests.append((self.path, dict(self.headers)))
        if self.path in self.site.redirects:
            target, headers = self.site.redirects[self.path]
            self.send_response(302)
            self.send_header("Location", target)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            return
        if status := self.site.status.get(self.path):
            self.send_error(status)
            return
        data = self.site.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}"
            )
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", '"v1"')
        for key, value in self.site.headers.items():
            self.send_header(key, value)
        self.end_headers()
        cut = self.site.cuts.pop(0) if self.site.cuts else None
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])

    def log_message(self, *args):
        pass


class Site:
    def __init__(self):
        self.files, self.status, self.redirects, self.headers = {}, {}, {}, {}
        self.cuts, self.requests = [], []
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Handler, self)
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site()
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setattr(fetch, "GS_ENDPOINT", site.url)
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    _, flat = small_model()
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, **flat)
    return path.read_bytes(), flat


def in_cache(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def leftovers(tmp_path):
    return [p.name for p in tmp_path.rglob("*.partial/*") if p.is_file()]


def test_download_once_then_offline(site, npz, tmp_path):
    data, flat = npz
    site.files["/a/x.npz"] = data
    url = f"{site.url}/a/x.npz"
    assert_same(weights.read(url).params, flat)
    assert in_cache(tmp_path) == ["x.npz"]
    assert leftovers(tmp_path) == []
    count = len(site.requests)
    site.server.shutdown()
    assert_same(weights.read(url).params, flat)
    assert len(site.requests) == count


def test_same_name_from_two_folders(site, npz, tmp_path):
    site.files["/a/x.npz"], site.files["/b/x.npz"] = npz[0], npz[0] + b""
    a, b = (fetch.download(f"{site.url}/{f}/x.npz") for f in "ab")
    assert a != b
    assert a.name == b.name == "x.npz"


def test_names_and_preprocessing_travel_along(site, npz):
    site.files["/a/x.npz"] = npz[0]
    about = {"format": "vit_jax", "class_names": list("vwxyz")}
    site.files["/a/x.json"] = json.dumps(about).encode()
    assert weights.read(f"{site.url}/a/x.npz").metadata.class_names == tuple("vwxyz")


def test_resumes_where_the_line_broke(site, npz, tmp_path):
    data, flat = npz
    site.files["/x.npz"] = data
    site.cuts = [1000, 500]
    assert_same(weights.read(f"{site.url}/x.npz").params, flat)
    ranges = [h.get("Range") for path, h in site.requests if path == "/x.npz"]
    assert ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert site.requests[-1][1]["If-Range"] == '"v1"'


def test_resumes_in_the_next_run(site, npz, tmp_path):
    data, flat = npz
    site.files["/x.npz"] = data
    site.cuts = [1000] + [0] * 20
    url = f"{site.url}/x.npz"
    with pytest.raises(UserError, match="again to resume"):
        weights.read(url)
    assert in_cache(tmp_path) == []
    site.cuts = []
    assert_same(weights.read(url).params, flat)
    assert site.requests[-1][1]["Range"] == "bytes=1000-"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_names_the_alternatives(site, tmp_path, status):
    site.status["/vit_models/x.npz"] = status
    with pytest.raises(UserError) as e:
        weights.read("gs://vit_models/x.npz")
    for part in (f"status {status}", "local path", "https://", "hf://"):
        assert part in str(e.value)
    assert in_cache(tmp_path) == []


def test_busy_server_is_asked_again(site, npz, tmp_path):
    site.files["/x.npz"] = npz[0]
    site.status["/x.npz"] = 503
    calls = []

    def sleep(seconds):
        calls.append(seconds)
        site.status.clear()

    fetch.time.sleep = sleep  # the fixture restores it
    fetch.download(f"{site.url}/x.npz")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html><title>Sign in</title></html>", "web page.*Sign in"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "git-lfs"),
        (b"PK\x03\x04 and then nothing", "truncated zip"),
        (b"\x02" + b"\x00" * 7 + b"{}" + b"more than it says", "download is truncated"),
    ],
)
def test_nothing_wrong_stays_in_the_cache(site, tmp_path, content, message):
    site.files["/x.npz"] = content
    with pytest.raises(UserError, match=message):
        weights.read(f"{site.url}/x.npz")
    assert in_cache(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_checksums(site, npz, tmp_path):
    data = npz[0]
    site.files["/x.npz"] = data
    good = hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match="sha256"):
        fetch.download(f"{site.url}/x.npz#sha256={'0' * 64}")
    assert in_cache(tmp_path) == []
    fetch.download(f"{site.url}/x.npz#sha256={good}")
    site.headers = {"x-goog-hash": "crc32c=AAAAAA==, md5=AAAAAAAAAAAAAAAAAAAAAA=="}
    site.files["/y.npz"] = data
    with pytest.raises(UserError, match="md5"):
        fetch.download(f"{site.url}/y.npz")


def test_checksum_of_what_is_cached(site, npz):
    site.files["/x.npz"] = npz[0]
    cached = fetch.download(f"{site.url}/x.npz")
    with pytest.raises(UserError, match=f"{cached}, has sha256.*delete it"):
        weights.read(f"{site.url}/x.npz#sha256={'0' * 64}")
    good = hashlib.sha256(npz[0]).hexdigest()
    weights.read(f"{site.url}/x.npz#sha256={good}")


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_damage_in_the_cache_is_located(site, npz, damage):
    data = bytearray(npz[0])
    site.files["/x.npz"] = npz[0]
    cached = fetch.download(f"{site.url}/x.npz")
    data[len(data) // 2] ^= 1
    cached.write_bytes({"cut": data[:-99], "empty": b"", "flip": data}[damage])
    with pytest.raises(
        UserError, match=f"x.npz.*Delete the cached copy first: {cached}"
    ):
        weights.read(f"{site.url}/x.npz")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com", "names no file"),
        ("https://example.com/folder/", "names no file"),
        ("https://[::1/x.npz", "is no address"),
        ("https:///x.npz", "names no file"),
        ("hf://", "write hf://OWNER/NAME"),
        ("hf://me", "write hf://OWNER/NAME"),
    ],
)
def test_addresses_that_name_nothing(site, source, message):
    with pytest.raises(UserError, match=message) as e:
        weights.read(source)
    assert source in str(e.value)


def test_unusable_cache(site, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", "/dev/null/x")
    with pytest.raises(UserError, match=r"/dev/null/x cannot be.*VIT_JAX_CACHE"):
        weights.read(f"{site.url}/x.npz")


def test_folder_in_a_bucket_that_cannot_be_read(monkeypatch):
    def refuse(path):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(checkpoint, "load_params", refuse)
    with pytest.raises(UserError, match=r"gs://b/run is.*\(no route to host\).*gcsfs"):
        weights.read("gs://b/run")


def test_no_network(site, tmp_path):
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(UserError, match=r"Is there a network\?.*local path"):
        fetch.download(f"{site.url}/x.npz")
    assert in_cache(tmp_path) == []


def test_plain_http_is_for_this_machine_only():
    with pytest.raises(UserError, match="use https"):
        weights.read("http://example.com/x.npz")


def test_hub_repository(site, npz, tmp_path, monkeypatch):
    """config.json is honoured; the checksum before the redirect; no token to storage."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    flat = npz[1]
    model, _ = small_model()
    weights.save(tmp_path / "hf", model.cfg, _nested(flat))
    for file in (tmp_path / "hf").iterdir():
        site.files[f"/storage/{file.name}"] = file.read_bytes()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        site.redirects[f"/me/vit/resolve/main/{file.name}"] = (
            f"/storage/{file.name}",
            {"X-Linked-Etag": f'"{digest}"'},
        )
    found = weights.read("hf://me/vit")
    assert_same(found.params, flat)
    assert found.cfg.gelu == "tanh"
    seen = {path: "Authorization" in headers for path, headers in site.requests}
    assert seen["/me/vit/resolve/main/model.safetensors"]
    assert not seen["/storage/model.safetensors"]
    site.server.shutdown()
    assert_same(weights.read("hf://me/vit").params, flat)  # from the cache


@pytest.mark.parametrize("status", [403, 503])
def test_config_of_the_hub_is_only_absent_if_the_hub_says_so(
    site, tmp_path, monkeypatch, status
):
    """Otherwise heads and GELU would be guessed, and stay so once all is cached."""
    monkeypatch.setattr(fetch, "_ATTEMPTS", 1)
    model, flat = small_model(gelu="tanh", layer_norm_eps=1e-5)
    weights.save(tmp_path / "hf", model.cfg, _nested(flat))
    folder = "/me/vit/resolve/main"
    for file in (tmp_path / "hf").iterdir():
        site.files[f"{folder}/{file.name}"] = file.read_bytes()
    site.status[f"{folder}/config.json"] = status
    with pytest.raises(UserError, match=f"config.json.*{status}"):
        weights.read("hf://me/vit")
    site.status.clear()
    assert weights.read("hf://me/vit").cfg == model.cfg


def test_names_beside_an_npz_are_only_absent_if_the_server_says_so(site, npz):
    site.files["/x.npz"] = npz[0]
    about = {"format": "vit_jax", "class_names": list("vwxyz")}
    site.files["/x.json"] = json.dumps(about).encode()
    site.status["/x.json"] = 500
    with pytest.raises(UserError, match=r"x.json.*500"):
        weights.read(f"{site.url}/x.npz")
    site.status.clear()
    assert weights.read(f"{site.url}/x.npz").metadata.class_names == tuple("vwxyz")
    site.files["/y.npz"], site.status["/y.json"] = npz[0], 403  # an unlistable bucket
    assert weights.read(f"{site.url}/y.npz").metadata.class_names == ()


def test_hub_repository_in_parts(site, tmp_path):
    model, flat = small_model(gelu="exact")
    weights.save(tmp_path / "hf", model.cfg, _nested(flat))
    folder = "/me/vit/resolve/main"
    for file in (tmp_path / "hf").iterdir():
        site.files[f"{folder}/{file.name}"] = file.read_bytes()
    site.files[f"{folder}/a.safetensors"] = site.files.pop(
        f"{folder}/model.safetensors"
    )
    index = {"weight_map": {"classifier.bias": "a.safetensors"}}
    name = f"{folder}/model.safetensors.index.json"
    site.files[name] = json.dumps(index).encode()
    assert weights.read("hf://me/vit").cfg == model.cfg
    count = len(site.requests)
    assert_same(weights.read("hf://me/vit").params, flat)
    assert len(site.requests) == count  # all from the cache


def test_hub_checksum_of_the_redirect_counts(site, npz):
    site.files["/storage/x.npz"] = npz[0]
    stated = {"X-Linked-Etag": f'"{"0" * 64}"'}
    site.redirects["/me/vit/resolve/main/x.npz"] = ("/storage/x.npz", stated)
    with pytest.raises(UserError, match="sha256"):
        fetch.download("hf://me/vit/x.npz")


def test_hub_repository_with_another_file(site, npz):
    data, flat = npz
    listing = {"siblings": [{"rfilename": "README.md"}, {"rfilename": "x.npz"}]}
    site.files["/api/models/me/vit"] = json.dumps(listing).encode()
    site.files["/me/vit/resolve/main/x.npz"] = data
    assert_same(weights.read("hf://me/vit").params, flat)
    count = len(site.requests)
    assert_same(weights.read("hf://me/vit").params, flat)
    assert len(site.requests) == count  # all from the cache
    listing = {"siblings": [{"rfilename": "pytorch_model.bin"}]}
    site.files["/api/models/me/old"] = json.dumps(listing).encode()
    with pytest.raises(UserError, match=r"pytorch_model.bin.*never unpickled"):
        weights.read("hf://me/old")


def test_catalogue_ids_are_sources(site, npz, monkeypatch):
    data, flat = npz
    found = catalogue.find("vit_b8_i21k")
    site.files[f"/{found.file.removeprefix('gs://')}"] = data
    assert_same(weights.read("vit_b8_i21k").params, flat)


def _nested(flat):
    from vit_jax.weights import fit

    return fit.unflatten(flat)
