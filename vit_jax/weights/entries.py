# SPDX-License-Identifier: Apache-2.0
"""Entries of a JSON file of strangers: each is read by a function that says what it must
be, and an error names the file and the entry."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.errors import UserError

Get = Callable[..., Any]

# Activations as torch's config files call them -> ModelConfig.gelu.
GELU = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
    "quickgelu": "quick",
}


def field(
    values: Mapping[str, Any],
    key: str,
    default: Any,
    convert: Callable[[Any], Any],
    where: str,
) -> Any:
    """``convert(values[key])``; null and no entry are both the default.

    Raises:
      UserError: naming an entry that cannot be converted.
    """
    value = values.get(key)
    if value is None:
        return default
    try:
        return convert(value)
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as e:
        raise UserError(f"{where}: {key} is {value!r:.60}: {e}") from e


def count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("it must be a whole number above 0")
    return value


def whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("it must be a whole number, 0 or more")
    return value


def positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError("it must be a number above 0")
    return float(value)


def epsilon(value: Any) -> float:
    if positive(value) >= 1:
        raise ValueError("it must be below 1")
    return float(value)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or two, in pixels."""
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or any(type(n) is not int or n < 1 for n in both):
        raise ValueError("it must be a side in pixels, or [height, width]")
    return both


def square(size: Any) -> int:
    height, width = pair(size)
    if height != width:
        raise ValueError("patches must be square")
    return height


def names(values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError("it must be a list")
    return tuple(str(name) for name in values)


def operations(values: Any) -> tuple[dict[str, Any], ...]:
    if not all(isinstance(t, dict) and isinstance(t.get("op"), str) for t in values):
        raise ValueError('it must be a list of operations such as {"op": "resize"}')
    return tuple(dict(t) for t in values)


def channels(value: Any) -> tuple[float, ...]:
    many = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if not all(math.isfinite(x) for x in many):
        raise ValueError("it must be finite")
    return tuple(float(x) for x in many)


def scales(value: Any) -> tuple[float, ...]:
    return tuple(
        map(positive, value if isinstance(value, (list, tuple)) else [value] * 3)
    )


def labels(values: Any) -> tuple[str, ...]:
    named = {int(k): str(v) for k, v in values.items()}
    found = tuple(named[i] for i in sorted(named))
    # What transformers writes where nobody gave names.
    return () if all(x == f"LABEL_{i}" for i, x in enumerate(found)) else found


def normalization(get: Get, mean: str, std: str) -> dict[str, Any]:
    half = (0.5,) * 3
    return {
        "image_mean": get(mean, half, channels),
        "image_std": get(std, half, scales),
    }
