# SPDX-License-Identifier: Apache-2.0
"""Photos that someone names: files, folders, lists of them and addresses, read ahead in
order."""

import collections
import dataclasses
import itertools
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import folders, image_files, sources
from vit_jax.data.examples import Split, Unreadable
from vit_jax.errors import UserError, one_line
from vit_jax.weights import fetch, preprocessing
from vit_jax.weights.contents import Metadata
from vit_jax.weights.metadata import DEFAULT_TRANSFORMS

# An address that takes longer, in seconds, or sends more bytes is given up.
PATIENCE = 30.0
LARGEST = 64 << 20
THREADS = 4


def find(
    places: Iterable[str], knob: str = "", within: Sequence[Path] = ()
) -> list[str]:
    """The images that ``places`` name, in order.

    Args:
      places: image files; folders, with all image files below them; ``.txt`` files with
        one of these per line, relative to their own folder; ``https://`` addresses.
      knob: what named them, for messages.
      within: the lists that hold them.

    Raises:
      UserError: there is no image at all, a list or a folder cannot be read, or a list
        leads back to itself.
    """
    places = list(places)
    found: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if is_address(place):
            found.append(place)
        elif path.is_dir():
            inside = folders.files(path)
            found += sorted(f for f in inside if f.lower().endswith(folders.EXTENSIONS))
        elif path.suffix == ".txt" and path.is_file():
            if (file := path.resolve()) in within:
                raise UserError(f"the list {path} names itself, or a list that does")
            found += find(_lines(path), knob, (*within, file))
        else:  # where there is no such file, ``read`` says so
            found.append(str(path))
    if not found:
        raise UserError(
            f"{knob}{', '.join(places) or 'the list'} holds no images: name files, "
            f"folders with {', '.join(folders.EXTENSIONS)}, lists (.txt) or https:// addresses"
        )
    return found


def is_address(place: str) -> bool:
    return re.match(r"\w+://", place) is not None


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"the list {path} cannot be read as text: {e}") from e
    relative = lambda x: x if is_address(x) else str(path.parent / Path(x).expanduser())
    return [relative(x.strip()) for x in lines if x.strip()]


def readable(places: Iterable[str], knob: str = "") -> list[str]:
    """``find``, where the headers of the files leave at least one that may be an image.

    Raises:
      UserError: they leave none; see also ``find``.
    """
    found = find(places, knob)
    wrong = check(found)
    if len(wrong) == len(found):
        raise UserError("; ".join(wrong.values()))
    return found


def check(places: Sequence[str]) -> dict[str, str]:
    """What is wrong with those files that certainly are not images; reads their headers
    only."""
    wrong = {}
    for place in places:
        try:
            if not is_address(place):
                preprocessing.check_image(Path(place))
        except UserError as e:
            wrong[place] = str(e)
    return wrong


def read(place: str, channels: int = 3) -> np.ndarray:
    """uint8 (H, W, channels) of a file or an address.

    Raises:
      UserError: missing, unreadable, too large or not an image.
    """
    if not is_address(place):
        return preprocessing.read_image(Path(place), channels)
    try:
        return image_files.read(_download(place), channels)
    except image_files.ImageFileError as e:
        raise UserError(f"{place} cannot be read: {e}") from e


