# SPDX-License-Identifier: Apache-2.0
"""Opens whatever a user has: the format is found by looking at the first bytes.

Nothing is ever unpickled, and each thing that is not a checkpoint has a message that
says what it is and what to do.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from vit_jax.errors import UserError, one_line
from vit_jax.weights import (
    fetch,
    hub,
    metadata,
    msgpack,
    npz,
    pickles,
    safetensors,
)
from vit_jax.weights.contents import (
    Array,
    Contents,
    Damaged,
    Metadata,
    in_memory,
    is_weight,
    parsing,
    unchunked,
)

_TORCH = (".bin", ".pth", ".pt")
_SOURCES = (
    "give a local file or folder, https://, gs://, hf://OWNER/NAME, or an id of the "
    "catalogue (python -m vit_jax.weights list)"
)
_KNOWN = "Known are .npz, .safetensors, .pth, .msgpack, Hugging Face and Orbax folders"
# First bytes of what is known -> its format, or what to say after the name of the file.
_MAGIC: dict[bytes, str] = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x93NUMPY": "is a single .npy array: a checkpoint is an .npz with one array per "
    "parameter",
    b"\x1f\x8b": "is compressed with gzip: run gunzip on it first",
    b"\x89HDF": "is an HDF5 (Keras) file, which is not supported",
    # The old format of torch.save, and other pickles.
    **{
        bytes(
            (0x80, protocol)
        ): "is a Python pickle without a zip around it (torch.save "
        "of 2020 or before): never unpickled here, because unpickling runs code. "
        f"{pickles.CONVERT}"
        for protocol in range(2, 6)
    },
    **{bytes((first,)): "msgpack" for first in (*range(0x81, 0x90), 0xDE, 0xDF)},
}
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<head", b"<body")


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What :func:`open_source` was asked for."""

    where: str  # path or URL, for messages
    tree: str
    stack: ExitStack  # closes what is opened


@contextmanager
def open_source(source: str | Path) -> Iterator[tuple[Contents, str]]:
    """The contents of a checkpoint, and the subtree asked for as in ``file.npz:img``.

    Raises:
      UserError: it is missing, unreadable, or not a checkpoint.
    """
    source, tree = split(str(source))
    with ExitStack() as stack:
        if in_bucket(source):
            yield _open_bucket(source), tree
            return
        path = local(source)
        try:
            contents = _open(path, _Wanted(source, tree, stack))
            _check_names(contents.arrays, source)
            # In a torch file the subtree has been found already.
            yield contents, "" if contents.torch else tree
        except Damaged as e:
            if not fetch.is_remote(source):
                raise
            raise UserError(f"{e}. Delete the cached copy first: {path}") from e


def split(source: str) -> tuple[str, str]:
    """``file.npz:img`` -> ``("file.npz", "img")``; Windows drives and URLs stay whole."""
    suffixes = "npz|safetensors|msgpack|pth|pt|bin"
    match = re.fullmatch(rf"(.+\.(?:{suffixes})):([\w/]+)", source)
    if match and not Path(source).exists():
        return match[1], match[2]
    return source, ""


def local(source: str, weights: bool = True) -> Path:
    """A local path; remote files are downloaded into the cache.

    Args:
      source: path or URL.
      weights: False: of what is remote only what lies beside the weights; the file
        itself may then be missing.

    Raises:
      UserError: there is no such file, or it cannot be downloaded.
    """
    if not source:
        raise UserError(f"no source is named: {_SOURCES}")
    if not fetch.is_remote(source):
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(_missing(source))
        return path
    if source.startswith("hf://"):
        url = source.split("#")[0]
        path = hub.download(url, lambda d, names: _files(d, names, url), weights)
        if weights:
            fetch.verify(path, source, str(path), "delete it")
        return path
    path = fetch.cached(source)
    if path.suffix == ".npz" and not path.exists():
        # Class names and preprocessing travel beside it. Fetched first: once the
        # weights are cached, they are not looked for again. Buckets that may not be
        # listed answer 403 for what they do not have.
        try:
            fetch.download(re.sub(r"\.npz(#.*)?$", ".json", source))
        except fetch.Refused as e:
            if e.status not in (403, 404, 410):
                raise
    return fetch.download(source, check_file) if weights else path


def check_file(path: Path) -> None:
    """Raises: UserError: the file is certainly not a checkpoint, or is truncated."""
    kind = sniff(path, "the download")
    if kind == "safetensors":
        safetensors.header(path, "the download")
    if kind == "zip":
        import zipfile

        if not zipfile.is_zipfile(path):
            raise UserError("the download is a truncated zip: try again")


