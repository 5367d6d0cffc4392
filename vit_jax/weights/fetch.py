# SPDX-License-Identifier: Apache-2.0
"""Downloads of ``https://`` and ``gs://`` (public buckets) into a cache.

A file gets its name in the cache only when it is complete and looks like what was asked
for. Until then its bytes wait in ``.partial`` there, where the next attempt resumes. A cached file is used without asking the network again.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from vit_jax.errors import UserError, one_line
from vit_jax.runtime import cache_folder

GS_ENDPOINT = "https://storage.googleapis.com"
_CHUNK = 1 << 20
_ATTEMPTS = 5
# A download may take this many seconds, and one more for so many bytes that arrive.
PATIENCE = 60.0
SLOWEST = 10_000
# Bytes of a file whose server does not say how long it is.
LONGEST = 2 << 30
_ALTERNATIVES = (
    "Alternatives: a local path (download the file in any other way), an https:// URL "
    "of a mirror, or hf://OWNER/NAME, where timm and google publish the same weights "
    "(python -m vit_jax.weights list)"
)


def is_remote(source: str) -> bool:
    return re.match(r"(https?|gs|hf)://", source) is not None


def cached(url: str) -> Path:
    """Where ``url`` is, or will be: folders are unique per URL without its last part."""
    parent, name = to_https(url.split("#")[0]).rsplit("/", 1)
    digest = hashlib.sha256(parent.encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", parent.split("://")[1])[-60:].strip("_")
    name = re.sub(r"[^A-Za-z0-9._+=,-]+", "_", urllib.parse.unquote(name))
    return cache_folder() / f"{slug}-{digest}" / name


def to_https(url: str) -> str:
    """``url`` itself, or the address that ``gs://`` stands for.

    Raises:
      UserError: it names no file, or is not safe.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "gs":
        return f"{GS_ENDPOINT}/{urllib.parse.quote(rest)}"
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as e:
        raise UserError(f"{url} is not an address: {e}") from e
    if not parts.hostname or not parts.path.rpartition("/")[2]:
        raise UserError(f"{url} names no file: write https://HOST/FOLDER/FILE")
    if scheme == "http" and not _here(url):
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
      UserError: no network, too slow or too large, a wrong checksum, an unusable
        cache, or by ``check``.
    """
    target = cached(url)
    if not target.is_file():
        with _claimed(target) as (file, partial):
            if not target.is_file():
                _fill(url, file, partial, check)
                os.replace(partial, target)
                return target
            partial.unlink()
    verify(target, url, f"the cached copy of {url}, {target},", "delete it")
    return target


def verify(path: Path, url: str, what: str, advice: str) -> None:
    """Raises: UserError: ``url`` ends in a checksum that ``path`` does not have."""
    stated = url.partition("#sha256=")[2].lower()
    if not stated:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stated:
        raise UserError(
            f"{what} has sha256 {found}, but {stated} was stated: {advice}, or get the "
            "file in another way"
        )


class Refused(UserError):
    """The server answered that it does not give the file; ``status`` is its reason."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Interrupted(UserError):
    """The bytes so far are good: the next attempt may resume."""


