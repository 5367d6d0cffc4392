# SPDX-License-Identifier: Apache-2.0
"""A bucket that is not there: Google Cloud Storage's protocol, with latency and a link of
a certain speed, over shards whose bytes are made up when they are asked for.

    python tests/bucket.py          prints the table of docs/data.md, in minutes

The program reads ``gs://made-up/records`` as it would the real one; tensorstore takes the
address of this server from TENSORSTORE_GCS_HTTP_URL.
"""

import asyncio
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import struct
import tempfile
import time
import urllib.parse
import urllib.request

import google_crc32c
import numpy as np

ROOT = "gs://made-up/records"
LABELS = 10


def _masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def frames(size: int) -> list[bytes]:
    """One TFRecord per label, each of ``size`` bytes, with an image that says nothing."""
    from vit_jax.data.tensorflow_cpu import tf

    def record(label: int, padding: int) -> bytes:
        image = tf.io.encode_jpeg(np.full((16, 16, 3), 20 * label, np.uint8)).numpy()
        feature = {
            "image/encoded": tf.train.Feature(
                bytes_list=tf.train.BytesList(value=[image + b"\0" * padding])
            ),
            "image/class/label": tf.train.Feature(
                int64_list=tf.train.Int64List(value=[label])
            ),
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        return example.SerializeToString(deterministic=True)

    made = []
    for label in range(LABELS):
        padding = size - 16
        while len(data := record(label, padding)) > size - 16:
            padding -= len(data) - (size - 16)
        length = struct.pack("<Q", len(data))
        made.append(length + _masked(length) + data + _masked(data))
    return made


class Invented:
    """``records`` in ``shards`` files: shard i holds what is made of its number."""

    def __init__(self, records: int, shards: int, size: int):
        self.size, self.shards = size, shards
        cuts = np.arange(shards + 1) * records // shards
        self.counts = np.diff(cuts).tolist()
        period = b"".join(frames(size))
        self.period = len(period)
        self.bytes = memoryview(period * (2 + 2**23 // len(period)))
        self.sidecars = {count: self._sidecar(count) for count in set(self.counts)}
        self.whole = {"train.json": self._index("train", shards)}
        self.whole["test.json"] = self._index("test", 1)

    def names(self) -> list[str]:
        shards = [f"train-{i:05d}-of-{self.shards:05d}" for i in range(self.shards)]
        files = [f"{s}.tfrecord" for s in [*shards, "test-00000-of-00001"]]
        return sorted([*files, *(f + ".npz" for f in files), *self.whole])

    def get(self, name: str) -> tuple[int, bytes | None]:
        """Bytes of a file, and what it holds where that is not made up."""
        if name in self.whole:
            return len(self.whole[name]), self.whole[name]
        count = self.counts[int(name.split("-")[1])]
        if name.endswith(".npz"):
            return len(self.sidecars[count]), self.sidecars[count]
        return count * self.size, None

    def made_up(self, start: int, stop: int) -> memoryview | bytes:
        first = start % self.period
        if first + stop - start <= len(self.bytes):
            return self.bytes[first : first + stop - start]
        middle = start + len(self.bytes) - first
        return bytes(self.bytes[first:]) + bytes(self.made_up(middle, stop))

    def _sidecar(self, count: int) -> bytes:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            offsets=np.arange(count + 1) * self.size,
            labels=np.arange(count, dtype=np.int32) % LABELS,
            label_counts=np.ones(count, np.int32),
            bytes=np.array(count * self.size),
            fingerprint=np.array("invented"),
            left_out=np.array("[]"),
        )
        return buffer.getvalue()

    def _index(self, split: str, shards: int) -> bytes:
        entries = [
            {
                "file": f"{split}-{i:05d}-of-{shards:05d}.tfrecord",
                "examples": self.counts[i],
                "bytes": self.counts[i] * self.size,
                "fingerprint": "invented",
            }
            for i in range(shards)
        ]
        index = {
            "format": "tfrecord",
            "examples": sum(self.counts[:shards]),
            "multilabel": False,
            "class_names": [f"class {i}" for i in range(LABELS)],
            "shards": entries,
        }
        return json.dumps(index).encode()


class Connection(asyncio.Protocol):
    """Answers one request after the other, when latency and the link allow."""

    def __init__(self, server: "Server"):
        self.server, self.buffer = server, b""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:])
            answer, size, delayed = self.server.answer(lines[0].split()[1], headers)
            at = self.server.when(size) if delayed else 0
            asyncio.get_running_loop().call_at(at, self.send, answer)

    def send(self, answer: list) -> None:
        for part in answer:
            self.transport.write(part)