def sniff(path: Path, where: str) -> str:
    """ "zip", "safetensors" or "msgpack", by the first bytes.

    Raises:
      UserError: for everything else, saying what it is.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as e:
        raise UserError(f"{where} cannot be read: {e.strerror}") from e
    if not start:
        raise Damaged(f"{where} is empty: the download or copy failed, get it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30:
        return "safetensors"
    if start.lstrip().lower().startswith(_MARKUP):
        title = re.search(rb"<(title|code|message)>(.*?)</", start, re.I | re.S)
        says = one_line(ValueError(title[2].decode(errors="replace"))) if title else ""
        raise UserError(
            f"{where} is a web page{f' ({says})' if says else ''}, not weights: the "
            "server answered with an error or a login page. Open the address in a "
            "browser, or download it another way"
        )
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d{1,18})\b", start)
        raise UserError(
            f"{where} is a git-lfs pointer of {path.stat().st_size} bytes, not the weights"
            + (f" of {int(size[1]):,} bytes" if size else "")
            + ": run `git lfs pull` in that repository, or download the file itself"
        )
    what = next((says for magic, says in _MAGIC.items() if start.startswith(magic)), "")
    if what in ("zip", "msgpack"):
        return what
    raise UserError(
        f"{where} {what}"
        if what
        else f"{where} is not a checkpoint that this code knows: it begins with "
        f"{start[:8]!r}. {_KNOWN}"
    )


def _open(path: Path, wanted: _Wanted) -> Contents:
    where = wanted.where
    if path.is_dir():
        return _open_folder(path, wanted)
    if not path.is_file():
        raise UserError(f"{where} is neither a file nor a folder")
    kind = sniff(path, where)
    if kind == "msgpack":
        return Contents(where, msgpack.read(path, where), metadata.of_npz(path))
    if kind == "zip":
        archive = npz.archive(path, where, wanted.stack)
        names = archive.namelist()
        if any(n.endswith(("saved_model.pb", ".h5", "model.json")) for n in names):
            raise UserError(
                f"{where} is a zip of another kind of model: unpack it first"
            )
        if not pickles.program(names):
            return Contents(where, npz.read(archive, where), metadata.of_npz(path))
    return _open_torch([path], None, wanted)


def _open_folder(path: Path, wanted: _Wanted) -> Contents:
    names, where = sorted(p.name for p in path.iterdir()), wanted.where
    if not _torch_file(names) and (_is_orbax(path) or "checkpoints" in names):
        return _open_orbax(path.absolute(), where)
    files = [path / name for name in _files(path, names, where)]
    if lost := [f.name for f in files if not f.exists()]:
        raise UserError(f"{where}: {lost} are missing, which its index names")
    if files[0].suffix in (".safetensors", *_TORCH):
        contents = _open_torch(files, path, wanted)
        index = path / _torch_file(names)
        if index.name.endswith(".index.json"):
            listed = metadata.read_json(index)["weight_map"]
            if lost := sorted(set(listed) - set(contents.arrays)):
                raise UserError(
                    f"{where}: {index.name} names {len(lost)} arrays that are in none of "
                    f"its {len(files)} files, such as {lost[0]!r:.80} of {listed[lost[0]]}"
                )
        return contents
    if files[0].is_dir():
        return _open_orbax(files[0].absolute(), f"{where}/{files[0].name}")
    inside = dataclasses.replace(wanted, where=f"{where}/{files[0].name}")
    return _open(files[0], inside)


def _torch_file(names: list[str]) -> str:
    """The index or file of torch weights that has the usual name, or is the only one."""
    usual = ("model.safetensors", "pytorch_model.bin")
    for suffixes, name in zip(((".safetensors",), _TORCH), usual, strict=True):
        for candidate in (f"{name}.index.json", name):
            if candidate in names:
                return candidate
        found = [n for n in names if n.endswith(suffixes)]
        if len(found) == 1:
            return found[0]
    return ""


def _files(folder: Path, names: list[str], where: str) -> list[str]:
    """The files among ``names`` that hold the weights of a folder.

    Raises:
      UserError: there are none, or several.
    """
    if name := _torch_file(names):
        return _parts(folder / name) if name.endswith(".index.json") else [name]
    suffixes = (".npz", ".safetensors", *_TORCH, ".msgpack")
    found = [n for n in names if n.endswith(suffixes)]
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{where} holds {found[:8]}: name one as {where}/FILE")
    if flax := [n for n in names if re.fullmatch(r"checkpoint_\d{1,9}", n)]:
        return [max(flax, key=lambda n: int(n.split("_")[1]))]
    if "saved_model.pb" in names:
        raise UserError(
            f"{where} is a TensorFlow SavedModel, whose arrays have no names of a ViT: "
            "load the checkpoint that it was exported from"
        )
    raise UserError(
        f"{where} holds no checkpoint: neither model.safetensors nor checkpoints/ nor one "
        f".npz file is among {sorted(names)[:6]}"
    )


def _parts(index: Path) -> list[str]:
    """Names of the files that ``model.safetensors.index.json`` lists."""
    listed = metadata.read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    for name in names or [""]:
        is_name = isinstance(name, str) and len(name) < 200
        path = PurePosixPath(name) if is_name else PurePosixPath()
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{index}: weight_map names {name!r:.80}, which must be a file in its folder"
            )
    return sorted(set(names))


def _open_torch(files: list[Path], folder: Path | None, wanted: _Wanted) -> Contents:
    """``folder``: the one that was asked for, rather than a file in it."""
    where = wanted.where
    arrays: dict[str, Array] = {}
    header: dict[str, str] = {}
    notes: list[str] = []
    for file in files:
        name = f"{where}/{file.name}" if folder else where
        if sniff(file, name) == "zip":
            archive = npz.archive(file, name, wanted.stack)
            part, found = pickles.read(archive, file.stat().st_size, wanted.tree, name)
            notes += found
        else:
            if wanted.tree:
                raise UserError(f"{name} is one model: leave out ':{wanted.tree}'")
            part, text = safetensors.read(file, name)
            header |= text
        if twice := sorted(arrays.keys() & part.keys()):
            raise UserError(f"{name} holds {twice[0]!r:.80}, as another part does")
        arrays |= part
    about = metadata.of_safetensors(header, where)
    own = folder is not None
    documents = {} if about.model else beside(folder or files[0].parent, own)
    return Contents(where, unchunked(arrays), about, tuple(notes), True, documents)


# What Hugging Face, timm and OpenCLIP write beside the weights.
_DOCUMENTS = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def beside(folder: Path, own: bool) -> dict[str, dict[str, Any]]:
    """The JSON objects beside torch weights, by file name.

    ``own``: the folder is the model's; files among strangers may be of any kind.

    Raises:
      UserError: one is damaged.
    """
    found = {}
    for name in _DOCUMENTS:
        if (folder / name).is_file():
            try:
                found[name] = metadata.read_json(folder / name)
            except UserError:
                if own:
                    raise
    return found


def _check_names(arrays: dict[str, Array], where: str) -> None:
    """Names of a file are printed; none may write to the terminal what it likes."""
    for name in arrays:
        if not name.isprintable():
            raise UserError(f"{where} names an array {name!r:.80}")


def _open_orbax(path: Any, where: str) -> Contents:
    """A workdir of this code, its ``checkpoints/``, or one Orbax checkpoint."""
    with parsing(where):
        return _orbax(path, where)


def _orbax(path: Any, where: str) -> Contents:
    from vit_jax import checkpoint

    arrays = _in_memory(checkpoint.load_params(str(path)), where)
    about = Metadata()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "config.json").exists():
            about = metadata.of_workdir(folder)
            break
    return Contents(where, arrays, about)


def in_bucket(source: str) -> bool:
    """Whether it is a folder in a bucket, which has no suffix."""
    return source.startswith("gs://") and not re.search(r"\.\w{2,11}(#|$)", source)


def _open_bucket(url: str) -> Contents:
    """A workdir in a bucket, which Orbax reads in place."""
    from etils import epath

    try:
        return _orbax(epath.Path(url), url)
    except UserError:
        raise
    except Exception as e:  # of gcsfs, TensorStore, and all that these call
        raise UserError(
            f"{url} is a folder in a bucket, which cannot be read here ({one_line(e)}): "
            f"install gcsfs and log in, or copy it (gsutil -m cp -r {url} .) and give the "
            "local path"
        ) from e


def _in_memory(tree: Any, where: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if hasattr(value, "items"):
                walk(value, f"{name}/")
            elif hasattr(value, "shape") and is_weight(
                name, value.dtype, value.shape, where
            ):
                arrays[name] = in_memory(name, value)

    walk(tree, "")
    return arrays


def _is_orbax(path: Path) -> bool:
    marks = (
        "_CHECKPOINT_METADATA",
        "_METADATA",
        "_sharding",
        "manifest.ocdbt",
        "params",
    )
    steps = (p for p in path.iterdir() if p.name.isdigit() and p.is_dir())
    return any((path / mark).exists() for mark in marks) or any(steps)


def _missing(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_symlink():
        return f"{source} is a link to {path.readlink()}, which does not exist"
    folder, near = path.parent, []
    if folder.is_dir():
        import difflib

        names = [p.name for p in folder.iterdir()]
        near = difflib.get_close_matches(path.name, names, n=2)
    hint = f"; did you mean {near}?" if near else ""
    return f"{source} does not exist{hint}; {_SOURCES}"