@contextmanager
def _claimed(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """The partial file of ``target``, for this process alone; others wait here."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = cache_folder() / ".partial" / f"{target.parent.name}-{target.name}"
        partial.parent.mkdir(exist_ok=True)
        owned = False
        while not owned:
            with partial.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Whoever had it before may have renamed or deleted it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    owned = os.path.samestat(partial.stat(), os.fstat(file.fileno()))
                if owned:
                    yield file, partial
    except OSError as e:
        raise UserError(
            f"the cache {cache_folder()} cannot be written ({e.strerror}): set "
            "VIT_JAX_CACHE to a folder where it can"
        ) from e


def _fill(
    url: str, file: IO[bytes], partial: Path, check: Callable[[Path], None]
) -> None:
    """Downloads, and checks; what failed for good is not kept."""
    tag = partial.with_name(partial.name + ".tag")
    try:
        _transfer(url, file, tag)
        verify(partial, url, f"{url}: the download", "it is deleted; try again")
        check(partial)
    except (_Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        partial.unlink()
        tag.unlink(missing_ok=True)
        raise
    tag.unlink()


def _transfer(url: str, file: IO[bytes], tag: Path) -> None:
    """Appends to ``file`` until it is complete; retries transient errors."""
    address = to_https(url.split("#")[0])
    clock = _Clock(url)
    attempt = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            return _receive(address, file, tag, clock)
        except urllib.error.HTTPError as e:
            e.close()
            if e.code == 416:  # it has changed: begin anew
                tag.unlink(missing_ok=True)
            elif e.code not in (408, 429, 500, 502, 503, 504):
                raise _refused(url, e.code) from e
            reason = f"the server answers {e.code}"
        except (OSError, http.client.HTTPException) as e:
            reason = one_line(getattr(e, "reason", e))
        # Progress starts the count anew: a slow line should finish, not give up.
        attempt = 1 if file.seek(0, os.SEEK_END) > before else attempt + 1
        if attempt >= _ATTEMPTS:
            raise _interrupted(url, reason)
        time.sleep(min(30, 0.5 * 2**attempt, clock.left()))


def _receive(address: str, file: IO[bytes], tag: Path, clock: "_Clock") -> None:
    """One request. Continues the bytes that are there if they are of the same file."""
    version = tag.read_text() if tag.exists() else ""
    start = file.seek(0, os.SEEK_END) if version else file.truncate(0)
    ask = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
    with clock.open(address, ask) as response:
        found = _version(response.headers)
        if response.status == 206:
            begins = response.headers.get("Content-Range", "").startswith(
                f"bytes {start}-"
            )
            if not begins or found != version:
                tag.unlink()
                raise http.client.HTTPException("the file has changed")
        else:
            start = file.truncate(0)
            tag.write_text(found)
        length = response.headers.get("Content-Length", "")
        stated = re.fullmatch(r"\d{1,18}", length) is not None
        most = int(length) if stated else LONGEST
        if stated and most > (free := shutil.disk_usage(tag.parent).free):
            raise UserError(f"{clock.url} has {most:,} bytes, the disk {free:,} left")
        done = 0
        bar = tqdm(
            desc=clock.url.split("#")[0].rsplit("/", 1)[-1],
            total=start + most if stated else None,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,  # on a terminal only
        )
        # ``read`` would wait for a whole chunk, however slowly it comes.
        while chunk := response.read1(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
            if done > most:
                raise UserError(
                    f"{clock.url} has no end: more than {most:,} bytes came"
                )
            clock.arrived(len(chunk))
        bar.close()
        file.flush()
        if stated and done < most:
            raise http.client.IncompleteRead(b"", most - done)


def _version(headers: Any) -> str:
    """What tells two versions of a file apart; "" if the server gives nothing."""
    etag = headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified", "")


class _Clock:
    """Ends a download that hangs or trickles."""

    def __init__(self, url: str):
        self.url = url
        self._end = time.monotonic() + PATIENCE

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def arrived(self, count: int) -> None:
        self._end += count / SLOWEST
        if not self.left():
            raise _interrupted(self.url, f"it sends less than {SLOWEST / 1e3:.0f} kB/s")

    def open(self, address: str, headers: dict[str, str]) -> Any:
        """The response to a request; no part of it is waited for longer than is left.

        In a thread, because a server may send a header byte by byte, which no time-out
        of a socket ends.
        """
        found: list[Any] = []
        timeout = min(30.0, self.left() + 0.01)
        request = urllib.request.Request(
            address, headers={"User-Agent": "vit_jax", **headers}
        )

        def ask() -> None:
            try:
                found.append(opener(self.url).open(request, timeout=timeout))
            except Exception as e:
                found.append(e)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.left())
        if not found or not self.left():
            raise _interrupted(self.url, f"no answer within {PATIENCE:.0f} s")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]


def opener(url: str) -> urllib.request.OpenerDirector:
    """What opens ``url`` and follows no redirect that leaves https."""
    return urllib.request.build_opener(_Redirects(url))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, url: str):
        self._url = url

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        both_here = _here(req.full_url) and _here(newurl)
        if not (newurl.startswith("https://") or both_here):
            fp.close()
            raise UserError(
                f"{self._url}: the server redirects to {newurl!r:.200}, which can be "
                "altered on the way: use an address that stays on https://"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _here(url: str) -> bool:
    """Whether it is on this machine, where plain http is safe."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "http" and parts.hostname in (
        "localhost",
        "127.0.0.1",
        "::1",
    )


def _interrupted(url: str, reason: str) -> _Interrupted:
    return _Interrupted(
        f"{url} cannot be downloaded: {reason}. Is there a network? What arrived is kept, "
        f"run the command again to resume. {_ALTERNATIVES}"
    )


def _refused(url: str, code: int) -> Refused:
    if code in (401, 403):
        why = f"access is denied (status {code}): the file is private, gone or blocked"
    elif code in (404, 410):
        why = f"there is no such file (status {code}): check the spelling"
    elif code in (301, 302, 303, 307, 308):
        why = f"the server redirects in a loop, or not to https (status {code})"
    else:
        why = f"the server answers {code}"
    return Refused(f"{url}: {why}. {_ALTERNATIVES}", code)
