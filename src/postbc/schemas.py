"""Schemas: every configuration, file header and JSON file is a frozen dataclass with ranges, checked by pydantic where it enters.

A configuration's docstring lines are its help on the command line (tyro), its fields are `config.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from postbc.disk import require_file
from postbc.errors import InputError

T = TypeVar("T")

#: The largest count that is believed; a slip of the keyboard beyond it would take memory or years.
MANY = 10**12
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=MANY)]
CountOrZero = Annotated[int, Field(ge=0, le=MANY)]
Port = Annotated[int, Field(ge=0, le=65535)]
Layers = Annotated[int, Field(ge=1, le=99)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Positive = Annotated[float, Field(gt=0, lt=1e12)]
NonNegative = Annotated[float, Field(ge=0, lt=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
"""Strictly between 0 and 1."""
StepShare = Annotated[float, Field(gt=0, le=1)]

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


def later(default: T) -> T:
    """The default of a field that came after files of its schema were written: what there was before it, for ever.

    At that value :func:`plain` leaves it out, so that headers, fingerprints and recorded configurations stay those of before.
    """
    made: T = dataclasses.field(default=default, metadata={"later": True})
    return made


@dataclass_transform(frozen_default=True)
def schema(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are validated when an object is made; :class:`InputError` names the field otherwise."""
    made = pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls)
    validate: Callable[..., None] = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise _refused(error, None) from None

    __init__.__wrapped__ = validate  # type: ignore[attr-defined]
    __init__.__signature__ = getattr(validate, "__signature__", None)  # type: ignore[attr-defined]
    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def _refused(error: ValidationError, file: str | Path | None) -> InputError:
    first = error.errors(include_url=False)[0]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, InputError):  # a requirement among fields
        return InputError(str(cause), file=file) if file else cause
    where = ".".join(str(part) for part in first["loc"]) or None
    found = repr(first["input"])
    return InputError(
        "A value cannot be used.", file=file, key=where, found=found if len(found) < 200 else found[:200] + "…",
        expected=first["msg"].removeprefix("Input should be ").removeprefix("Value error, "),
    )  # fmt: skip


def parse(kind: type[T], values: Any, file: str | Path | None = None) -> T:
    """Plain values (from JSON or YAML) as a `kind`: a schema, or any type that pydantic knows.

    Raises:
        InputError: names file, field, what was found and what was expected.
    """
    try:
        # by way of JSON, so that tuples, paths and numbers of whole value are what they were when they were written
        return TypeAdapter(kind, config=None).validate_json(json.dumps(values, allow_nan=False), strict=True)
    except ValidationError as error:
        raise _refused(error, file) from None
    except InputError as error:
        raise InputError(str(error), file=file) from None if file else error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("The values are not plain data.", file=file, found=str(error)) from None


def plain(value: Any, whole: bool = False) -> Any:
    """A configuration as plain dictionaries, lists and values (paths as text).

    Without fields that are :func:`later` and at their default, unless it is to be `whole`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        kept = [f for f in fields if whole or "later" not in f.metadata or getattr(value, f.name) != f.default]
        return {f.name: plain(getattr(value, f.name), whole) for f in kept}
    if isinstance(value, dict):
        return {str(k): plain(v, whole) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, whole) for v in value]
    return str(value) if isinstance(value, Path) else value


def read_json(path: str | Path, kind: type[T], limit: int = 2**28) -> T:
    """A JSON file as a `kind`.

    Raises:
        InputError: missing, unreadable, too large, not JSON, or not of that kind.
    """
    path = require_file(path, "a JSON file")
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError("This file is too large.", file=path, found=f"{size:,} bytes", expected=f"at most {limit:,}")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise InputError("This file cannot be read.", file=path, found=error.strerror or str(error)) from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError("This file is not JSON.", file=path, found=str(error)[:200], remedy="run its stage again") from None
    return parse(kind, values, path)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")
