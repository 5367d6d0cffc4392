# SPDX-License-Identifier: Apache-2.0
"""Several processes meet, notice when one is gone, and end together.

JAX ends a process from C++ (SIGABRT, a page of stack) when a peer never comes or is
lost, and names nobody. So every process first connects to process 0, and keeps that
connection. A message is a line: ``vit_jax N ID`` introduces either end, ``missing ID
...`` says who did not come, ``alive`` is sent every few seconds, and ``end ID STATUS``
when a process has ended.
"""

import contextlib
import os
import socket
import sys
import threading
import time

from vit_jax.errors import PREEMPTED, UserError

# Seconds that a process has to report its own error, once a peer has failed.
GRACE = 5.0
# Seconds between two signs of life; of silence before a peer is named; and how often
# that may come before it counts as lost. JAX loses patience after 100 s.
PULSE, QUIET, LOST = 5.0, 30.0, 3
_GONE = -1  # in place of the exit status of a process that did not live to tell it


class Peers:
    """The connections of one process: to process 0, or to all others."""

    def __init__(self, coordinator: str, num_processes: int, process_id: int):
        self._host, _, port = coordinator.rpartition(":")
        if not self._host or not port.isdigit():
            raise UserError(
                f"--coordinator={coordinator!r} must be HOST:PORT of process 0"
            )
        self._host, self._port = self._host.strip("[]"), int(port)
        self._n, self._me = num_processes, process_id
        self._name = f"process {process_id} of {num_processes}"
        self._sockets: dict[int, socket.socket] = {}  # by id of the peer
        self._readers: list[threading.Thread] = []
        self._leaving = False
        self._stopping = threading.Lock()

    def meet(self, timeout: int) -> None:
        """Returns when all are there.

        Raises:
          UserError: some did not come within ``timeout`` seconds; it says which.
        """
        where = f"{self._host}:{self._port}"
        print(f"{self._name}: waiting for the others at {where} (at most {timeout} s)")
        sys.stdout.flush()
        join = self._join if self._me else self._gather
        if missing := join(time.monotonic() + timeout):
            raise UserError(
                f"{self._name} is alone: process {', '.join(missing)} did not come within "
                f"{timeout} s. Start the same command on every host, each with its own "
                f"--process_id, see that {where} is open to all and that process 0 is what "
                "answers there, or raise --process_timeout"
            )

    def _gather(self, deadline: float) -> list[str]:
        """Process 0: waits for every other, and tells them all who is missing."""
        hello = {f"vit_jax {self._n} {i}": i for i in range(1, self._n)}
        with _listen(self._host, self._port) as server:
            while len(self._sockets) < len(hello) and time.monotonic() < deadline:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                with contextlib.suppress(OSError):
                    peer = server.accept()[0]
                    peer.settimeout(5)
                    if i := hello.get(_read(peer)):
                        _send(peer, f"vit_jax {self._n} 0")
                        # If it was started again, in place of its former self.
                        self._sockets[i] = peer
                    else:
                        peer.close()
        missing = [str(i) for i in hello.values() if i not in self._sockets]
        self._tell(" ".join(["missing", *missing]))
        return missing

    def _join(self, deadline: float) -> list[str]:
        """Any other process: connects to process 0 until it answers."""
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                peer = socket.create_connection((self._host, self._port), timeout=5)
                _send(peer, f"vit_jax {self._n} {self._me}")
                if _read(peer) == f"vit_jax {self._n} 0":
                    # Process 0 may be a little late.
                    peer.settimeout(max(deadline - time.monotonic(), 0) + GRACE)
                    word, *missing = _read(peer).split(" ")
                    if word == "missing":
                        self._sockets[0] = peer
                        return missing
                peer.close()  # process 0 is started again, or it is something else
            time.sleep(0.2)
        return ["0"]

    def watch(self) -> None:
        """From now on, ends this process when another one fails or is gone."""
        for i, peer in self._sockets.items():
            peer.settimeout(QUIET)
            # Otherwise the last line may wait for the one before to be acknowledged, and
            # is dropped if this process ends meanwhile.
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = threading.Thread(target=self._hear, args=(i, peer), daemon=True)
            self._readers.append(reader)
        for thread in (
            *self._readers,
            threading.Thread(target=self._pulse, daemon=True),
        ):
            thread.start()

    def _pulse(self) -> None:
        while not self._leaving:
            self._tell("alive")
            time.sleep(PULSE)

    def _hear(self, i: int, peer: socket.socket) -> None:
        silent = 0
        while silent < LOST:
            try:
                line = _read(peer)
            except TimeoutError:
                silent += 1
                _say(
                    f"warning: {self._name} has heard nothing from process {i} for "
                    f"{silent * QUIET:.0f} s: is it stopped?"
                )
                continue
            silent = 0 if line else LOST
            if line.startswith("end "):
                ended, status = map(int, line.split(" ")[1:])
                if status not in (0, PREEMPTED):
                    self._stop(ended, status)
                return
        self._stop(i, _GONE)

    def _stop(self, ended: int, status: int) -> None:
        # Each peer has a thread, and several may hear of the same end: one says it.
        if self._leaving or not self._stopping.acquire(blocking=False):
            return
        self._tell(f"end {ended} {status}")
        if status == _GONE:
            status = PREEMPTED
            what = f"lost contact with process {ended}: start the same command on every"
            what += " host again to continue from the last checkpoint"
        else:
            # What went wrong there may go wrong here as well: then say that instead.
            time.sleep(GRACE)
            what = (
                f"stopped because process {ended} did, with exit status {status}: see"
            )
            what += " its output"
        _say(f"error: {self._name} {what}")
        os._exit(status)

    def leave(self, status: int) -> None:
        """Tells the others how this process ends; returns only if that is well."""
        self._leaving = True
        self._tell(f"end {self._me} {status}")
        if status not in (0, PREEMPTED):
            # JAX's service ends with process 0, and would take the others with it.
            for reader in self._readers if self._me == 0 else ():
                reader.join(2 * GRACE)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _tell(self, message: str) -> None:
        for peer in list(self._sockets.values()):
            _send(peer, message)


def _listen(host: str, port: int) -> socket.socket:
    """At the coordinator's address. Everywhere only if that is not this host's own: a
    translated one, or 127.0.1.1, which Debian gives to the name of a host."""
    try:
        family, *_, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not at[0].startswith("127.0.1."):
            with contextlib.suppress(OSError):
                return socket.create_server(at[:2], family=family, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as e:
        raise UserError(
            f"--coordinator={host}:{port}: process 0 cannot use it: {e.strerror}"
        ) from e


def _send(peer: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # it is gone; whoever reads from it will notice
        peer.sendall(f"{message}\n".encode())


def _read(peer: socket.socket) -> str:
    """The next line; "" if there is none to come.

    Raises:
      TimeoutError: not within the time-out of the socket.
    """
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 65536 and (byte := peer.recv(1)):
            line += byte
    except ConnectionError:
        return ""
    return line.decode(errors="replace").rstrip("\n")


def _say(message: str) -> None:
    os.write(2, f"{message}\n".encode())
