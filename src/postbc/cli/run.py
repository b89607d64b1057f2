"""`postbc run NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postbc.cli import given, options
from postbc.errors import require
from postbc.experiments.recipe import load_recipe, names, with_policy
from postbc.experiments.running import RunRecipe
from postbc.policies.base import policy_class


def parse(args: list[str]) -> RunRecipe[Any]:
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: postbc run NAME [OPTIONS]     (postbc run NAME --help lists its options; postbc recipes says what they are)\n"
        )
        print("\n".join(f"  {name}" for name in names()))
        raise SystemExit(0)
    require(
        not args[0].startswith("-"), "The recipe's name comes first.", key="NAME", found=args[0], expected=", ".join(names())
    )
    return parse_recipe(args[0], args[1:])


def parse_recipe(name: str, args: list[str]) -> RunRecipe[Any]:
    """The recipe `name` (or a .yaml file) with the options `args` over its values.

    Raises:
        InputError: there is no such recipe or kind of policy, or a value cannot be used.
    """
    recipe = load_recipe(name)
    recipe = with_policy(recipe, given(args, "--policy.kind", recipe.policy.kind))
    kind: Any = RunRecipe[policy_class(recipe.policy.kind).Config]  # type: ignore[misc]
    default = RunRecipe(recipe, Path("runs") / Path(name).stem)
    chosen: RunRecipe[Any] = options(kind, f"run {name}", args, default=default)
    return chosen


def run(config: RunRecipe[Any]) -> None:
    config.run()
