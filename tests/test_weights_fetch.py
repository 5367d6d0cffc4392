# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server on this machine."""

import hashlib
import http.server
import io
import json
import re
import threading
import urllib.parse
from functools import partial

import numpy as np
import pytest
from tiny import TINY
from weights_files import assert_same, small_model

from vit_jax import checkpoint, config, weights
from vit_jax.errors import UserError
from vit_jax.weights import catalogue, fetch, fit, hub

COMMIT = "0123456789" * 4


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; understands Range and If-Range; may misbehave as told."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def do_GET(self):
        site, path = self.site, urllib.parse.unquote(self.path.split("?")[0])
        site.requests.append((path, dict(self.headers)))
        if path in site.raw:
            site.raw[path](self.wfile)
            site.answered.append(path)
            return
        if path in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[path])
            self.end_headers()
            return
        data = site.files.get(path)
        if data is None or path in site.status:
            self.send_error(site.status.get(path, 404))
            return
        version = site.version
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, *version.values())
        start = int(asked[1]) if asked and (same or site.careless) else 0
        self.send_response(206 if start else 200)
        if start:
            last = f"{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", f"bytes {start}-{last}")
        self.send_header("Content-Length", str(len(data) - start))
        if "/resolve/" in path:  # of the Hub
            version = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            self.send_header("X-Repo-Commit", path.split("/resolve/")[1][:40])
        for key, value in version.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = site.cuts.pop(0) if site.cuts else None
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


class Site:
    def __init__(self, handler=Handler):
        self.files, self.status, self.redirects, self.raw = {}, {}, {}, {}
        self.version, self.careless = {"ETag": '"v1"'}, False
        self.cuts, self.requests, self.answered = [], [], []
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(handler, self)
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = partial(self.server.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()

    def repository(self, name, files, revision="main"):
        """A repository of the Hub, as its API shows it."""
        for file, data in files.items():
            self.files[f"/{name}/resolve/{COMMIT}/{file}"] = data
        about = {"id": name, "sha": COMMIT, "siblings": []}
        tree = [
            {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
            for file, data in files.items()
        ]
        api = f"/api/models/{name}"
        self.files[f"{api}/revision/{revision}"] = json.dumps(about).encode()
        self.files[f"{api}/revision/{COMMIT}"] = json.dumps(about).encode()
        self.files[f"{api}/tree/{COMMIT}"] = json.dumps(tree).encode()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site()
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetch, "GS_ENDPOINT", site.url)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    _, flat = small_model()
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, **flat)
    return path.read_bytes(), flat


