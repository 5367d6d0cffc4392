# SPDX-License-Identifier: Apache-2.0
"""Which example comes at which position: pure functions of (seed, position), no state.

A position is ``step * batch + row`` of the global batch. Everything random about an
example follows from (seed, position), so a run resumes with the step number alone and
gives the same bits on any number of processes. The permutation of an epoch is computed
value by value (a Feistel network on the smallest even number of bits, walked until it
lands inside the range): it takes no memory and no time to seek, for 1,000 or 300
million examples.
"""

import numpy as np

_ROUNDS = 6


def hash64(*values: int | np.ndarray) -> np.ndarray:
    """Mixes integers (broadcast against each other) into uniform uint64."""
    state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for value in values:
        value = np.atleast_1d(np.asarray(value)).astype(np.uint64)
        state = _mix((state ^ value) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permutation(index: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """Where ``index`` (int64, in [0, size)) goes under the permutation named ``key``.

    ``key`` is an integer or one uint64 per index, so that one call can serve several
    epochs.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    key = np.atleast_1d(np.asarray(key).astype(np.uint64))  # overflow warns in scalars
    subkeys = [_mix(key + np.uint64(i)) for i in range(_ROUNDS)]
    subkeys = [np.broadcast_to(s, np.shape(index)) for s in subkeys]
    result = np.asarray(index).astype(np.uint64)
    todo = np.arange(result.size)
    while todo.size:
        left, right = result[todo] >> shift, result[todo] & mask
        for subkey in subkeys:
            left, right = right, left ^ (_mix(right ^ subkey[todo]) & mask)
        result[todo] = (left << shift) | right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def train_indices(position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The example at each position: every example once in ``size`` positions."""
    epoch, index = np.divmod(np.asarray(position, np.int64), size)
    return permutation(index, size, hash64(seed, 0x6F72646572, epoch))


def substitutes(position: np.ndarray, size: int, seed: int, attempt: int) -> np.ndarray:
    """What stands in for an unreadable example at ``position``, attempt by attempt."""
    drawn = hash64(seed, 0x737562, attempt, np.asarray(position, np.int64))
    return (drawn % np.uint64(size)).astype(np.int64)


def augmentation_seeds(position: np.ndarray, seed: int) -> np.ndarray:
    """int64 (n, 2) seeds for tensorflow's stateless random operations."""
    position = np.asarray(position, np.int64)
    pair = [hash64(seed, 0x617567, i, position) for i in range(2)]
    return np.stack(pair, axis=-1).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
