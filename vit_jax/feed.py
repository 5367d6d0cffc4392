# SPDX-License-Identifier: Apache-2.0
"""Batches from the host to the devices, ahead of use."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

AHEAD = 2  # batches on the device beyond the one in use: enough to hide the copy, little memory


def put(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """This process's rows -> global arrays divided over the mesh along their first axis."""
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }


class Feed:
    """Iterates over device batches that a background thread prepares.

    ``waited`` is the time in seconds that the consumer spent waiting for data so far.
    An exception of the source is raised in the consumer.
    """

    def __init__(
        self,
        source: Iterator[Mapping[str, np.ndarray]],
        sharding: NamedSharding,
        patience: float = 30.0,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ):
        self.waited = 0.0
        self._patience = patience
        self._on_wait = on_wait
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(source, sharding), daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=self._patience)
                break
            except queue.Empty:
                self._on_wait(time.perf_counter() - start)
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread; a batch under way is finished and dropped."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(timeout=10)

    def _fill(self, source: Iterator[Any], sharding: NamedSharding) -> None:
        try:
            for batch in source:
                if not self._offer(put(batch, sharding)):
                    return
            self._offer(StopIteration())
        except BaseException as e:  # raised again where the batch is asked for
            self._offer(e)

    def _offer(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