def in_cache(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").glob("[!.]*/*"))


def leftovers(tmp_path):
    return [p.name for p in tmp_path.rglob(".partial/*")]


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
    site.files["/a/x.npz"], site.files["/b/x.npz"] = b"a", b"b"
    a, b = (fetch.download(f"{site.url}/{f}/x.npz") for f in "ab")
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b")
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
        ("https://[::1/x.npz", "is not an address"),
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


@pytest.mark.parametrize(
    "version",
    [{"ETag": '"v%d"'}, {"ETag": 'W/"v"', "Last-Modified": "Thu, 0%d Jan"}, {}],
)
@pytest.mark.parametrize("careless", [False, True])
def test_two_versions_are_never_glued(site, version, careless):
    """Whether or not the server honours If-Range."""
    old, new = b"a" * 3000, b"b" * 3000
    url = f"{site.url}/x.npz"
    for number, data in enumerate((old, new), 1):
        site.files["/x.npz"], site.careless = data, careless
        site.version = {k: v.replace("%d", str(number)) for k, v in version.items()}
        if data is old:
            site.cuts = [1000] + [0] * 20
            with pytest.raises(UserError, match="again to resume"):
                fetch.download(url)
            site.cuts = []
    assert fetch.download(url).read_bytes() == new


def test_metadata_of_a_run_needs_no_weights(tmp_path):
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(TINY)))
    (tmp_path / "dataset.json").write_text(json.dumps({"class_names": list("vwxyz")}))
    assert weights.read_metadata(tmp_path).class_names == tuple("vwxyz")


def answer(head, body=b""):
    return lambda out: out.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)


def trickle(first, byte):
    """A server that goes on and on, for five seconds in all."""

    def write(out):
        out.write(first)
        for _ in range(100):
            out.write(byte)
            out.flush()
            threading.Event().wait(0.05)

    return write


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (trickle(b"", b"H"), "no answer within"),
        (trickle(b"HTTP/1.0 200 OK\r\nX: ", b"x"), "no answer within"),
        (trickle(b"HTTP/1.0 200 OK\r\n\r\n", b"x"), "sends less than 10 kB/s"),
        (trickle(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 100_000), "no end: more than"),
        (lambda out: threading.Event().wait(3), "cannot be downloaded"),
    ],
)
def test_every_download_ends(site, monkeypatch, tmp_path, write, message):
    """Before such a server does."""
    monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    monkeypatch.setattr(fetch, "LONGEST", 1_000_000)
    site.raw["/x.npz"] = write
    with pytest.raises(UserError, match=message):
        fetch.download(f"{site.url}/x.npz")
    assert site.answered == []
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (answer("bad\x1b[2J news\n"), r"downloaded: bad\\x1b\[2J news\. Is there"),
        (
            answer(f"HTTP/1.0 200 OK\nContent-Length: {10**17}\n"),
            "100,000,000,000,000,000 bytes, the disk",
        ),
    ],
)
def test_answers_that_make_no_sense(site, tmp_path, write, message):
    site.raw["/x.npz"] = write
    with pytest.raises(UserError, match=message) as e:
        fetch.download(f"{site.url}/x.npz")
    assert "\n" not in str(e.value)
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize("length", ["abc", "-5", ""])
def test_a_length_that_is_none(site, length):
    site.raw["/x.npz"] = answer(f"HTTP/1.0 200 OK\nContent-Length: {length}\n", b"abc")
    assert fetch.download(f"{site.url}/x.npz").read_bytes() == b"abc"


def test_redirects(site):
    site.files["/x.npz"] = b"x"
    site.redirects = {"/a": "/x.npz", "/loop": "/loop"}
    assert fetch.download(f"{site.url}/a").read_bytes() == b"x"
    with pytest.raises(UserError, match="redirects in a loop"):
        fetch.download(f"{site.url}/loop")
    for target in ("http://example.com/x", "ftp://127.0.0.1/x", "file:///etc/passwd"):
        site.redirects["/b"] = target
        with pytest.raises(UserError, match=f"{target}|or not to https"):
            fetch.download(f"{site.url}/b")
    secure = urllib.request.Request("https://example.com/x")
    for target in ("http://example.com/x", "ftp://example.com/x", site.url):
        with pytest.raises(UserError, match="stays on https"):
            fetch._Redirects("u").redirect_request(
                secure, io.BytesIO(), 302, "", {}, target
            )


@pytest.mark.parametrize("good", [True, False])
def test_one_of_several_downloads(site, tmp_path, good):
    """The others wait; each checks what it asked for."""
    site.files["/x.npz"] = b"x"
    begun = threading.Event()

    def check(path):
        begun.set()
        time_is_up.wait(0.3)
        if not good:
            raise UserError("bad")

    time_is_up = threading.Event()
    told = {}

    def download(who, url, check):
        try:
            told[who] = fetch.download(url, check).read_bytes()
        except UserError as e:
            told[who] = str(e)

    url = f"{site.url}/x.npz"
    threads = [threading.Thread(target=download, args=("first", url, check))]
    threads[0].start()
    begun.wait()
    for who, other in (("same", url), ("other", f"{url}#sha256={'0' * 64}")):
        args = (who, other, lambda path: None)
        threads.append(threading.Thread(target=download, args=args))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert told["first"] == (b"x" if good else "bad")
    assert told["same"] == b"x"
    assert "sha256" in str(told["other"])
    assert leftovers(tmp_path) == []


def test_no_network(site, tmp_path):
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(UserError, match=r"Is there a network\?.*local path"):
        fetch.download(f"{site.url}/x.npz")
    assert in_cache(tmp_path) == []


def test_plain_http_is_for_this_machine_only():
    with pytest.raises(UserError, match="use https"):
        weights.read("http://example.com/x.npz")


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


def repository(folder, **fields):
    """(model, flat parameters, files of a Hugging Face folder)."""
    model, flat = small_model(**fields)
    weights.save(folder, model.cfg, fit.unflatten(flat))
    return model, flat, {f.name: f.read_bytes() for f in folder.iterdir()}


def test_hub_repository(site, tmp_path, monkeypatch):
    """The config is honoured, transformers' cache is used, and without a network too."""
    model, flat, files = repository(tmp_path / "hf", gelu="tanh")
    site.repository("me/vit", {**files, "README.md": b"#"})
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = weights.read("hf://me/vit")
    assert_same(found.params, flat)
    assert found.cfg == model.cfg
    of_ours = [h for path, h in site.requests if "me/vit" in path]
    assert all(h["authorization"] == "Bearer secret" for h in of_ours)
    snapshot = tmp_path / "hub/models--me--vit/snapshots" / COMMIT
    assert sorted(p.name for p in snapshot.iterdir()) == sorted(files)
    site.stop()
    assert_same(weights.read("hf://me/vit").params, flat)
    assert hub.in_cache("hf://me/vit")
    assert not hub.in_cache("hf://me/other")


def test_hub_revision_and_folder_and_checksum(site, npz):
    data, flat = npz
    site.repository("me/vit", {"sub/x.npz": data, "sub/y.npz": b"PK"}, "refs/pr/1")
    url = "hf://me/vit@refs%2Fpr%2F1/sub"
    assert_same(weights.read(f"{url}/x.npz").params, flat)
    assert not any("y.npz" in path for path, _ in site.requests)
    with pytest.raises(UserError, match=r"holds \['x.npz', 'y.npz'\]: name one"):
        weights.read(url)
    with pytest.raises(UserError, match=r"x.npz has sha256 .*delete it"):
        weights.read(f"{url}/x.npz#sha256={'0' * 64}")
    with pytest.raises(UserError, match=r"there is no 'sub/z.npz' among \['sub/x.npz'"):
        weights.read(f"{url}/z.npz")


def test_hub_repository_in_parts(site, tmp_path):
    model, flat, files = repository(tmp_path / "hf", gelu="exact")
    files["sub/a.safetensors"] = files.pop("model.safetensors")
    index = {"weight_map": {"classifier.bias": "sub/a.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    site.repository("me/vit", files)
    assert weights.read("hf://me/vit").cfg == model.cfg
    assert_same(weights.read("hf://me/vit").params, flat)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", 3, "", None])
def test_parts_lie_in_their_folder(site, tmp_path, name):
    index = {"weight_map": {"a": name} if name is not None else 5}
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="must be a file in its folder"):
        weights.read(tmp_path)
    site.repository("me/vit", {file.name: file.read_bytes()})
    with pytest.raises(UserError, match="must be a file in its folder"):
        weights.read("hf://me/vit")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such repository"),
        (404, "RevisionNotFound", "no such revision"),
        (403, "GatedRepo", "is gated: ask for access"),
    ],
)
def test_hub_refusals(site, status, code, message):
    def refuse(out):
        head = f"HTTP/1.0 {status} No\r\nX-Error-Code: {code}\r\n"
        out.write(f"{head}Content-Length: 0\r\n\r\n".encode())

    site.raw["/api/models/me/vit/revision/main"] = refuse
    with pytest.raises(UserError, match=f"hf://me/vit.*{message}") as e:
        weights.read("hf://me/vit")
    assert "\n" not in str(e.value)


def test_hub_config_is_only_absent_if_the_hub_says_so(site, tmp_path):
    """Otherwise heads and GELU would be guessed, and stay so once all is cached."""
    model, _, files = repository(tmp_path / "hf", gelu="tanh", layer_norm_eps=1e-5)
    site.repository("me/vit", files)
    site.status[f"/me/vit/resolve/{COMMIT}/config.json"] = 403
    with pytest.raises(UserError, match=r"hf://me/vit .*403"):
        weights.read("hf://me/vit")
    site.status.clear()
    assert weights.read("hf://me/vit").cfg == model.cfg


def test_hub_without_network(site):
    site.stop()
    with pytest.raises(UserError, match=r"not in the cache.*is there a network"):
        weights.read("hf://me/vit")


def test_metadata_beside_the_weights_needs_no_weights(site, npz, tmp_path):
    _, _, files = repository(tmp_path / "hf")
    site.repository("me/vit", files)
    site.files["/x.npz"] = npz[0]
    about = {"format": "vit_jax", "class_names": list("vwxyz")}
    site.files["/x.json"] = json.dumps(about).encode()
    assert weights.read_metadata(f"{site.url}/x.npz").class_names == tuple("vwxyz")
    assert weights.read_metadata("hf://me/vit").transforms
    asked = {path for path, _ in site.requests}
    assert not any(path.endswith((".npz", ".safetensors")) for path in asked)
    del site.files["/x.json"]
    assert weights.read_metadata(f"{site.url}/x.npz#sha256=").class_names == tuple(
        "vwxyz"
    )


def test_catalogue_ids_are_sources(site, npz, monkeypatch):
    data, flat = npz
    found = catalogue.find("vit_b8_i21k")
    site.files[f"/{found.file.removeprefix('gs://')}"] = data
    assert_same(weights.read("vit_b8_i21k").params, flat)
