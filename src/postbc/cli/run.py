"""`postbc run NAME`."""

from __future__ import annotations

from typing import Any

from postbc.errors import require
from postbc.experiments import running as recipe
from postbc.experiments.recipe import names


def parse(args: list[str]) -> recipe.RunRecipe[Any]:
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: postbc run NAME [OPTIONS]     (postbc run NAME --help lists its options; postbc recipes says what they are)\n"
        )
        print("\n".join(f"  {name}" for name in names()))
        raise SystemExit(0)
    require(
        not args[0].startswith("-"), "The recipe's name comes first.", key="NAME", found=args[0], expected=", ".join(names())
    )
    return recipe.parse(args[0], args[1:])


def run(config: recipe.RunRecipe[Any]) -> None:
    config.run()