class Server:
    def __init__(self, objects: Invented, latency: float, speed: float):
        self.objects, self.latency, self.speed = objects, latency, speed
        self.names = objects.names()
        self.free, self.requests, self.sent = 0.0, 0, 0

    def when(self, size: int) -> float:
        """When an answer has arrived whose request comes now."""
        now = asyncio.get_running_loop().time()
        begin = max(now + self.latency, self.free)
        self.free = begin + size / self.speed
        return self.free

    def answer(self, target: str, headers: dict) -> tuple[list, int, bool]:
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/set":  # not part of the protocol: what the script asks for
            self.latency, self.speed = float(query["latency"]), float(query["speed"])
            found = json.dumps({"requests": self.requests, "bytes": self.sent}).encode()
            self.requests = self.sent = 0
            return _http("200 OK", found), 0, False
        self.requests += 1
        name = urllib.parse.unquote(url.path.split("/o/", 1)[-1])
        name = name.removeprefix("records/")
        if url.path.endswith("/o"):
            return _http("200 OK", self.list(query)), 0, True
        try:
            size, content = self.objects.get(name)
        except (ValueError, IndexError):
            return _http("404 Not Found", b"{}"), 0, True
        start, stop = _range(headers.get("range", "bytes=0-"), size)
        if start >= size:
            return _http("416 Requested Range Not Satisfiable", b""), 0, True
        made = self.objects.made_up(start, stop) if content is None else None
        body = content[start:stop] if made is None else made
        self.sent += len(body)
        extra = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        return _http("206 Partial Content", body, extra), len(body), True

    def list(self, query: dict) -> bytes:
        """A page of a thousand names, as the real one."""
        begin = int(query.get("pageToken", 0))
        page = self.names[begin : begin + 1000]
        found = {"items": [{"name": f"records/{name}"} for name in page]}
        if begin + 1000 < len(self.names):
            found["nextPageToken"] = str(begin + 1000)
        return json.dumps(found).encode()


def _range(text: str, size: int) -> tuple[int, int]:
    first, last = text.removeprefix("bytes=").split("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def _http(status: str, body, extra: str = "") -> list:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n"
        f'x-goog-generation: 1\r\netag: "1"\r\n{extra}\r\n'
    )
    return [head.encode(), body]


