# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` files (``pytorch_model.bin``, ``.pth``, ``.pt``), without running them.

A pickle is a program that builds objects by calling whatever it names. Here it is only
disassembled (``pickletools``), and its instructions build plain dicts, lists and
descriptions of tensors. Nothing is imported or called: a name is a string, and one that
is not needed to describe tensors is refused.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import (
    MOST_ENTRIES,
    Array,
    Damaged,
    is_weight,
    parsing,
    require_memory,
    to_float32,
)

CONVERT = (
    "Write it as safetensors where PyTorch is installed: import torch, "
    "safetensors.torch; safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), 'model.safetensors')"
)
_LONGEST = 16 << 20  # bytes of the program; the values are not in it
_DEEPEST = 8  # dicts around the parameters
_STORAGES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "V2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_CALLED = re.compile(
    r"collections\.OrderedDict|torch\.Size"
    r"|torch\._utils\._rebuild_(tensor(_v2)?|parameter)"
)
# Training scripts save their arguments and best scores along: skipped, never built.
_SKIPPED = re.compile(
    r"argparse\.Namespace|torch\.(device|b?float\d*|half|double|u?int\d+|bool)"
    r"|numpy(\._?core)?\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)"
    r"|_codecs\.encode|torch\.serialization\._get_layout"
)
# Names that wrap every parameter of a model, from the outside in.
_WRAPPERS = ("module", "_orig_mod", "model", "state_dict", "backbone")


class _Name(str):
    """A class or function that the program names: module and name."""


class _Storage(NamedTuple):
    member: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Skipped:
    """Something that is not needed; takes whatever the program does to it."""


def program(names: list[str]) -> str:
    """The member that makes a zip a file of ``torch.save``; "" if there is none."""
    return next((n for n in names if PurePosixPath(n).name == "data.pkl"), "")


def read(
    archive: zipfile.ZipFile, size: int, tree: str, where: str
) -> tuple[dict[str, Array], list[str]]:
    """The arrays of a file of ``size`` bytes by torch's names, and notes.

    Args:
      archive: opened by ``npz.archive``.
      tree: which of several models, as in ``file.pth:teacher``; "": the only one.

    Raises:
      UserError: damaged, a program that does more than describe tensors, or several
        models.
    """
    main = program(archive.namelist())
    if archive.getinfo(main).file_size > _LONGEST:
        raise UserError(f"{where}: {main} is too large for a checkpoint")
    with parsing(where):
        tree_of_all = _Machine(where).run(archive.read(main))
    models = _models(tree_of_all)
    path = _chosen(models, tree, where)
    tensors, notes = _unwrapped(models[path])
    if path:
        notes.insert(0, f"read: the arrays under {path!r}")
    folder = str(PurePosixPath(main).parent)
    members = {m.filename: m for m in archive.infolist()}
    order = members.get(str(PurePosixPath(folder, "byteorder")))
    if order and archive.read(order) != b"little":
        raise UserError(
            f"{where} was not written on a little-endian machine. {CONVERT}"
        )
    arrays, total = {}, 0
    for name, tensor in tensors.items():
        member = members.get(str(PurePosixPath(folder, "data", tensor.storage.member)))
        if member is None:
            raise Damaged(f"{where}: the values of {name!r} are missing")
        total += member.file_size
        dtype, shape = np.dtype(tensor.storage.dtype), tensor.shape
        # A single number is kept: it may betray a family.
        if is_weight(name, dtype, shape, where) or not shape:
            arrays[name] = _array(archive, member, name, tensor, where)
    require_memory(total, size, where)
    return arrays, notes


