# SPDX-License-Identifier: Apache-2.0
"""Opens whatever a user has: the format is found by looking at the first bytes.

Nothing is ever unpickled, and each thing that is no checkpoint has a message that says
what it is and what to do.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.weights import fetch, metadata, npz, safetensors
from vit_jax.weights.contents import (
    Contents,
    Damaged,
    Metadata,
    in_memory,
    parsing,
    require_memory,
)

_TORCH_WAY_OUT = (
    "never unpickled here, because unpickling runs code. Write it as safetensors where "
    "PyTorch is installed: import torch, safetensors.torch; "
    "safetensors.torch.save_model or save_file(torch.load(FILE, weights_only=True), "
    "'model.safetensors')"
)


@contextmanager
def open_source(source: str | Path) -> Iterator[tuple[Contents, str]]:
    """The contents of a checkpoint, and the subtree asked for as in ``file.npz:img``.

    Raises:
      UserError: it is missing, unreadable, or not a checkpoint.
    """
    source, tree = split(str(source))
    with ExitStack() as stack:
        if source.startswith("gs://") and not re.search(r"\.\w{2,11}(#|$)", source):
            yield _open_bucket(source), tree
            return
        path = local(source)
        try:
            yield _open(path, source, stack), tree
        except Damaged as e:
            if not fetch.is_remote(source):
                raise
            raise UserError(f"{e}. Delete the cached copy first: {path}") from e


def split(source: str) -> tuple[str, str]:
    """``file.npz:img`` -> ``("file.npz", "img")``; Windows drives and URLs stay whole."""
    match = re.fullmatch(r"(.+\.(?:npz|safetensors|msgpack)):([\w/]+)", source)
    if match and not Path(source).exists():
        return match[1], match[2]
    return source, ""


def local(source: str) -> Path:
    """A local path; remote files are downloaded into the cache.

    Raises:
      UserError: there is no such file, or it cannot be downloaded.
    """
    if not fetch.is_remote(source):
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(_missing(source))
        return path
    if re.fullmatch(r"hf://[^/]+/[^/]+/?", source):
        return _repository(source.rstrip("/"))
    path = fetch.cached(source)
    if path.suffix == ".npz" and not path.exists():
        # Class names and preprocessing travel beside it. They come first: beside cached
        # weights nobody looks for them again. Buckets that may not be listed answer 403
        # for what they do not have.
        _optional(re.sub(r"\.npz(#.*)?$", ".json", source), absent=(403, 404, 410))
    return path if path.is_dir() else fetch.download(source, check_file)


def check_file(path: Path) -> None:
    """Raises: UserError: the file is certainly no checkpoint, or is truncated."""
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
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        raise Damaged(f"{where} is empty: the download or copy failed, get it again")
    if start.startswith(b"PK\x03\x04") or start.startswith(b"PK\x05\x06"):
        return "zip"
    if text.startswith(
        (b"<!doctype", b"<html", b"<?xml", b"<error", b"<head", b"<body")
    ):
        title = re.search(rb"<(title|code|message)>(.*?)</", start, re.I | re.S)
        says = f" ({title[2].decode(errors='replace').strip()})" if title else ""
        raise UserError(
            f"{where} is a web page{says}, not weights: the server answered with an error "
            "or a login page. Open the address in a browser, or download it another way"
        )
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        raise UserError(
            f"{where} is a git-lfs pointer of {path.stat().st_size} bytes, not the weights"
            + (f" of {int(size[1]):,} bytes" if size else "")
            + ": run `git lfs pull` in that repository, or download the file itself"
        )
    if len(start) > 9 and start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if header < 1 << 30:
            return "safetensors"
    if start[0] == 0x80 and start[1:2] in b"\x02\x03\x04\x05":
        raise UserError(
            f"{where} is a Python pickle (old torch.save?): {_TORCH_WAY_OUT}"
        )
    if start.startswith(b"\x93NUMPY"):
        raise UserError(
            f"{where} is a single .npy array: a checkpoint is an .npz with one array per "
            "parameter"
        )
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{where} is compressed with gzip: run gunzip on it first")
    if start.startswith(b"\x89HDF"):
        raise UserError(f"{where} is an HDF5 (Keras) file, which is not supported")
    if 0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return "msgpack"
    raise UserError(
        f"{where} is no checkpoint that this code knows: it begins with {start[:8]!r}. "
        "Known are .npz, .safetensors, Hugging Face folders, workdirs, Orbax folders and "
        "Flax msgpack files"
    )


def _open(path: Path, where: str, stack: ExitStack) -> Contents:
    if path.is_dir():
        return _open_folder(path, where, stack)
    if not path.is_file():
        raise UserError(f"{where} is neither a file nor a folder")
    try:
        kind = sniff(path, where)
    except PermissionError as e:
        raise UserError(f"{where} must not be read: {e.strerror}") from e
    if kind == "zip":
        _refuse_torch_zip(path, where)
        arrays = npz.read(path, where, stack)
        return Contents(where, arrays, metadata.of_npz(path))
    if kind == "msgpack":
        return _open_msgpack(path, where)
    return _open_torch([path], where, False)


def _open_folder(path: Path, where: str, stack: ExitStack) -> Contents:
    names = {p.name for p in path.iterdir()}
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = [path / part for part in metadata.parts(index)]
        if lost := [f.name for f in files if not f.exists()]:
            raise UserError(f"{where}: {index.name} names {lost}, which are missing")
        return _open_torch(files, where, True)
    found = sorted(path.glob("*.safetensors"))
    model = path / "model.safetensors"
    if model in found or len(found) == 1:
        files = [model if model in found else found[0]]
        return _open_torch(files, where, True)
    if found:
        raise UserError(f"{where} holds {[f.name for f in found]}: name one of them")
    if _is_orbax(path) or "checkpoints" in names:
        return _open_orbax(path.absolute(), where)
    if torch_files := sorted(n for n in names if n.endswith((".bin", ".pth", ".pt"))):
        raise UserError(
            f"{where} has its weights in {torch_files[0]}, a pickle: {_TORCH_WAY_OUT}"
        )
    if "saved_model.pb" in names:
        raise UserError(
            f"{where} is a TensorFlow SavedModel, whose arrays have no names of a ViT: "
            "load the checkpoint that it was exported from"
        )
    inside = sorted(n for n in names if n.endswith((".npz", ".msgpack")))
    if len(inside) == 1:
        return _open(path / inside[0], f"{where}/{inside[0]}", stack)
    flax = sorted(n for n in names if re.fullmatch(r"checkpoint_\d+", n))
    if flax:
        newest = max(flax, key=lambda n: int(n.split("_")[1]))
        if (path / newest).is_dir():
            return _open_orbax(path.absolute() / newest, f"{where}/{newest}")
        return _open(path / newest, f"{where}/{newest}", stack)
    raise UserError(
        f"{where} holds no checkpoint: neither model.safetensors nor checkpoints/ nor one "
        f".npz file is among {sorted(names)[:6]}"
    )


def _open_torch(files: list[Path], where: str, own_folder: bool) -> Contents:
    arrays: dict[str, Any] = {}
    header: dict[str, str] = {}
    for file in files:
        part, found = safetensors.read(file, where)
        arrays |= part
        header |= found
    about = metadata.of_safetensors(header, where)
    beside = {} if about.model else _beside(files[0].parent, own_folder)
    return Contents(where, arrays, about, torch=True, files=beside)


# What Hugging Face, timm and OpenCLIP write beside the weights.
_DOCUMENTS = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def _beside(folder: Path, own_folder: bool) -> dict[str, dict[str, Any]]:
    """The JSON objects beside torch weights; a file among strangers may have none."""
    found = {}
    for name in _DOCUMENTS:
        if (folder / name).exists():
            try:
                found[name] = metadata.read_json(folder / name)
            except UserError:
                if own_folder:
                    raise
    return found


def _open_msgpack(path: Path, where: str) -> Contents:
    """A checkpoint that ``flax.training.checkpoints`` wrote (the official code does)."""
    from flax import serialization

    require_memory(2 * path.stat().st_size, where)
    with parsing(f"{where}, a Flax msgpack file,"):
        tree = serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise UserError(f"{where} is msgpack but holds no parameters: {type(tree)}")
    return Contents(where, _in_memory(tree), metadata.of_npz(path))


def _open_orbax(path: Any, where: str) -> Contents:
    """A workdir of this code, its ``checkpoints/``, or one Orbax checkpoint."""
    with parsing(where):
        return _orbax(path, where)


def _orbax(path: Any, where: str) -> Contents:
    from vit_jax import checkpoint

    arrays = _in_memory(checkpoint.load_params(str(path)))
    about = Metadata()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "config.json").exists():
            about = metadata.of_workdir(folder)
            break
    return Contents(where, arrays, about)


def _open_bucket(url: str) -> Contents:
    """A workdir in a bucket, which Orbax reads in place."""
    from etils import epath

    try:
        return _orbax(epath.Path(url), url)
    except UserError:
        raise
    except Exception as e:  # of gcsfs, TensorStore, and all that these call
        what = str(e).partition("\n")[0] or type(e).__name__
        raise UserError(
            f"{url} is a folder in a bucket, which cannot be read here ({what}): install "
            f"gcsfs and log in, or copy it (gsutil -m cp -r {url} .) and give the local path"
        ) from e


def _in_memory(tree: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if hasattr(value, "items"):
                walk(value, f"{name}/")
            elif hasattr(value, "shape") and value.dtype.kind in "fiubV":
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


def _refuse_torch_zip(path: Path, where: str) -> None:
    import zipfile

    with parsing(where), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise UserError(f"{where} is a torch.save file, a pickle: {_TORCH_WAY_OUT}")
    if any(name.endswith(("saved_model.pb", ".h5", "model.json")) for name in names):
        raise UserError(f"{where} is a zip of another kind of model: unpack it first")


def _missing(source: str) -> str:
    folder = Path(source).expanduser().parent
    near = []
    if folder.is_dir():
        import difflib

        names = [p.name for p in folder.iterdir()]
        near = difflib.get_close_matches(Path(source).name, names, n=2)
    hint = f"; did you mean {near}?" if near else ""
    return (
        f"{source} does not exist{hint}; give a local file or folder, https://, gs://, "
        "hf://OWNER/NAME, or an id of the catalogue (python -m vit_jax.weights list)"
    )


def _optional(
    url: str,
    check: Callable[[Path], Any] = lambda path: None,
    absent: tuple[int, ...] = (404, 410),
) -> Path | None:
    """A file that need not exist; None if the server says that it does not."""
    try:
        return fetch.download(url, check)
    except fetch.Refused as e:
        if e.status not in absent:
            raise
        return None


def _optional_json(url: str) -> Path | None:
    return _optional(url, lambda path: metadata.read_json(path, url))


def _repository(url: str) -> Path:
    """A Hugging Face repository, downloaded as far as it is needed: a folder or file.

    The small files come before the weights: where weights are cached, nobody asks
    whether there are others.
    """
    weights, index = f"{url}/model.safetensors", f"{url}/model.safetensors.index.json"
    only = fetch.cached(f"{url}/.only")  # a link to the one file that can be loaded
    if fetch.cached(weights).exists():
        return fetch.cached(weights).parent
    if only.exists():
        return only.resolve()
    if not fetch.cached(index).exists():
        _optional_json(f"{url}/config.json")
        _optional_json(f"{url}/preprocessor_config.json")
        if found := _optional(weights, check_file):
            return found.parent
    if found := _optional_json(index):
        for part in metadata.parts(found):
            fetch.download(f"{url}/{part}", check_file)
        return found.parent
    files = fetch.repository_files(url)
    usable = [f for f in files if f.endswith((".npz", ".safetensors", ".msgpack"))]
    if len(usable) == 1:
        path = local(f"{url}/{usable[0]}")
        only.parent.mkdir(parents=True, exist_ok=True)
        only.unlink(missing_ok=True)  # it may point to a file that was deleted
        only.symlink_to(path)
        return path
    if usable:
        raise UserError(f"{url} has {usable}: name one as {url}/FILE")
    raise UserError(
        f"{url} has no model.safetensors"
        + (f" but {files[:8]}" if files else ": check the spelling")
        + (f"; a .bin file is a pickle, {_TORCH_WAY_OUT}" if _has_bin(files) else "")
    )


def _has_bin(files: list[str]) -> bool:
    return any(f.endswith((".bin", ".pth", ".pt")) for f in files)
