# SPDX-License-Identifier: Apache-2.0
"""Where the images of a tar file lie in it, and what their labels say.

The headers are read once. What was found is kept in ``FILE.tar.npz`` beside the file, or
in the user's cache where that cannot be written, until the size or the time of the file
changes.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import secrets
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vit_jax.data import classes
from vit_jax.data.storage import binary, stat
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError
from vit_jax.runtime import cache_folder

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
# What may hold the class of an image, the first that does counts.
LABELS = (".cls", ".json", ".txt")
_LONGEST = 1 << 20  # bytes of a label's member, or of a long name
_BLOCK = 512
_VERSION = 1  # of the files that are kept
_COMPRESSED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)


@dataclasses.dataclass(frozen=True)
class Index:
    """The N images of one tar file, in the order of the file."""

    names: np.ndarray  # bytes (N,): of the members, UTF-8
    starts: np.ndarray  # int64 (N,): where their bytes begin in the file
    sizes: np.ndarray  # int64 (N,)
    labels: np.ndarray  # int32 (N,): which of ``spelled``
    spelled: np.ndarray  # str: the labels, as they are written


# A tar file and its members -> (name, start, size, label) of each image
Member = tuple[str, int, int]
Build = Callable[[str, Any, Iterator[Member]], Iterator[tuple[str, int, int, str]]]


def read(file: str, build: Build) -> Index:
    """The index of ``file``, as it is kept or as ``build`` finds it now.

    Raises:
      UserError: it is compressed, cut short or no tar file; also by ``build``.
    """
    about = stat(file)
    stamp = f"{_VERSION} {build.__name__} {about.length} {about.mtime_nsec}"
    digest = hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:32]
    places = [f"{file}.npz", str(cache_folder() / "tar" / f"{digest}.npz")]
    for place in places:
        if (kept := _kept(place, stamp)) is not None:
            return kept
    with binary(file) as stream:
        found = list(build(file, stream, members(file, stream, 0, about.length)))
    spelled, labels = np.unique([label for *_, label in found], return_inverse=True)
    index = Index(
        np.array([name.encode() for name, *_ in found], np.bytes_),
        np.array([start for _, start, *_ in found], np.int64),
        np.array([size for *_, size, _ in found], np.int64),
        labels.astype(np.int32),
        spelled.astype(str),
    )
    for place in places:
        if _keep(place, stamp, index):
            break
    return index


def members(file: str, stream: Any, begin: int, end: int) -> Iterator[Member]:
    """The files in a tar archive, which is the bytes [begin, end) of ``stream``.

    Raises:
      UserError: it is cut short, or holds what cannot be read in place.
    """
    at, long_name, long_size = begin, "", -1  # as a header before the member says
    while True:
        header = _header(file, stream, at, begin, end)
        if header is None:
            return
        special = header.type in _SPECIAL
        length = header.size if special or long_size < 0 else long_size
        start = at + _BLOCK
        at = start + -(-length // _BLOCK) * _BLOCK
        if length < 0 or start + length > end:
            raise UserError(
                f"{file} is cut short: {header.name!r} ends beyond its {end:,} bytes; "
                "copy it again"
            )
        if special:
            extended = _extended(header.type, _content(file, stream, start, length))
            long_name = extended.get("path", long_name)
            long_size = int(extended.get("size", long_size))
            continue
        name = (long_name or header.name).removeprefix("./")
        long_name, long_size = "", -1
        if header.islnk() or header.issym() or header.type == tarfile.GNUTYPE_SPARSE:
            raise UserError(
                f"{file}: {name!r} is a link or has holes: pack the files themselves, "
                "with tar --dereference --hard-dereference"
            )
        if header.isreg():
            yield name, start, length


_NAMES = "utf-8", "backslashreplace"  # how names are read: whatever they are, printable
_SPECIAL = tuple(bytes([b]) for b in b"xgXLK")


def _header(
    file: str, stream: Any, at: int, begin: int, end: int
) -> tarfile.TarInfo | None:
    """Of the member at a byte; None: the archive ends."""
    stream.seek(at)
    block = stream.read(_BLOCK) if at + _BLOCK <= end else b""
    if at == begin and block.startswith(_COMPRESSED):
        raise UserError(
            f"{file} is compressed, so that no image in it can be read without those "
            "before: unpack it to a plain .tar (gunzip, unzstd, unxz); photographs "
            "hardly get larger"
        )
    if len(block) < _BLOCK:
        raise UserError(
            f"{file} is cut short after {end - begin:,} bytes: copy it again"
        )
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, *_NAMES)
    except tarfile.HeaderError as e:
        what = f"is damaged at byte {at:,}" if at > begin else "is not a tar file"
        raise UserError(f"{file} {what} ({e}): copy it again") from e


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """The name and the size that a header of GNU tar or of pax gives the next member."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode(*_NAMES)}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    found = re.findall(rb"\d+ (path(?==)|size(?==\d{1,18}\n))=([^\n]*)\n", content)
    return {key.decode(): value.decode(*_NAMES) for key, value in found}