class _Machine:
    """Runs the instructions that ``torch.save`` writes, on descriptions."""

    def __init__(self, where: str):
        self._where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, code: bytes) -> Any:
        simple: dict[str, Callable[[], Any]] = {
            "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
            "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
            "TUPLE1": lambda: tuple(self._pop(1)), "TUPLE2": lambda: tuple(self._pop(2)),
            "TUPLE3": lambda: tuple(self._pop(3)), "TUPLE": lambda: tuple(self._marked()),
            "BINPERSID": self._storage, "REDUCE": self._call, "NEWOBJ": self._call,
        }  # fmt: skip
        arg: Any
        for step, (op, arg, _) in enumerate(pickletools.genops(code)):
            if step > 10 * MOST_ENTRIES:
                raise ValueError("too many instructions for a checkpoint")
            name = op.name
            if name == "STOP":
                return self._stack.pop()
            if name in simple:
                self._stack.append(simple[name]())
            elif name == "MARK":
                self._marks.append(len(self._stack))
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                place = len(self._memo) if name == "MEMOIZE" else arg
                self._memo[place] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[arg])
            elif name in ("SETITEM", "SETITEMS"):
                self._set(self._pop(2) if name == "SETITEM" else self._marked())
            elif name in ("APPEND", "APPENDS"):
                values = self._pop(1) if name == "APPEND" else self._marked()
                if isinstance(self._stack[-1], list):
                    self._stack[-1].extend(values)
            elif name == "GLOBAL":
                self._stack.append(self._name(arg.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                self._stack.append(self._name(".".join(self._pop(2))))
            elif name == "BUILD":
                self._stack.pop()
            elif re.match(r"BININT|BINFLOAT|LONG1|(SHORT_)?BIN(UNICODE|BYTES)", name):
                self._stack.append(arg)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"an instruction {name}")
        raise ValueError("it ends too early")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise ValueError("more is taken than there is")
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return values

    def _marked(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Optimizer state has numbers for keys.
            if isinstance(target, dict) and isinstance(key, str):
                if len(key) > 200:
                    raise ValueError(f"a name of {len(key)} characters")
                if key in target:
                    raise ValueError(f"the name {key!r} twice")
                target[key] = value

    def _name(self, name: str) -> _Name:
        if name in _STORAGES or _CALLED.fullmatch(name) or _SKIPPED.fullmatch(name):
            return _Name(name)
        raise UserError(
            f"{self._where} is a pickle that asks for {name!r:.80}, which is not needed "
            f"for weights and never loaded, because it may run code. {CONVERT}"
        )

    def _storage(self) -> _Storage:
        kind, storage, member, _, _ = self._stack.pop()
        if kind != "storage":
            raise ValueError(f"a persistent {kind!r:.40}")
        return _Storage(str(member), _STORAGES[storage])

    def _call(self) -> Any:
        function, args = self._pop(2)
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise ValueError("a call of something that has no name")
        if function == "collections.OrderedDict":
            return dict(args[0]) if args else {}
        if function == "torch.Size":
            return tuple(args[0])
        if function == "torch._utils._rebuild_parameter":
            return args[0]
        if function.startswith("torch._utils._rebuild_tensor"):
            storage, offset, shape, strides, *_ = args
            numbers = (offset, *shape, *strides)
            if any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"a tensor of shape {shape!r:.40}")
            if not isinstance(storage, _Storage) or len(shape) != len(strides):
                raise ValueError("a tensor without values")
            return _Tensor(storage, offset, tuple(shape), tuple(strides))
        return _Skipped()


def _models(root: Any) -> dict[str, dict[str, _Tensor]]:
    """Path -> tensors of each dict that holds a kernel of four axes, as every ViT does.

    A dict that appears twice is looked at once, so that the time goes with the file.
    """
    models: dict[str, dict[str, _Tensor]] = {}
    part: dict[str, _Tensor] = {}  # one file of several may lack the patch embedding
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen or len(path) > _DEEPEST:
            continue
        seen.add(id(node))
        waiting += [((*path, key), value) for key, value in node.items()]
        tensors = {k: v for k, v in node.items() if isinstance(v, _Tensor)}
        if any(len(t.shape) == 4 for t in tensors.values()):
            models["/".join(path)] = tensors
        elif tensors and not path:
            part = tensors
    return models or ({"": part} if part else {})


def _chosen(models: dict[str, Any], tree: str, where: str) -> str:
    if tree in models:
        return tree
    if not models:
        raise UserError(
            f"{where} is a torch.save file without the weights of a Vision Transformer: "
            "none of its dicts has a patch embedding"
        )
    if len(models) > 1 or tree:
        names = sorted(models)
        raise UserError(
            f"{where} holds {'the models' if len(models) > 1 else 'one model,'} "
            f"{', '.join(map(repr, names))}: name one as '{where}:{names[-1]}'"
        )
    return next(iter(models))


def _unwrapped(tensors: dict[str, _Tensor]) -> tuple[dict[str, _Tensor], list[str]]:
    """Without the prefixes of DataParallel and of training scripts."""
    notes: list[str] = []
    while True:
        prefixes = {name.partition(".")[0] for name in tensors}
        found = next((w for w in _WRAPPERS if w in prefixes), "")
        inside = {
            name.partition(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{found}.")
        }
        if not found or not any(len(t.shape) == 4 for t in inside.values()):
            return tensors, notes
        if left := len(tensors) - len(inside):
            notes.append(f"ignored: {left} arrays beside {found!r}")
        tensors = inside


def _array(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    name: str,
    tensor: _Tensor,
    where: str,
) -> Array:
    """One tensor, checked against the bytes that its storage has."""
    dtype = np.dtype(tensor.storage.dtype)
    count = member.file_size // dtype.itemsize
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    size = math.prod(tensor.shape)
    if size > count or (size and tensor.offset + last >= count):
        raise Damaged(
            f"{where}: the array {name!r} claims shape {tensor.shape} of {dtype} but the "
            f"file holds {member.file_size} bytes for it: it is damaged"
        )
    strides = tuple(s * dtype.itemsize for s in tensor.strides)

    def values() -> np.ndarray:
        with parsing(f"{where}: the array {name!r}"):
            flat = np.frombuffer(archive.read(member), dtype, count)
            if not size:
                return np.zeros(tensor.shape, np.float32)
            view = np.lib.stride_tricks.as_strided(
                flat[tensor.offset :], tensor.shape, strides, writeable=False
            )
            return to_float32(view)

    return Array(name, tensor.shape, values)
