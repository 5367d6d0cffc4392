# SPDX-License-Identifier: Apache-2.0
"""Downloads: ``https://``, ``gs://`` (public buckets) and ``hf://`` into a cache.

A file gets its name in the cache only when it is complete and looks like what was asked
for. Until then its bytes wait beside the cache, in ``<cache>.partial``, where the next
attempt resumes. A cached file is used without asking the network again.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError

GS_ENDPOINT = "https://storage.googleapis.com"
_CHUNK = 1 << 20
_ATTEMPTS = 5
_ALTERNATIVES = (
    "Alternatives: a local path (download the file in any other way), an https:// URL "
    "of a mirror, or hf://OWNER/NAME, where timm and google publish the same weights "
    "(python -m vit_jax.weights list)"
)


def is_remote(source: str) -> bool:
    return re.match(r"(https?|gs|hf)://", source) is not None


def cache_folder() -> Path:
    """``VIT_JAX_CACHE``, or the user's cache folder."""
    folder = os.environ.get("VIT_JAX_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vit_jax"
    )
    return Path(folder).expanduser()


def cached(url: str) -> Path:
    """Where ``url`` is, or will be: folders are unique per URL without its last part."""
    parent, name = to_https(url.split("#")[0]).rsplit("/", 1)
    digest = hashlib.sha256(parent.encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", parent.split("://")[1])[-60:].strip("_")
    name = re.sub(r"[^A-Za-z0-9._+=,-]+", "_", urllib.parse.unquote(name))
    return cache_folder() / f"{slug}-{digest}" / name


def to_https(url: str) -> str:
    """The address that ``gs://`` and ``hf://owner/name[@revision]/file`` stand for.

    Raises:
      UserError: it names no file, or is not safe.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "gs":
        return f"{GS_ENDPOINT}/{urllib.parse.quote(rest)}"
    if scheme == "hf":
        match = re.fullmatch(r"([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", rest)
        if not match:
            raise UserError(f"{url}: write hf://OWNER/NAME or hf://OWNER/NAME/FILE")
        repo, revision, file = match.groups()
        file = urllib.parse.quote(file)
        return f"{_hub()}/{repo}/resolve/{revision or 'main'}/{file}"
    try:
        host, path = (
            urllib.parse.urlsplit(url).hostname,
            urllib.parse.urlsplit(url).path,
        )
    except ValueError as e:
        raise UserError(f"{url} is no address: {e}") from e
    if not host or not path.rpartition("/")[2]:
        raise UserError(f"{url} names no file: write https://HOST/FOLDER/FILE")
    if scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{url}: http can be altered on the way; use https://")
    return url


def download(url: str, check: Callable[[Path], None] = lambda path: None) -> Path:
    """The cached copy of ``url``, downloaded if there is none.

    Args:
      url: may end in ``#sha256=...``, which the file must then match.
      check: called with the complete file before it gets its name; raises if the file
        is not what was asked for.

    Raises:
      Refused: 403, 404 and the like.
      UserError: no network, a wrong size or checksum, an unusable cache, or by
        ``check``.
    """
    target = cached(url)
    stated = _stated(url)
    if target.is_file():
        _verify(target, stated, f"the cached copy of {url}, {target},", "delete it")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        waiting = partial.open("ab")
    except OSError as e:
        raise UserError(
            f"the cache {cache_folder()} cannot be written ({e.strerror}): set "
            "VIT_JAX_CACHE to a folder where it can"
        ) from e
    # Several processes of one machine may ask for the same file: one downloads.
    with waiting as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if target.exists():
            partial.unlink(missing_ok=True)
            return target
        tag = partial.with_name(partial.name + ".tag")
        keep = False
        try:
            stated = _transfer(url, file, tag) | stated
            _verify(partial, stated, f"{url}: the download", "it is deleted; try again")
            check(partial)
            os.replace(partial, target)
        except (_Interrupted, KeyboardInterrupt):
            keep = True
            raise
        finally:
            if not keep:
                partial.unlink(missing_ok=True)
                tag.unlink(missing_ok=True)
                _remove_if_empty(target.parent)
                _remove_if_empty(partial.parent)
    return target


def repository_files(url: str) -> list[str]:
    """Names of the files of ``hf://owner/name``; [] if that cannot be found out."""
    import json

    match = re.fullmatch(r"hf://([^/]+/[^/@]+)(?:@[^/]+)?/?", url)
    if not match:
        return []
    try:
        with _open(f"{_hub()}/api/models/{match[1]}", {}) as response:
            listing = json.load(response)
        return [s["rfilename"] for s in listing.get("siblings", [])]
    except (OSError, ValueError, KeyError):
        return []


class Refused(UserError):
    """The server answered that it does not give the file; ``status`` is its reason."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Interrupted(UserError):
    """The bytes so far are good: the next attempt may resume."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the checksum that the Hub states before it redirects to its storage."""

    stated = ""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.stated = headers.get("X-Linked-Etag") or self.stated
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "vit_jax", **headers})
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(_hub() + "/"):
        # Unredirected: the storage that the Hub redirects to must not see the token.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    response: Any = opener.open(request, timeout=60)
    response.stated = redirects.stated
    return response


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _partial(target: Path) -> Path:
    """Beside the cache rather than in it, if the user may write there."""
    cache = cache_folder()
    for folder in (cache.with_name(cache.name + ".partial"), cache / ".partial"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if folder.stat().st_dev == target.parent.stat().st_dev:
            return folder / f"{target.parent.name}-{target.name}"
    return target.with_name(f".{target.name}.partial")


def _transfer(url: str, file: Any, tag: Path) -> dict[str, str]:
    """Appends to ``file`` until it is complete; retries what may pass.

    Returns the checksums that the server states.
    """
    address = to_https(url.split("#")[0])
    attempt = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            return _receive(address, url, file, tag)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code not in (408, 429, 500, 502, 503, 504):
                raise _refused(url, e.code) from e
            reason = f"the server answers {e.code}"
        except (OSError, http.client.HTTPException) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
        # Progress starts the count anew: a slow line should finish, not give up.
        attempt = 1 if file.seek(0, os.SEEK_END) > before else attempt + 1
        if attempt >= _ATTEMPTS:
            raise _Interrupted(
                f"{url} cannot be downloaded: {reason}. Is there a network? What arrived is "
                f"kept, run the command again to resume. {_ALTERNATIVES}"
            )
        time.sleep(min(30, 0.5 * 2**attempt))


def _receive(address: str, url: str, file: Any, tag: Path) -> dict[str, str]:
    """One request; returns the checksums that the server states."""
    start = file.seek(0, os.SEEK_END)
    headers = {}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()
    try:
        response = _open(address, headers)
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise
        e.close()
        file.truncate(0)  # the file has changed, or is complete: fetch it anew
        response = _open(address, {})
    with response:
        match = re.match(
            r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")
        )
        if response.status != 206 or not match or int(match[1]) != start:
            file.truncate(0)
            if response.status == 206:
                raise http.client.HTTPException("the server sent another range")
            start = 0
        length = response.headers.get("Content-Length")
        total = int(match[2]) if match else int(length) if length else 0
        etag = response.headers.get("ETag") or ""
        if etag and not etag.startswith("W/"):
            tag.write_text(etag)
        done, shown = start, time.monotonic()
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            if time.monotonic() - shown > 0.5:
                shown = time.monotonic()
                _show(url, done, total)
        file.flush()
        _show(url, done, total, last=True)
        if total and done != total:
            raise http.client.IncompleteRead(b"", total - done)
        stated = response.stated or etag
        checksums = {}
        if re.fullmatch(r'"?[0-9a-f]{64}"?', stated):
            checksums["sha256"] = stated.strip('"')
        if match := re.search(
            r"md5=([\w+/]+=*)", response.headers.get("x-goog-hash", "")
        ):
            checksums["md5"] = match[1]
        return checksums


def _stated(url: str) -> dict[str, str]:
    """The checksum that an address ends with."""
    fragment = url.partition("#")[2]
    if not fragment.startswith("sha256="):
        return {}
    return {"sha256": fragment.removeprefix("sha256=").lower()}


def _verify(path: Path, stated: dict[str, str], what: str, advice: str) -> None:
    import base64

    for name, expected in stated.items():
        digest = hashlib.new(name, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found = digest.hexdigest()
        if name == "md5":
            found = base64.b64encode(digest.digest()).decode()
        if found != expected:
            raise UserError(
                f"{what} has {name} {found}, but {expected} was stated: {advice}, or get "
                "the file in another way"
            )


def _refused(url: str, code: int) -> Refused:
    if code in (401, 403):
        why = f"access is denied (status {code}): the file is private, gone or blocked"
        if "hf://" in url or url.startswith(_hub()):
            why += "; set HF_TOKEN if your account may read it"
    elif code in (404, 410):
        why = f"there is no such file (status {code}): check the spelling"
    else:
        why = f"the server answers {code}"
    return Refused(f"{url}: {why}. {_ALTERNATIVES}", code)


def _show(url: str, done: int, total: int, last: bool = False) -> None:
    """A line that rewrites itself on a terminal, and one line at the end elsewhere."""
    terminal = sys.stderr.isatty()
    if not (terminal or (last and done > _CHUNK)):
        return
    share = f"{100 * done // total:3d} % of {total / 1e6:.1f} MB" if total else ""
    print(
        f"\rdownloading {url.rsplit('/', 1)[-1]}: {share or f'{done / 1e6:.1f} MB'}",
        end="\n" if last else "",
        file=sys.stderr,
        flush=True,
    )


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