def serve(connection, size: tuple, latency: float, speed: float) -> None:
    """Sends the port, and serves until it is stopped."""

    async def run() -> None:
        server = Server(Invented(*size), latency, speed)
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
        connection.send(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    asyncio.run(run())


class Bucket:
    """A running server."""

    def __init__(self, url: str):
        self.url = url

    def set(self, latency: float = 0.0, speed: float = 1e12) -> dict[str, int]:
        """Changes what the bucket can do; ``requests`` and ``bytes`` since the last
        call."""
        query = f"{self.url}/set?latency={latency}&speed={speed}"
        with urllib.request.urlopen(query) as stream:
            return json.load(stream)


@contextlib.contextmanager
def bucket(records: int, shards: int, size: int, latency=0.0, speed=1e12):
    """A bucket in a process of its own; this process reads it as ``ROOT``."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    arguments = (there, (records, shards, size), latency, speed)
    process = spawn.Process(target=serve, args=arguments, daemon=True)
    process.start()
    try:
        url = f"http://127.0.0.1:{here.recv()}"
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
        yield Bucket(url)
    finally:
        os.environ.pop("TENSORSTORE_GCS_HTTP_URL", None)
        process.kill()
        process.join()


# ------------------------------------------------------------------------- the table

SPEED = 200e6  # bytes per second that the link of a host carries
BATCH, HOSTS, CPUS = 4096, 16, 112
# So that this machine does not limit what a bucket allows, the bucket takes so many times
# as long.
SLOWER = 5
# Milliseconds of a step on a v5e slice with 16 hosts (docs/kernel.md).
STEP_MS = {"B/16": 50.0, "L/16": 199.6}
SIZES = {"originals": 110_000, "shrunk": 29_000}
IMAGENET, FEW = (1_281_167, 1_000), (4_096, 4)  # records, shards
ROWS = [  # access, what is on the disk, the set, steps
    ("sequential", "none", IMAGENET, 32),
    ("sequential", "cold", IMAGENET, 32),
    ("sequential", "warm", IMAGENET, 32),
    ("random", "none", IMAGENET, 40),
    ("random", "warm", FEW, 32),
]


def draws(cfg, host: int = 5):
    """What fetches the records of a step on one host of many, and decodes nothing."""
    from vit_jax.data import order, records

    split = records.load(cfg).train
    rows = np.arange(BATCH // HOSTS) + host * BATCH // HOSTS
    if split.sequence:
        reader = split.sequence(rows, BATCH, 0)
        return lambda step: reader.draw(step, {})
    return lambda step: split.read(
        order.train_indices(step * BATCH + rows, len(split), 0)
    )


def measure(connection, url: str, link: dict, access: str, disk: str, steps: int):
    """Images per second that reach a host which does nothing else with them, on the
    slowed clock of ``link``."""
    from vit_jax.config import DataConfig
    from vit_jax.data import storage

    slower = SPEED / link["speed"]
    storage.WANTED *= CPUS / (os.cpu_count() or 1) / slower
    cfg = DataConfig(source="records", path=ROOT, access=access, disk_cache=disk)
    draw = draws(cfg)
    draw(0)
    Bucket(url).set(**link)
    started, used = time.monotonic(), time.process_time()
    for step in range(1, steps + 1):
        draw(step)
    seconds = time.monotonic() - started
    seen = Bucket(url).set(**link)
    images = steps * BATCH // HOSTS
    connection.send(
        {
            "rate": slower * images / seconds,
            "requests": seen["requests"] / images,
            "megabytes": seen["bytes"] / images / 1e6,
            "cpu_ms": 1e3 * (time.process_time() - used) / images,
        }
    )


def apart(function, *arguments):
    """What a function sends, in a new process."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=function, args=(there, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def row(kind: str, latency: float, access: str, disk: str, size: tuple, steps: int):
    """A line of the table. From a disk at the speed of this machine, which limits it;
    from the bucket so many times slower."""
    slow = {"latency": SLOWER * latency, "speed": SPEED / SLOWER}
    link = {"latency": latency, "speed": SPEED} if disk == "warm" else slow
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bucket(*size, SIZES[kind], **slow)).url
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        kept = "" if disk == "none" else folder
        if disk == "warm":  # with what is read ahead at the end
            apart(measure, url, slow, access, kept, steps + 32)
            Bucket(url).set(**link)
        m = apart(measure, url, link, access, kept, steps)
    rate, starve = m["rate"], []
    for model, ms in STEP_MS.items():
        enough = rate >= BATCH / HOSTS / ms * 1e3
        starve.append(f"{model} {0 if enough else HOSTS} of {HOSTS}")
    print(
        f"| {kind} | {1e3 * latency:.0f} | {access} | {disk} | {rate:,.0f} | "
        f"{rate * m['requests']:,.1f} | {rate * m['megabytes']:,.0f} | {m['cpu_ms']:.2f} | "
        f"{', '.join(starve)} |",
        flush=True,
    )  # fmt: skip


def main() -> None:
    print(
        "| images | ms per read | access | local disk | images/s | requests/s | MB/s | "
        "CPU ms per image | hosts that starve |\n" + 9 * "|---" + "|"
    )
    for kind, latency, case in itertools.product(SIZES, (0.005, 0.05), ROWS):
        row(kind, latency, *case)


if __name__ == "__main__":
    main()
