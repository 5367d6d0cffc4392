# SPDX-License-Identifier: Apache-2.0
"""A page for the browser: drop a photo, see its classes and what the model attends to.

    python -m vit_jax.app SOURCE [--images=FOLDER|vectors.npz] [--port=7860]

SOURCE is anything that ``vit_jax.load`` takes. With ``--images`` the page also shows
which images of a folder, or of a file that ``vit-jax embed`` wrote, are nearest. Only
this machine can open the page, unless ``--host`` says otherwise, and it loads nothing from
any other.
"""

import base64
import functools
import io
import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from vit_jax import cli, embed, inference, models, photos
from vit_jax.analysis import attention
from vit_jax.analysis.subject import Subject, to_uint8
from vit_jax.data import image_files
from vit_jax.errors import UserError

TOP, NEAREST = 5, 8
# Pixels of the sides of the pictures of nearest images.
THUMBNAIL = 224
# The page may use what it brings itself, and may not ask any other machine for anything.
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"
LOOPBACK = ("127.0.0.1", "localhost")


class Gallery(NamedTuple):
    """Images that a photo is compared with: N of them."""

    places: tuple[str, ...]
    vectors: np.ndarray  # float32 (N, D), of length 1


def gallery(source: str, place: str) -> Gallery:
    """The images of ``place``, embedded by ``source``.

    Args:
      source: of the weights.
      place: a folder or list of images, or an ``.npz`` that ``embed`` wrote.

    Raises:
      UserError: it holds no images, or no vectors.
    """
    if not place:
        return Gallery((), np.zeros((0, 0), np.float32))
    with tempfile.TemporaryDirectory() as folder:
        if Path(place).suffix != ".npz":
            file = str(Path(folder, "vectors.npz"))
            for error in embed.embed(source, [place], file).failed:
                print(f"left out: {error}", file=sys.stderr)
        else:
            file = place
        try:
            with np.load(file) as found:
                places, vectors = found["path"].tolist(), found["vector"]
        except (OSError, ValueError, LookupError) as e:
            reason = " ".join(str(e).split())
            raise UserError(
                f"--images={place} is not what vit-jax embed writes: {reason}"
            ) from e
    if vectors.ndim != 2:
        raise UserError(
            f"--images={place} holds vectors of shape {vectors.shape[1:]}: embed with "
            "--pooling=head"
        )
    return Gallery(tuple(places), _unit(vectors))


