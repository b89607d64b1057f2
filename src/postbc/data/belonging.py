"""Does this data, this policy, this simulator belong together? One check for training, evaluation, finetuning, replay and resuming.

Numbers of another robot, controller, rate or simulator version are accepted by every network and succeed near 0 % without any error.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postbc.data.episodes import Dataset, is_image
from postbc.errors import InputError, require
from postbc.schemas import Width, parse, plain, schema

ROBOSUITE = 1
"""robomimic's EnvType.ROBOSUITE_TYPE."""
#: Settings of a controller that decide what an action means.
CONTROLLER = ("type", "control_delta", "input_max", "input_min", "output_max", "output_min", "kp", "impedance_mode")
MISMATCH = "success may be near 0 % without any error"
#: What makes demonstrations of another version ones of this.
CONVERT = "postbc demos convert FILE --allow-version-mismatch --output OURS"


def controller_of(kwargs: Mapping[str, Any]) -> Any:
    """The arm's controller in robosuite's `env_kwargs`.

    To robosuite 1.4 `controller_configs` are these settings, or a list of them, one a robot. From 1.5 on they are the whole robot's,
    {"type": "BASIC", "body_parts": {"right": …}}, and the arm's may say `input_type` "delta" for `control_delta` true.
    """
    controller: Any = kwargs.get("controller_configs")
    if isinstance(controller, Sequence) and not isinstance(controller, str) and len(controller) == 1:
        controller = controller[0]
    if isinstance(controller, Mapping) and "body_parts" in controller:
        parts = controller["body_parts"]
        controller = parts.get("right") if isinstance(parts, Mapping) else parts
        if isinstance(controller, Mapping) and "input_type" in controller:
            controller = {"control_delta": controller["input_type"] == "delta", **controller}
    return controller


