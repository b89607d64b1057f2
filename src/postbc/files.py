"""Trees: nested dictionaries and lists of tensors, arrays and plain values (a policy, a posterior, a checkpoint), each one file.

A file is safetensors, which any reader of that format opens; its header's metadata hold the structure as JSON and a SHA-256 over
header and data. It is written and read here, not by the library, because the bytes that are checked must be the bytes that become
tensors, in one pass, and because nothing may be allocated for a header that claims more than the file holds. What has to do with
no tensor is in `disk.py`, its names also here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postbc.disk import (
    atomic_path,
    blame,
    digest,
    os_errors,
    read_yaml,
    remove_leftovers,
    require_file,
    write_bytes,
    write_json,
    write_text,
)
from postbc.errors import InputError, require

__all__ = [
    "Tree",
    "atomic_path",
    "blame",
    "check_fields",
    "digest",
    "first_not_finite",
    "load_tree",
    "os_errors",
    "read_yaml",
    "remove_leftovers",
    "require_file",
    "save_tree",
    "write_bytes",
    "write_json",
    "write_text",
]

Tree = Any  # nested dicts and lists of tensors, arrays, numbers, text, booleans and None

_FORMAT, _HEADER_LIMIT, _DEPTH = "2", 100_000_000, 100
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U64": torch.uint64, "I32": torch.int32, "U32": torch.uint32, "I16": torch.int16, "U16": torch.uint16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save_tree(path: str | Path, tree: Tree) -> None:
    """Save a nested structure of tensors, arrays and plain values as one safetensors file, atomically.

    Raises:
        TypeError: something in it is none of these.
        InputError: the disk refuses.
    """
    tensors: dict[str, torch.Tensor] = {}

    def add(value: torch.Tensor, key: str) -> str:
        if value.dtype not in _NAMES:
            raise TypeError(f"{key}: numbers of kind {value.dtype} cannot be saved")
        while key in tensors:  # {"a/b": …, "a": {"b": …}}
            key += "'"
        tensors[key] = value.detach().to("cpu").contiguous()
        return key

    def encode(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            return {"@tensor": add(value, key)}
        if isinstance(value, np.ndarray):
            return {"@array": add(torch.from_numpy(np.array(value, order="C")), key)}
        if isinstance(value, Mapping):
            if not all(isinstance(k, (str, int)) for k in value):
                raise TypeError(f"{key}: keys must be text or integers, found {list(value)}")
            return {"@dict": [[k, encode(v, f"{key}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [encode(v, f"{key}/{i}") for i, v in enumerate(value)]
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{key}: a {type(value).__name__} cannot be saved")

    text, offset, header = json.dumps(encode(tree, "")), 0, dict[str, Any]()
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned to its own size
    for key, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header["__metadata__"] = {"format": _FORMAT, "tree": text}
    check = _checksum(header)
    for _, tensor in ordered:
        check.update(_bytes(tensor))
    header["__metadata__"]["sha256"] = check.hexdigest()
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _HEADER_LIMIT:
        raise TypeError(f"the structure is too large to be saved: {len(head):,} bytes beside the tensors")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, tensor in ordered:
            file.write(_bytes(tensor))


def load_tree(path: str | Path, device: str | torch.device = "cpu", kind: str | tuple[str, ...] | None = None) -> Tree:
    """Load what :func:`save_tree` wrote: tensors on `device`, arrays as arrays, tuples as lists.

    Args:
        kind: what the tree's "kind" must be, or one of them ("policy", "agent", "posterior", "checkpoint").

    Raises:
        InputError: missing, a pickle, truncated, damaged (checksum), foreign, of another kind or of another version.
    """
    path = require_file(path, "a .safetensors file that postbc wrote")
    with os_errors(path, "read"), open(path, "rb") as file:
        header = _read_header(path, file)
        metadata = header.get("__metadata__")
        metadata = metadata if isinstance(metadata, dict) else {}
        require(
            "tree" in metadata, "This safetensors file was not written by postbc.", file=path, key="header metadata 'tree'",
            found=", ".join(sorted(map(str, metadata)))[:200] or "none", remedy="give a policy or checkpoint file that postbc wrote",
        )  # fmt: skip
        require(
            metadata.get("format") == _FORMAT,
            "This file was written by an earlier postbc (0.1)." if "format" not in metadata
            else "This file was written by another version of postbc.", file=path,
            found=f"format {str(metadata.get('format', 1))[:20]}", expected=f"format {_FORMAT}",
            remedy="use that version to read it, or run the stage again with this one",
        )  # fmt: skip
        layout = _layout(path, header, os.fstat(file.fileno()).st_size - file.tell())
        check, tensors = _checksum(header), {}
        for key, dtype, shape in layout:
            tensor = torch.empty(shape, dtype=dtype)
            view = _bytes(tensor)
            if file.readinto(view) != len(view):  # it shrank while it was read
                raise _damaged(path, "it ends too early")
            check.update(view)
            tensors[key] = tensor
        require(
            check.hexdigest() == metadata.get("sha256"), "This file is damaged: its checksum is wrong.", file=path,
            remedy="use another copy or another checkpoint of the same run (checkpoints/), or run its stage again",
        )  # fmt: skip
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise _damaged(path, f"{key} holds truth values that are neither 0 nor 1")
    tree = _decode(path, metadata["tree"], tensors, device)
    if kind is not None:
        found, kinds = tree.get("kind") if isinstance(tree, dict) else None, (kind,) if isinstance(kind, str) else kind
        require(
            isinstance(found, str) and found in kinds, "This file holds something else.", file=path, key="kind",
            found=repr(found)[:100], expected=" or ".join(map(repr, kinds)), remedy=f"give a file that holds a {' or a '.join(kinds)}",
        )  # fmt: skip
    return tree


def check_fields(tree: Tree, kinds: Mapping[str, type | tuple[type, ...]], file: str | Path | None = None) -> None:
    """InputError unless `tree` is a dictionary that has every key of `kinds`, each of that type (True and False are no integers)."""
    what = "This file does not hold what is expected."
    require(isinstance(tree, dict), what, file=file, found=type(tree).__name__, expected="a dictionary")
    for key, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        value = tree.get(key)
        names = " or ".join("nothing" if k is type(None) else k.__name__ for k in allowed)
        require(
            (key in tree or type(None) in allowed) and isinstance(value, allowed)
            and (bool in allowed or not isinstance(value, bool)),
            what, file=file, key=key, found=type(value).__name__ if key in tree else "nothing", expected=names,
        )  # fmt: skip


def first_not_finite(tree: Tree, key: str = "") -> str | None:
    """Where in a tree the first tensor or array with a NaN or an infinite number stands; None if there is none."""
    if isinstance(tree, Mapping):
        return next((f for k, v in tree.items() if (f := first_not_finite(v, f"{key}/{k}"))), None)
    if isinstance(tree, (list, tuple)):
        return next((f for i, v in enumerate(tree) if (f := first_not_finite(v, f"{key}/{i}"))), None)
    if isinstance(tree, np.ndarray):
        return key if np.issubdtype(tree.dtype, np.floating) and not np.isfinite(tree).all() else None
    if isinstance(tree, torch.Tensor) and tree.is_floating_point():
        tree = tree if tree.element_size() > 1 else tree.float()
        return None if bool(torch.isfinite(tree).all()) else key
    return None


def _checksum(header: dict[str, Any]) -> Any:
    """A hash begun with the header, less the hash itself."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    return hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())


