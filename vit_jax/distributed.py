# SPDX-License-Identifier: Apache-2.0
"""Several processes: they meet, watch each other and stop together.

JAX ends a process from C++ (SIGABRT, a page of stack) when a peer never comes or is
lost. So the processes meet over one plain TCP connection each to process 0 first, which
can say who is missing, and keep it: when a process is gone, its connection closes, and
the others say so and exit at once instead of waiting in a collective operation.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from vit_jax.errors import UserError

PREEMPTED = 75  # exit status (EX_TEMPFAIL): start the same command again
GRACE = 5.0  # seconds that a process has to report its own error before it is stopped because of a peer's
_GONE = -1  # stands for the exit status of a process that did not live to tell it
_peers: "Peers | None" = None


def initialize(
    coordinator: str, num_processes: int, process_id: int, timeout: int
) -> None:
    """Connects this process to its peers. Does nothing for a single process.

    On TPU pods, SLURM and Kubernetes JAX finds the coordinator by itself; elsewhere all
    three flags are needed.

    Raises:
      UserError: flags that contradict each other, or peers that did not come within
        ``timeout`` seconds.
    """
    global _peers
    local_devices = None  # all
    if not coordinator and num_processes <= 0 and process_id < 0:
        coordinator, num_processes, process_id, local_devices = _detect(timeout)
    elif not coordinator or num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator={coordinator!r} --num_processes={num_processes} --process_id={process_id}: give all "
            "three, with --process_id from 0 to --num_processes - 1"
        )
    if num_processes == 1:
        return
    _peers = Peers(coordinator, num_processes, process_id)
    _peers.meet(timeout)
    _peers.watch()
    jax.distributed.initialize(
        coordinator, num_processes, process_id, local_devices,
        cluster_detection_method="deactivate", initialization_timeout=timeout,
    )  # fmt: skip


def leave(status: int) -> None:
    """Tells the peers with which exit status this process ends. Returns only if it
    ended well.

    After an error JAX would wait minutes for the peers, which in turn would wait for
    this process.
    """
    if _peers:
        _peers.leave(status)


def connected() -> bool:
    """Whether this is one of several processes."""
    return _peers is not None


def _detect(timeout: int) -> tuple[str, int, int, list[int] | None]:
    """What a TPU pod, SLURM or Kubernetes says about (coordinator, processes, own id,
    own devices).

    ``jax.distributed.initialize()`` does the same, but raises where there is just one
    process.
    """
    from jax._src import clusters

    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found = find(None, None, None, None, None, timeout)
    coordinator, num_processes, process_id, local_devices = found
    if not coordinator or not num_processes or process_id is None:
        return "", 1, 0, None
    return (
        coordinator,
        num_processes,
        process_id,
        list(local_devices) if local_devices else None,
    )


class Peers:
    """One connection between process 0 and every other. Messages are lines ``id
    status``: that process has ended."""

    def __init__(self, coordinator: str, num_processes: int, process_id: int):
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(
                f"--coordinator={coordinator!r} must be HOST:PORT of process 0"
            )
        self._address = (host.strip("[]"), int(port))
        self._n, self._me = num_processes, process_id
        self._name = f"process {process_id} of {num_processes}"
        self._sockets: dict[int, socket.socket] = {}  # by id of the peer
        self._leaving = False

    def meet(self, timeout: int) -> None:
        """Returns when all are there.

        Raises:
          UserError: some did not come within ``timeout`` seconds; it says which.
        """
        where = f"{self._address[0]}:{self._address[1]}"
        print(
            f"{self._name}: waiting for the others at {where} (at most {timeout} s)",
            flush=True,
        )
        deadline = time.monotonic() + timeout
        if self._me == 0:
            self._gather(deadline)
            missing = [i for i in range(1, self._n) if i not in self._sockets]
        else:
            missing = self._join(deadline)
        if missing:
            who = ", ".join(map(str, missing))
            hint = f" at {where} (is the port open?)" if missing == [0] else ""
            raise UserError(
                f"{self._name} is alone: process {who} did not come within {timeout} s{hint}. Start the same "
                "command on every host, each with its own --process_id, or raise --process_timeout"
            )

    def _gather(self, deadline: float) -> None:
        """Process 0: collects a connection from every other process, then tells them
        all who is missing."""
        try:
            server = _listen(self._address[1])
        except OSError as e:
            raise UserError(
                f"--coordinator: process 0 cannot use port {self._address[1]}: {e.strerror}"
            ) from e
        with server:
            while (
                len(self._sockets) < self._n - 1
                and (left := deadline - time.monotonic()) > 0
            ):
                server.settimeout(left)
                try:
                    peer = server.accept()[0]
                except TimeoutError:
                    break
                i = self._introduced(peer)
                former = self._sockets.pop(
                    i, peer
                )  # a process that was started again replaces its former self
                if i:
                    self._sockets[i] = peer
                if former is not peer or not i:
                    former.close()
        missing = [str(i) for i in range(1, self._n) if i not in self._sockets]
        for peer in self._sockets.values():
            _send(peer, f"missing {' '.join(missing)}\n")

    def _introduced(self, peer: socket.socket) -> int:
        """The id of the process that connected; 0 if it is none of this run."""
        peer.settimeout(5)
        hello = _read(peer).split()
        if (
            len(hello) == 3
            and hello[:2] == ["vit_jax", str(self._n)]
            and hello[2].isdigit()
        ):
            return int(hello[2]) if int(hello[2]) < self._n else 0
        return 0

    def _join(self, deadline: float) -> list[int]:
        """Any other process: connects to process 0 until it answers, and returns who is
        missing."""
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                peer = socket.create_connection(self._address, timeout=5)
                peer.settimeout(
                    max(deadline - time.monotonic(), 0) + GRACE
                )  # process 0 may be a little late
                _send(peer, f"vit_jax {self._n} {self._me}\n")
                if answer := _read(peer).split():
                    self._sockets[0] = peer
                    return [int(i) for i in answer[1:]]
                peer.close()  # process 0 was started again
            time.sleep(0.2)
        return [0]

    def watch(self) -> None:
        """From now on, ends this process when another one fails or is gone."""
        for peer in self._sockets.values():
            peer.settimeout(None)
            _keep_alive(peer)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for i, peer in self._sockets.items():
                selector.register(peer, selectors.EVENT_READ, i)
            while selector.get_map():
                for key, _ in selector.select():
                    ended, status = _read_end(self._sockets[key.data], key.data)
                    if status in (0, PREEMPTED) or self._leaving:
                        selector.unregister(key.fileobj)
                    else:
                        self._stop(ended, status)

    def _stop(self, ended: int, status: int) -> NoReturn:
        self._tell(f"{ended} {status}\n")
        if status == _GONE:
            _exit(
                f"{self._name} lost contact with process {ended}: start the same command on every host again to "
                "continue from the last checkpoint", PREEMPTED,
            )  # fmt: skip
        time.sleep(
            GRACE
        )  # whatever went wrong there may go wrong here as well: then say that instead
        _exit(
            f"{self._name} stopped because process {ended} did, with exit status {status}: see its output",
            status,
        )

    def leave(self, status: int) -> None:
        self._leaving = True
        self._tell(f"{self._me} {status}\n")
        if status in (0, PREEMPTED):
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if (
            self._me == 0
        ):  # JAX's service ends with this process, and would take the others with it
            deadline = time.monotonic() + 2 * GRACE
            for peer in self._sockets.values():
                peer.settimeout(max(deadline - time.monotonic(), 0.1))
                while _read(peer):
                    pass
        os._exit(status)

    def close(self) -> None:
        for peer in self._sockets.values():
            peer.close()

    def _tell(self, message: str) -> None:
        for peer in self._sockets.values():
            _send(peer, message)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _send(peer: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # it is gone; whoever reads from it will notice
        peer.sendall(message.encode())


def _read(peer: socket.socket) -> str:
    """The next line; "" if there is none to come."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < 65536 and (byte := peer.recv(1)):
            line += byte
    return line.decode(errors="replace") if line.endswith(b"\n") else ""


def _read_end(peer: socket.socket, i: int) -> tuple[int, int]:
    """(process, exit status) that peer ``i`` reports."""
    message = _read(peer).split()
    return (int(message[0]), int(message[1])) if message else (i, _GONE)


def _keep_alive(peer: socket.socket) -> None:
    """Notices within a minute that a host disappeared without closing its connections,
    where the system allows."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exit(message: str, status: int) -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    os.write(2, f"error: {message}\n".encode())
    os._exit(status)


class Preemption:
    """Notices SIGTERM (which schedulers and the TPU maintenance handler send) without
    interrupting anything.

    ``requested()`` answers the same on every process, so that all save the same step.
    Every process must call it equally often.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._calls = 0
        self._single = jax.process_count() == 1
        self._previous = None
        # With several processes JAX listens for the signal and agrees on the call at
        # which all answer yes.
        if threading.current_thread() is threading.main_thread() and self._single:
            self._previous = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.signalled = True

    def requested(self) -> bool:
        if not self._single and not self.signalled:
            self._calls += 1
            self.signalled = multihost_utils.reached_preemption_sync_point(self._calls)
        return self.signalled

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