class OfDatasets:
    """The images of places, of which some may be sources of data (``sources.named``).

    Args:
      split: of the sources, all of which is meant.

    Raises:
      UserError: see ``readable`` and ``sources.load``.
    """

    def __init__(self, places: Iterable[str], split: str):
        self.names: list[str] = []
        self._held: dict[str, tuple[Split, int]] = {}
        files = []
        for place in places:
            # It is the test split as well, so that none of it is held out.
            cfg = sources.named(
                place, train_split=split, test_split=split, access="random"
            )
            if cfg is None:
                files.append(place)
                continue
            if cfg.source == "tfds":
                cfg = dataclasses.replace(cfg, train_split="train", test_split="train")
            dataset = sources.load(cfg)
            found = (
                dataset.splits(split)
                if dataset.splits
                else sources.evaluation_split(cfg, dataset, split)
            )
            names = [found.name_of(i) for i in range(len(found))]
            self._held.update((name, (found, i)) for i, name in enumerate(names))
            self.names += names
        if files or not self.names:
            self.names += readable(files)

    def read(self, name: str, channels: int = 3) -> np.ndarray:
        """As ``read``, of one of the names."""
        if name not in self._held:
            return read(name, channels)
        split, number = self._held[name]
        (image,), _ = split.read(np.array([number]))
        if split.kind == "path":
            return read(image, channels)
        if split.kind == "pixels":
            return image[..., :channels]
        try:
            if isinstance(image, Unreadable):
                raise image_files.ImageFileError(image.reason)
            return image_files.read(image, channels)
        except image_files.ImageFileError as e:
            raise UserError(f"{name} cannot be read: {e}") from e


def prepare(image: np.ndarray, about: Metadata, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (*size, C) in [-1, 1], as the checkpoint says, or as the
    official evaluation does where it says nothing."""
    return preprocessing.prepare(image, about.transforms or DEFAULT_TRANSFORMS, size)


def stream(
    places: Iterable[str], prepare: Callable[[str], np.ndarray], ahead: int = 32
) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """``prepare`` of each place in order, or why it failed; up to ``ahead`` of them at
    work in threads, so that memory does not grow with their number."""

    def attempt(place: str) -> np.ndarray | UserError:
        try:
            return prepare(place)
        except UserError as e:
            return e

    waiting: collections.deque[tuple[str, Future[Any]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for place in places:
                waiting.append((place, pool.submit(attempt, place)))
                if len(waiting) > ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def apply(
    function: Callable[[np.ndarray], Any],
    images: Iterable[tuple[str, np.ndarray | UserError]],
    size: int,
) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """``function`` of the images of ``stream``, in batches of one shape.

    Args:
      function: float32 (size, H, W, C) -> (size, ...).
      images: named, or why there is none.
      size: images at a time; missing ones are zeros.

    Yields:
      For each name what ``function`` gives for its image, or an error: that of the image,
      or that numbers are not finite.
    """

    def started() -> Iterator[tuple[Sequence[tuple[str, np.ndarray | UserError]], Any]]:
        rest = iter(images)
        while chunk := list(itertools.islice(rest, size)):
            good = [x for _, x in chunk if isinstance(x, np.ndarray)]
            given: Any = ()
            if good:
                batch = np.zeros((size, *good[0].shape), np.float32)
                batch[: len(good)] = good
                given = function(batch)
            yield chunk, given

    # A batch is collected and handed over while the device still works at the one before.
    for (chunk, given), _ in itertools.pairwise(itertools.chain(started(), [((), ())])):
        good = iter(np.asarray(given))
        for name, image in chunk:
            if isinstance(image, np.ndarray):
                image = next(good)
                if not np.isfinite(image).all():
                    image = UserError(
                        f"what the model gives for {name} is not finite: the checkpoint "
                        "or its preprocessing is broken"
                    )
            yield name, image


def _download(url: str) -> bytes:
    """In a thread, because no time-out of a socket ends an answer that trickles."""
    address, found = fetch.to_https(url), []

    def work() -> None:
        try:
            found.append(_receive(url, address))
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not found:
        raise UserError(f"{url} is too slow: it did not arrive within {PATIENCE:.0f} s")
    if isinstance(found[0], UserError):
        raise found[0]
    if isinstance(found[0], Exception):
        raise UserError(f"{url} cannot be read: {one_line(found[0])}") from found[0]
    return found[0]


def _receive(url: str, address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "vit_jax"})
    with fetch.opener(url).open(request, timeout=PATIENCE) as response:
        # Not ``get_content_type``, for which silence is text.
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind.startswith("text/"):
            raise UserError(f"{url} is a page ({kind}), not an image")
        content = response.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"{url} is larger than {LARGEST >> 20} MiB")
    return content
