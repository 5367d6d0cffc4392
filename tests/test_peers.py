# SPDX-License-Identifier: Apache-2.0
"""Processes that meet and end together."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_jax import peers
from vit_jax.errors import UserError
from vit_jax.peers import Peers

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def told(ids, n, timeout, port):
    """What processes ``ids`` of ``n`` are told by the meeting, by id."""
    said = {}

    def one(i):
        peer = Peers(f"127.0.0.1:{port}", n, i)
        try:
            peer.meet(timeout)
            said[i] = "all here"
        except UserError as e:
            said[i] = str(e)
        finally:
            for connection in peer._sockets.values():
                connection.close()

    threads = [threading.Thread(target=one, args=(i,)) for i in ids]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return said


@pytest.mark.heavy
def test_all_processes_hear_who_is_missing(capsys):
    said = told([1, 0], 4, 1, free_port())
    assert len(said) == 2
    assert all("process 2, 3 did not come within 1 s" in m for m in said.values()), said


@pytest.mark.heavy
def test_processes_meet_in_any_order_and_strangers_are_ignored(capsys):
    port = free_port()

    def bother():
        for line in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"vit_jax 3 7\n",
            b"vit_jax 4 1\n",
            b"",
        ):
            for _ in range(50):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port)) as s,
                ):
                    s.sendall(line)
                    break
                time.sleep(0.02)

    stranger = threading.Thread(target=bother)
    stranger.start()
    assert told([2, 0, 1], 3, 20, port) == dict.fromkeys(range(3), "all here")
    stranger.join()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "line", [b"Ubuntu-3\n", b"missing\n", b"vit_jax 3 0\n", b"vit_jax 2 1\n", b"\xff\n"]
)
def test_a_stranger_is_not_process_0(capsys, line):
    """Another service at that address, or another run, whatever it says next."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as peer:
                        peer.sendall(line + b"missing\n")
                        peer.recv(100)

        threading.Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        (message,) = told([1], 2, 1, port).values()
        server.shutdown(socket.SHUT_RDWR)
    assert "process 0 did not come within 1 s" in message
    assert "process 0 is what answers there" in message


def test_it_listens_no_wider_than_the_address():
    with peers._listen("127.0.0.1", free_port()) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        with pytest.raises(
            UserError,
            match=f"127.0.0.1:{port}: process 0 cannot use it: Address already",
        ):
            Peers(f"127.0.0.1:{port}", 2, 0).meet(1)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1234", "localhost:x"])
def test_a_bad_address_is_named(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        Peers(address, 2, 0)


# What a process does once it has met the others: {me: action}.
PROGRAM = """
import os, signal, sys, time
from vit_jax import peers
peers.PULSE, peers.QUIET, peers.LOST, peers.GRACE = 0.05, 1.0, 2, 0.2
port, n, me, action = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
group = peers.Peers(f"127.0.0.1:{port}", n, me)
group.meet(60)
group.watch()
if action == "vanish":
    os._exit(0)
if action == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if action.isdigit():
    group.leave(int(action))
    sys.exit(int(action))
time.sleep(1.5 if action == "finish" else 60)
group.leave(0)
"""


def end_together(*actions):
    """[(exit status, standard error)] of processes that do this after their meeting."""
    port, n = str(free_port()), str(len(actions))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, n, str(i), action],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i, action in enumerate(actions)
    ]  # fmt: skip
    stays = [
        p for p, action in zip(processes, actions, strict=True) if action == "stop"
    ]
    said = [p.communicate(timeout=60)[1] for p in processes if p not in stays]
    statuses = [p.returncode for p in processes if p not in stays]
    for p in stays:
        p.kill()
        p.communicate()
    return list(zip(statuses, said, strict=True))


def lost(me, n, other):
    return (
        f"error: process {me} of {n} lost contact with process {other}: start the same "
        "command on every host again to continue from the last checkpoint\n"
    )


@pytest.mark.process
def test_an_error_of_one_process_ends_the_others_with_its_status():
    ends = end_together("wait", "2", "wait")
    for me in (0, 2):
        assert ends[me] == (
            2,
            f"error: process {me} of 3 stopped because process 1 did, with exit status "
            "2: see its output\n",
        )
    assert ends[1] == (2, "")


@pytest.mark.process
def test_an_error_of_process_0_waits_for_the_others():
    ends = end_together("1", "wait")
    assert [status for status, _ in ends] == [1, 1]
    assert "stopped because process 0 did, with exit status 1" in ends[1][1]


@pytest.mark.process
def test_ends_that_are_well_end_nobody():
    assert end_together("finish", "0", "75", "finish") == [
        (0, ""), (0, ""), (75, ""), (0, ""),
    ]  # fmt: skip


@pytest.mark.process
def test_all_hear_of_a_process_that_is_gone():
    ends = end_together("wait", "wait", "vanish")
    assert [end for end in ends if end[0]] == [(75, lost(i, 3, 2)) for i in (0, 1)]


@pytest.mark.process
def test_a_process_that_is_stopped_is_named_and_then_given_up():
    """Its connection stays: the system of a stopped process keeps it alive."""
    ((status, said),) = end_together("wait", "stop")
    assert status == 75
    for seconds in (1, 2):
        warning = f"has heard nothing from process 1 for {seconds} s: is it stopped?"
        assert f"warning: process 0 of 2 {warning}\n" in said
    assert said.endswith(lost(0, 2, 1))