class Viewer:
    """What the page asks for.

    Args:
      source: of the weights.
      images: see :func:`gallery`; "": none.

    Raises:
      UserError: wrong weights or images.
    """

    def __init__(self, source: str, images: str = ""):
        self._subject = subject = Subject(source)
        cfg = subject.model.cfg
        try:
            self._names = subject.class_names
        except UserError:
            self._names = ()
        self._gallery = gallery(source, images)
        found = self._gallery.vectors.shape
        self._lock = threading.Lock()
        model, params, self._attends = subject.model, subject.params, True
        try:
            model, params = attention.unrolled(model, params)
        except UserError:  # there is none between all patches
            self._attends = False
        self._model, self._params = model, jax.device_put(params, jax.devices()[0])
        blank = np.zeros((1, *subject.size, cfg.channels), np.float32)
        features = self._forward(blank)["features"]  # compiles
        if len(self._gallery.places) and found[1:] != features.shape:
            raise UserError(
                f"--images={images} holds vectors of {found[1]} numbers, but {source} gives "
                f"{features.shape[0]}: embed with the same model"
            )

    def about(self) -> dict[str, Any]:
        """What the page says before it has a photo."""
        cfg = self._subject.model.cfg
        layers, heads = (cfg.depth, cfg.heads) if self._attends else (0, 0)
        return {
            "model": self._subject.name,
            "source": Path(self._subject.source).name,
            "size": list(self._subject.size),
            "classes": len(self._names),
            "layers": layers,
            "heads": heads,
            "images": len(self._gallery.places),
        }

    def look(self, content: bytes) -> dict[str, Any]:
        """What the model sees in an image file.

        Maps are bytes in base64, (h, w) and (layers, heads, h, w), each relative to its
        own largest values.

        Raises:
          UserError: it is no image.
        """
        cfg, subject = self._subject.model.cfg, self._subject
        try:
            photo = image_files.read(content, cfg.channels)
        except image_files.ImageFileError as e:
            raise UserError(f"the file cannot be read: {e}") from e
        image = photos.prepare(photo, subject.about, subject.size)
        found = self._forward(image[None])
        answer: dict[str, Any] = {"picture": _png(to_uint8(image))}
        if self._names:
            p = subject.probabilities(found["logits"])
            best = np.argsort(-p, kind="stable")[:TOP]
            answer["top"] = [
                {"class": self._names[i], "probability": float(p[i])} for i in best
            ]
        if "heads" in found:
            grid = found["rollout"].shape
            answer["grid"] = list(grid)
            answer["rollout"] = _bytes(found["rollout"][None])
            answer["heads"] = _bytes(found["heads"].reshape(-1, *grid))
        if self._gallery.places:
            answer["near"] = self._nearest(found["features"])
        return answer

    def thumbnail(self, index: int) -> bytes:
        """JPEG of an image of the gallery. Raises: LookupError, UserError."""
        if index < 0:
            raise LookupError(index)
        image = Image.fromarray(photos.read(self._gallery.places[index]))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return _file(image, "JPEG")

    def _nearest(self, features: np.ndarray) -> list[dict[str, Any]]:
        similarity = self._gallery.vectors @ _unit(features)
        best = np.argsort(-similarity, kind="stable")[:NEAREST]
        name = lambda i: self._gallery.places[i].replace("\\", "/").split("/")[-1]
        return [
            {"index": int(i), "name": name(i), "similarity": float(similarity[i])}
            for i in best
        ]

    def _forward(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of one image, without the axis of the batch."""
        with self._lock:
            found = _look(self._model, self._attends, self._params, images)
        return {name: np.asarray(value[0]) for name, value in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    model: Any, attends: bool, params: Any, images: jax.Array
) -> dict[str, jax.Array]:
    """Logits and features (B, ...); where the model ``attends`` also how much each patch
    counts for the class token: rollout (B, h, w), and heads (B, layers, heads, h, w)."""
    found: Any = model.apply(
        {"params": params},
        inference.normalize(images),
        method="forward",
        mutable=["intermediates"],
    )
    (logits, out), state = found
    answer = {"logits": logits, "features": out["pre_logits"].astype(jnp.float32)}
    if not attends:
        return answer
    height, width = images.shape[1:3]
    grid, _ = attention.geometry(model, (height, width))
    seen = functools.partial(
        attention.token_map, grid=grid, class_token=models.has_class_token(model.cfg)
    )
    weights = attention.of(state["intermediates"])
    heads = jnp.stack([seen(w) for w in weights], axis=1)
    return answer | {"rollout": seen(attention.rollout(weights)), "heads": heads}


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)


def _bytes(maps: np.ndarray) -> str:
    """Maps (n, h, w) as levels 0..255, in base64."""
    levels = np.rint(attention.bounded(maps) * 255).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def _png(image: np.ndarray) -> str:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return f"data:image/png;base64,{base64.b64encode(_file(picture, 'PNG')).decode()}"


def _file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """The page on ``http://host:port``; port 0: a free one, which ``server_port`` tells.

    Raises:
      UserError: the port is taken, or there is no such address.
    """

    daemon_threads = True

    def __init__(self, viewer: Viewer, host: str = LOOPBACK[0], port: int = 7860):
        self.viewer, self.host = viewer, host
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(
                f"--host={host} --port={port} cannot be listened on: {reason}"
            ) from e


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self._foreign():
            self._send(403, "text/plain", b"open the page by its own address")
        elif self.path == "/":
            page = Path(__file__).with_name("app.html").read_bytes()
            self._send(200, "text/html; charset=utf-8", page)
        elif self.path == "/about":
            self._answer(self.server.viewer.about)
        elif self.path.startswith("/image/"):
            try:
                index = int(self.path.removeprefix("/image/"))
                self._send(200, "image/jpeg", self.server.viewer.thumbnail(index))
            except (LookupError, ValueError):  # a UserError is one
                self._send(404, "text/plain", b"no such image")
        else:
            self._send(404, "text/plain", b"no such page")

    def do_POST(self) -> None:
        """``/look`` with an image file as the body."""
        length = int(self.headers.get("Content-Length") or 0)
        if self._foreign() or self.path != "/look":
            self._send(403, "text/plain", b"photos go to /look")
        elif length > photos.LARGEST:
            self.close_connection = True  # nobody reads the rest
            text = f"the file is larger than {photos.LARGEST >> 20} MiB"
            self._send(413, "application/json", json.dumps({"error": text}).encode())
        else:
            content = self.rfile.read(length)
            self._answer(lambda: self.server.viewer.look(content))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who uses the page sees what happens."""

    def _foreign(self) -> bool:
        """Whether a page of someone else, whose name leads to this machine, asks."""
        name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        return self.server.host in LOOPBACK and name not in LOOPBACK

    def _answer(self, function: Any) -> None:
        try:
            status, value = 200, function()
        except UserError as e:
            status, value = 400, {"error": str(e)}
        text = json.dumps(cli.finite(value), allow_nan=False)
        self._send(status, "application/json", text.encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


def serve(
    source: str, images: str = "", host: str = LOOPBACK[0], port: int = 7860
) -> None:
    """Serves the page until it is interrupted.

    Raises:
      UserError: see :class:`Viewer` and :class:`Server`.
    """
    with Server(Viewer(source, images), host, port) as server:
        print(f"http://{host}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise UserError(
            f"give one SOURCE, not {len(arguments)} arguments: vit-jax app SOURCE"
        )
    f = flags.FLAGS
    serve(arguments[0], f.images, f.host, f.port)


def define_flags() -> None:
    flags.DEFINE_string(
        "images", "", "Show the nearest of these: a folder, a list, or embed's .npz."
    )
    flags.DEFINE_string(
        "host", LOOPBACK[0], "Address to listen on; 0.0.0.0: others may open the page."
    )
    flags.DEFINE_integer(
        "port", 7860, "Where to listen; 0: any free port.", lower_bound=0,
        upper_bound=65535,
    )  # fmt: skip
    flags.FLAGS.set_gnu_getopt()  # flags may follow the paths


if __name__ == "__main__":
    define_flags()
    cli.run(main)
