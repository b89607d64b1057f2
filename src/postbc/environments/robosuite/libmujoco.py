"""MuJoCo's C functions, called from compiled code that may be cached on disk.

numba refuses to cache a function that closes over a ctypes pointer, and rightly: the library is loaded at another address in
every process. Here the address is an ordinary argument, so that the cached machine code holds none.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import mujoco
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def _call(typing_context: Any, address: Any, model: Any, data: Any) -> Any:
    """`((void (*)(mjModel*, mjData*)) address)(model, data)`; the three arguments are addresses (intp)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, *parameters = arguments
        function_type = ir.FunctionType(ir.VoidType(), [parameter.type for parameter in parameters])
        builder.call(builder.inttoptr(function, function_type.as_pointer()), parameters)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


call: Any = _call  # mypy takes an intrinsic for the function that types it


def _library() -> ctypes.CDLL:
    folder = Path(mujoco.__file__).parent
    for pattern in ("libmujoco.so*", "libmujoco*.dylib", "mujoco.dll"):
        for path in sorted(folder.glob(pattern)):
            return ctypes.CDLL(str(path))  # the copy that the Python bindings have loaded
    raise ImportError(f"no MuJoCo library beside {mujoco.__file__}")


def addresses(*names: str) -> tuple[int, ...]:
    """The addresses of functions of libmujoco in this process."""
    library = _library()
    return tuple(int(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0) for name in names)