def _damaged(path: Path, found: str) -> InputError:
    return InputError(
        "This is not a readable checkpoint.", file=path, found=found, expected="a complete safetensors file",
        remedy="use another checkpoint of the same run (checkpoints/), or run its stage again",
    )  # fmt: skip


def _read_header(path: Path, file: Any) -> dict[str, Any]:
    """The header, read only if the file is as long as it says."""
    start = file.read(8)
    length, size = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size
    require(
        length <= size - 8 or not start.startswith((b"PK", b"\x80")),
        "This is a pickle (torch.save); loading one can run any code, so postbc never does.", file=path,
        expected="a safetensors file written by postbc",
        remedy="save the weights with safetensors, or pretrain again with `postbc pretrain`",
    )  # fmt: skip
    if len(start) < 8 or length > size - 8 or length > _HEADER_LIMIT:
        raise _damaged(path, "no header" if len(start) < 8 else f"a header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _damaged(path, f"a header that is not JSON: {str(error)[:100]}") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"a header that is a {type(header).__name__}")
    return header


def _layout(path: Path, header: dict[str, Any], size: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor in the order of the data, which they fill without gap or overlap (`size` bytes)."""
    found: list[tuple[int, int, str, torch.dtype, tuple[int, ...]]] = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        shape: Any = entry.get("shape")
        span: Any = entry.get("data_offsets")
        dtype: Any = _DTYPES.get(str(entry.get("dtype")))
        numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else None
        if not (dtype and numbers and len(numbers) <= 34 and all(type(n) is int and 0 <= n < 2**48 for n in numbers)):
            raise _damaged(path, f"{key[:100]}: an entry that describes no tensor")
        itemsize = torch.empty((), dtype=dtype).element_size()
        if span[0] + math.prod(shape) * itemsize != span[1] or math.prod(n for n in shape if n) >= 2**56:
            raise _damaged(path, f"{key[:100]}: its shape does not fit its size")
        found.append((span[0], span[1], key, dtype, tuple(shape)))
    end = 0
    for begin, stop, key, *_ in sorted(found, key=lambda item: item[:2]):
        if begin != end or stop > size:
            raise _damaged(path, f"{key[:100]}: not where the tensor before it ends")
        end = stop
    if end != size:
        raise _damaged(path, f"{size:,} bytes of data where {end:,} are described")
    return [(key, dtype, shape) for _, _, key, dtype, shape in sorted(found, key=lambda item: item[:2])]


def _decode(path: Path, text: Any, tensors: dict[str, torch.Tensor], device: str | torch.device) -> Tree:
    def decode(value: Any, depth: int) -> Any:
        if depth > _DEPTH:
            raise _damaged(path, "a structure that is nested too deeply")
        if isinstance(value, list):
            return [decode(v, depth + 1) for v in value]
        if not isinstance(value, dict):
            return value
        if "@dict" in value:
            pairs = {k: decode(v, depth + 1) for k, v in value["@dict"]}
            if not all(isinstance(k, (str, int)) for k in pairs):
                raise ValueError("a key that is neither text nor an integer")
            return pairs
        return tensors[value["@tensor"]].to(device) if "@tensor" in value else tensors[value["@array"]].numpy()

    try:
        return decode(json.loads(text), 0)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"a structure that cannot be read: {type(error).__name__}: {str(error)[:100]}") from None
