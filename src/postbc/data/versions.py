"""Does the installed simulator match the one that the data was made with? A mismatch gives near 0 % success without any error."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from postbc.errors import InputError


def _major_minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def installed_simulator() -> str:
    """Version of the installed robosuite; InputError if there is none."""
    try:
        return importlib.metadata.version("robosuite")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "The simulator is not installed.", found="no robosuite", remedy="pip install 'postbc[robosuite]'"
        ) from error


def check_simulator_version(
    environment: Mapping[str, Any], *, installed: str | None = None, source: str | None = None, allow_mismatch: bool = False
) -> str | None:
    """Compare major.minor of ``env_args["env_version"]`` with the installed robosuite; 1.4.0 and 1.4.1 are the same simulator.

    Args:
        environment: robomimic's ``env_args``.
        installed: version to compare with; default that of the installed robosuite.
        source: file named in the error.
        allow_mismatch: return the warning instead of raising it.

    Returns None when they agree, else the sentence to print. Raises InputError naming both versions.
    """
    installed = installed_simulator() if installed is None else installed
    recorded = str(environment.get("env_version") or "")
    if recorded and _major_minor(recorded) == _major_minor(installed):
        return None
    what = (
        "The data was made with another version of the simulator."
        if recorded
        else "The data does not say with which version of the simulator it was made."
    )
    if allow_mismatch:
        return f"{what} Data: {recorded or 'unknown'}, installed: robosuite {installed}. Success may be near 0 % without any error."
    raise InputError(
        what,
        file=source,
        key="env_args: env_version",
        found=f"data from robosuite {recorded or 'of an unknown version'}, robosuite {installed} is installed",
        expected=f"robosuite {'.'.join(map(str, _major_minor(installed) or (installed,)))}.x",
        remedy="use data of this version; --allow-version-mismatch tries it all the same (expect near 0 % success without any error)",
    )