@schema
class Facts:
    """What a policy, its data and the environment it plays in must share; None: unknown."""

    environment: str | None = None
    """The task, as the simulator calls it (robomimic's env_name)."""
    version: str | None = None
    """Of the simulator; major and minor count."""
    robots: tuple[str, ...] | None = None
    controller: dict[str, Any] | None = None
    """Settings of the controller that decide what an action means."""
    control_freq: float | None = None
    """Hz."""
    state_keys: tuple[str, ...] | None = None
    """Parts of "state", in order."""
    state_dims: tuple[int, ...] | None = None
    images: dict[str, tuple[int, ...]] | None = None
    """"image.<camera>" -> (C, H, W)."""
    action_dim: Width | None = None

    @staticmethod
    def of_env_args(environment: Mapping[str, Any], source: str | None = None) -> Facts:
        """From robomimic's `env_args`.

        Raises:
            InputError: `env_args` are not what robomimic writes there.
        """
        kwargs = environment.get("env_kwargs") or {}
        require(isinstance(kwargs, Mapping), "The environment's arguments are not an object.", file=source,
                key="env_args: env_kwargs", found=repr(kwargs)[:100], expected='{"robots": …, "controller_configs": …}')  # fmt: skip
        robots, controller = kwargs.get("robots"), controller_of(kwargs)
        if isinstance(robots, str):
            robots = [robots]
        require(controller is None or isinstance(controller, Mapping), "The controller's settings cannot be compared.",
                file=source, key="env_args: env_kwargs.controller_configs", found=repr(controller)[:100],
                expected="an object, or a list of one")  # fmt: skip
        values = {
            "environment": _task(environment.get("env_name")),
            "version": environment.get("env_version") or None,
            "robots": robots or None,
            "controller": {key: controller[key] for key in CONTROLLER if key in controller} if controller else None,
            "control_freq": kwargs.get("control_freq"),
        }
        return parse(Facts, plain(values), None if source is None else f"{source}: env_args")

    @staticmethod
    def of_dataset(dataset: Dataset) -> Facts:
        """From a dataset: its environment, observations and actions."""
        return dataclasses.replace(
            Facts.of_env_args(dataset.environment, dataset.source),
            state_keys=dataset.state_keys, state_dims=dataset.state_dims, action_dim=dataset.action_dim,
            images={key: shape for key, shape in dataset.shapes.items() if is_image(key)},
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a policy's file; :meth:`from_dict` undoes it."""
        values: dict[str, Any] = plain(self)
        return values

    @staticmethod
    def from_dict(values: Any, file: str | None = None) -> Facts:
        """InputError for anything that :meth:`to_dict` does not write."""
        return parse(Facts, values, file)


def _task(name: Any) -> Any:
    """A task as its simulator calls it: `gymnasium:module:My/Task-v0` is My/Task-v0, whatever registers it; some of LIBERO's kitchens'
    tasks ("libero/kitchen/3+14") are observed as all of them."""
    if isinstance(name, str):
        name = "libero/kitchen" if name.startswith("libero/kitchen/") else name.split(":")[-1]
    return name or None


def installed_robosuite() -> str | None:
    """Version of the installed robosuite, None if there is none."""
    try:
        return importlib.metadata.version("robosuite")
    except importlib.metadata.PackageNotFoundError:
        return None


def _major_minor(version: str) -> tuple[str, ...]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match.groups() if match else (version,)


def _same(a: Any, b: Any) -> bool:
    """Equal as settings: a number stands for a list of that number."""
    if isinstance(a, bool) or isinstance(b, bool) or isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    if isinstance(a, (int, float)) and isinstance(b, (list, tuple)):
        a = [a] * len(b)
    if isinstance(b, (int, float)) and isinstance(a, (list, tuple)):
        b = [b] * len(a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def _pairs(found: Facts, expected: Facts) -> list[tuple[str, Any, Any]]:
    pairs = []
    for f in dataclasses.fields(Facts):
        a, b = getattr(found, f.name), getattr(expected, f.name)
        if f.name == "controller" and b is not None:
            pairs += [(f"controller {key}", (a or {}).get(key), value) for key, value in b.items()]
        elif f.name == "images" and b is not None:  # the policy may look at fewer cameras than there are
            pairs += [(key, None if a is None else a.get(key, "none"), shape) for key, shape in b.items()]
        else:
            pairs.append((f.name.replace("_", " "), a, b))
    return pairs


def check_belongs(
    found: Facts, expected: Facts, *, file: str | None = None, allow_version_mismatch: bool = False, remedy: str | None = None,
    of_version: str = "use what was made with this version",
) -> list[str]:  # fmt: skip
    """Compare what is known on both sides.

    Args:
        found: of `file`, which is named in the error.
        expected: of what it shall be used with; nothing is asked of what this leaves unknown.
        allow_version_mismatch: another simulator version is a warning.
        remedy: what to do about a difference.
        of_version: what to do about another simulator version.

    Returns:
        Warnings, one a sentence: what `found` does not say, a version that was allowed.

    Raises:
        InputError: a difference.
    """
    warnings, unknown = [], []
    for name, a, b in _pairs(found, expected):
        if b is None:
            continue
        if a is None:
            unknown.append(name)
        elif name == "version":
            if _major_minor(str(a)) == _major_minor(str(b)):
                continue
            if not allow_version_mismatch:
                raise InputError(
                    "This was made with another version of the simulator.", file=file, key="version", found=a, expected=b,
                    remedy=f"{of_version}; --allow-version-mismatch tries it all the same ({MISMATCH})",
                )  # fmt: skip
            warnings.append(f"Made with simulator version {a}, used with {b}: {MISMATCH}.")
        elif not _same(a, b):
            raise InputError(
                "This does not belong to what it is used with: the same numbers would mean something else.", file=file, key=name,
                found=a, expected=b, remedy=remedy or "use data, policy and environment of one task, robot and controller",
            )  # fmt: skip
    if unknown:
        warnings.append(f"Unknown, so not compared: {', '.join(unknown)}" + (f" ({file})." if file else "."))
    return warnings


def check_source(
    facts: Mapping[str, Any] | None, expected: Facts, place: str, *, file: str, allow_version_mismatch: bool = False
) -> list[str]:
    """:func:`check_belongs` of what a policy of `file` says of its data: it may say nothing, and then belongs to `place` or not."""
    if facts is None:
        return [f"{file} does not say what data it comes from, so whether it belongs to {place} is not known"]
    return check_belongs(Facts.from_dict(facts, file), expected, file=file, allow_version_mismatch=allow_version_mismatch)


def check_simulator(dataset: Dataset, allow_version_mismatch: bool = False) -> list[str]:
    """Warnings about data of robosuite when that is installed here; InputError when its version is another one.

    robosuite 1.5.1's "object" is not 1.4's: at Lift cube minus hand, not hand minus cube; at Can and Square the pose relative to the
    hand before the pose in the world, not after it.
    """
    installed = installed_robosuite()
    if dataset.environment.get("type") != ROBOSUITE or installed is None:
        return []
    facts = Facts.of_env_args(dataset.environment, dataset.source)
    warnings = check_belongs(
        facts, Facts(version=installed), file=dataset.source, allow_version_mismatch=allow_version_mismatch,
        of_version=f"`{CONVERT}` plays its states back and observes them as this version does",
    )  # fmt: skip
    if warnings and facts.version is not None and "object" in dataset.state_keys:
        warnings.append(f'Its "object" may have other signs or another order (1.5\'s has): `{CONVERT}` observes it anew.')
    return warnings
