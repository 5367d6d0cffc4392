# SPDX-License-Identifier: Apache-2.0
"""Several processes as one: what they are called with, or a cluster says about them."""

import jax

from vit_jax.errors import UserError
from vit_jax.peers import Peers

_peers: Peers | None = None


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