def _content(file: str, stream: Any, start: int, size: int) -> bytes:
    """Of a member that is text."""
    if size > _LONGEST:
        raise UserError(f"{file}: a label or name of {size:,} bytes is too long")
    stream.seek(start)
    return stream.read(size)


def webdataset(
    file: str, stream: Any, found: Iterator[Member]
) -> Iterator[tuple[str, int, int, str]]:
    """Images with the label in the member of the same name but its ending.

    Raises:
      UserError: an image has no label or two, or a label several images.
    """
    seen: dict[tuple[str, str], Member] = {}  # (key, "" of the image or ending)
    # Why one cannot be read matters only where none counts before it.
    labels: dict[tuple[str, str], str | UserError] = {}
    last, apart = "", []
    for member in found:
        name = member[0]
        key, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if os.path.basename(name).startswith(".") or suffix not in IMAGES + LABELS:
            continue
        what = "" if suffix in IMAGES else suffix
        if (key, what) in seen:
            raise UserError(
                f"{file} has {seen[key, what][0]!r} and {name!r}, of the same key: which "
                "label belongs to which image cannot be told"
            )
        if key != last and any((key, w) in seen for w in ("", *LABELS)):
            apart.append(key)
        seen[key, what], last = member, key
        if what:
            try:
                content = _content(file, stream, *member[1:])
                label = _label(what, content, f"{file}, {name}")
            except UserError as e:
                label = e
            labels.update({(key, what): label} if label else {})
    if apart:
        log.warning(
            "%s: the members of %d keys, the first is %r, do not lie together; they "
            "are put together by their names",
            file,
            len(apart),
            apart[0],
        )
    images = {key: member for (key, what), member in seen.items() if not what}
    bare = [k for k in images if not any((k, w) in labels for w in LABELS)]
    if bare:
        raise UserError(
            f"{file}: {len(bare)} of {len(images)} images have no label, the first is "
            f"{images[bare[0]][0]!r}: each needs a member of the same name that ends in "
            '.cls, .txt or .json (with "label" or "cls") and holds its class'
        )
    for key, member in images.items():
        label = next(labels[key, w] for w in LABELS if (key, w) in labels)
        if isinstance(label, UserError):
            raise label
        yield *member, label


def archive(
    file: str, stream: Any, found: Iterator[Member]
) -> Iterator[tuple[str, int, int, str]]:
    """Images of a tar, and of the tars in it, labelled with the names of those."""
    for name, start, size in found:
        stem, suffix = os.path.splitext(os.path.basename(name))
        if suffix.lower() == ".tar":
            inside = members(f"{file}: {name}", stream, start, start + size)
            for inner, begin, length in inside:
                yield f"{name}/{inner}", begin, length, stem
        elif suffix.lower() in IMAGES:
            yield name, start, size, ""


def _label(suffix: str, content: bytes, where: str) -> str:
    """As text; "": the member says something else."""
    try:
        value: Any = content.decode("utf-8-sig")
        if suffix == ".json":
            value = json.loads(value)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} cannot be read: {e}") from e
    if isinstance(value, dict):
        value = next((value[k] for k in ("label", "cls") if k in value), {})
    return "" if value == {} else classes.text(value, where)


def _kept(place: str, stamp: str) -> Index | None:
    """What is kept at a place, if it is there and of this file."""
    try:
        with tf.io.gfile.GFile(place, "rb") as stream, np.load(stream) as data:
            kept = {f.name: data[f.name] for f in dataclasses.fields(Index)}
            return Index(**kept) if str(data["stamp"]) == stamp else None
    except _CANNOT:
        return None


def _keep(place: str, stamp: str, index: Index) -> bool:
    """Whether the index could be written, whole."""
    partial = f"{place}.{secrets.token_hex(4)}.tmp"
    content = io.BytesIO()
    np.savez(content, stamp=np.array(stamp), **dataclasses.asdict(index))
    try:
        tf.io.gfile.makedirs(os.path.dirname(place))
        with tf.io.gfile.GFile(partial, "wb") as stream:
            stream.write(content.getvalue())
        tf.io.gfile.rename(partial, place, overwrite=True)
    except _CANNOT:
        with contextlib.suppress(*_CANNOT):
            tf.io.gfile.remove(partial)
        return False
    return True


# What reading or writing a kept index may raise: it is made again then.
_CANNOT = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    tf.errors.OpError,
)
