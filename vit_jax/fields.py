# SPDX-License-Identifier: Apache-2.0
"""What a field of a config may be, and how a value from outside becomes one.

A field is a type, perhaps with a :class:`Range`: ``Annotated[float, Range(0, 1)]``. The
options of evaluators, transforms and other functions are read the same way.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from vit_jax.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers that a field allows, ``low`` and ``high`` included unless they are
    ``above`` the one or ``below`` the other."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Amount = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]  # of a moving average


@dataclass(frozen=True)
class Named:
    """A list of groups of options, of which one called ``key`` names each: a name alone
    stands for a group, and the command line may write several as ``a,b``."""

    key: str

    def groups(self, value: Any) -> Any:
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, (list, tuple)):
            return value
        single = [v.split(",") if isinstance(v, str) else [v] for v in value]
        flat = [v for part in single for v in part]
        return tuple({self.key: v.strip()} if isinstance(v, str) else v for v in flat)


# What other projects call some of our fields.
_ALIASES = {
    "lr": "learning_rate", "wd": "weight_decay", "bs": "batch", "batchsize": "batch",
    "imgsize": "image_size", "momentum": "b1", "ema": "polyak", "epochs": "steps",
}  # fmt: skip


def nearest(value: str, allowed: typing.Iterable[str]) -> str:
    """``did you mean 'x'? `` where something is close, else nothing; for error messages.

    Only letters and digits count: ``vit_b16`` is ``ViT-B/16``.
    """
    plain = lambda text: re.sub(r"[\W_]", "", str(text)).lower()
    names = {plain(name): name for name in allowed}
    wanted = plain(_ALIASES.get(plain(value), value))
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"did you mean {names[close[0]]!r}? " if close else ""


def choose(what: str, value: str, allowed: Mapping[str, Any]) -> Any:
    """``allowed[value]``, or a UserError that names the knob, the value and the choices."""
    if value not in allowed:
        raise UserError(
            f"unknown {what} {value!r}: {nearest(value, allowed)}choose one of {sorted(allowed)}"
        )
    return allowed[value]


def arguments(
    function: Callable[..., Any], given: Mapping[str, Any], knob: str
) -> dict[str, Any]:
    """``given`` as keyword arguments of ``function``, converted like fields are.

    Names, types and ranges are those of its keyword-only parameters and their
    annotations, for example ``def flip(image, seed, *, p: Share = 0.5)``.

    Raises:
      UserError: an unknown or missing option, a wrong type, or a value that is not
        allowed; it begins with ``knob``.
    """
    parameters = {
        k: p
        for k, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    for key in given:
        if key not in parameters:
            raise UserError(
                f"{knob} has the unknown option {key!r}: {nearest(str(key), parameters)}"
                f"it takes {sorted(parameters)}"
            )
    missing = [
        k for k, p in parameters.items() if p.default is p.empty and k not in given
    ]
    if missing:
        raise UserError(f"{knob} needs the option {missing[0]!r}")
    hints = typing.get_type_hints(function, include_extras=True)
    return {k: _convert(hints.get(k, Any), v, f"{knob}.{k}") for k, v in given.items()}


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """A frozen dataclass of fields as above from a mapping, which ``path`` stands for in
    messages.

    Raises:
      UserError: unknown key (with the nearest valid one), wrong type, or a value that
        is not among the choices.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in hints:
            raise UserError(
                f"unknown key {path}.{key}: {nearest(str(key), hints)}"
                f"{path} has {sorted(hints)}"
            )
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the field's type; JSON and ConfigDict turn tuples into lists, which
    is undone here."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if getattr(value, "shape", None) == ():  # one number of numpy's
        value = value.item()
    if hint is Any:
        return _plain(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not hasattr(value, "items"):
            raise UserError(f"{path} is {value!r}: it must be a group of keys")
        return build(hint, dict(value.items()), path)
    if origin is Annotated and isinstance(args[1], Named):
        return _convert(args[0], args[1].groups(value), path)
    if origin is Annotated:
        value = _convert(args[0], value, path)
        if value not in args[1]:
            raise UserError(f"{path} is {value!r}: it must be {args[1]}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_one(args, value, path)
    if origin is Literal:
        if value not in args:
            near = nearest(str(value), args)
            raise UserError(f"{path} is {value!r}: {near}choose one of {sorted(args)}")
        return value
    if origin in (tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} is {value!r}: it must be a list")
        if origin is Sequence or args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise UserError(f"{path} is {value!r}: it must have {len(args)} entries")
        return tuple(
            _convert(a, v, f"{path}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin in (dict, Mapping):
        if not hasattr(value, "items"):
            raise UserError(f"{path} is {value!r}: it must be a group of keys")
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not hint:
        raise UserError(
            f"{path} is {value!r} of type {type(value).__name__}: "
            f"it must be of type {hint.__name__}"
        )
    if hint is float and not math.isfinite(value):
        raise UserError(f"{path} is {value!r}: it must be finite")
    return value


def _convert_to_one(hints: Sequence[Any], value: Any, path: str) -> Any:
    """``value`` as the first of several types that takes it."""
    problems = []
    for hint in hints:
        try:
            return _convert(hint, value, path)
        except UserError as e:
            problems.append(str(e).removeprefix(f"{path} is {value!r}: "))
    raise UserError(f"{path} is {value!r}: {', or '.join(problems)}")


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {k: _plain(v) for k, v in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
