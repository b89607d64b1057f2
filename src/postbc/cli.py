"""The `postbc` command: one subcommand a stage, each a frozen dataclass with a `run` method, imported when it is asked for."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any

from postbc.errors import InputError

#: command words -> ("module:Dataclass", one line for the overview). The dataclass's fields are the options (via tyro).
COMMANDS: dict[str, tuple[str, str]] = {
    "demos collect": ("postbc.demonstrations.commands:Collect", "record scripted operators of several styles and qualities"),
    "demos inspect": (
        "postbc.demonstrations.commands:Inspect",
        "counts, lengths, ranges and a picture of a demonstration file",
    ),
    "demos replay": ("postbc.demonstrations.commands:Replay", "play demonstrations open-loop in the simulator"),
    "demos download": ("postbc.demonstrations.commands:Download", "fetch the official robomimic files"),
    "posterior fit": ("postbc.pretraining_command:PosteriorFit", "Algorithm 1: the posterior, by a bootstrapped ensemble"),
    "pretrain": ("postbc.pretraining_command:Pretrain", "Algorithm 2: BC, σ-BC or PostBC"),
    "evaluate": ("postbc.evaluation_command:Evaluate", "success rates with intervals, episodes and videos"),
    "finetune dsrl": ("postbc.finetuning.commands:Dsrl", "RL over the policy's latent noise (NA or SAC)"),
    "finetune best-of-n": ("postbc.finetuning.commands:BestOfN", "IQL on the policy's rollouts, then the best of N samples"),
    "report": ("postbc.experiments.report_command:Report", "one self-contained page: table, curves, pictures, commands"),
    "run": ("postbc.experiments.recipes:RunRecipe", "a whole experiment by name, from demonstrations to report"),
    "theory": ("postbc.theory.command:Theory", "section 2 of the paper, executed: tables and plots"),
    "doctor": ("postbc.doctor:Doctor", "check this machine, and data against the simulator"),
}


def _overview(prefix: str) -> str:
    rows = {words: line for words, (_, line) in COMMANDS.items() if words.startswith(prefix)}
    width = max(len(words) for words in rows)
    head = f"usage: postbc {prefix}COMMAND [OPTIONS]     (postbc COMMAND --help lists a command's options)\n"
    return "\n".join([head, *(f"  {words:<{width}}  {line}" for words, line in rows.items())])


def find(args: list[str]) -> str | None:
    """The longest command words that `args` begins with, or None."""
    matching = [words for words in COMMANDS if args[: len(words.split())] == words.split()]
    return max(matching, key=len, default=None)


def parse(words: str, args: list[str]) -> Any:
    """The command's dataclass, filled from the options `args`. Prints help or a usage error and raises SystemExit as argparse does."""
    import tyro

    module, name = COMMANDS[words][0].split(":")
    return tyro.cli(getattr(importlib.import_module(module), name), prog=f"postbc {words}", args=args)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0 done, 2 the input cannot be used (:class:`InputError`)."""
    args = list(sys.argv[1:] if argv is None else argv)
    words = find(args)
    if words is None:
        group = f"{args[0]} " if args and any(known.startswith(f"{args[0]} ") for known in COMMANDS) else ""
        asked = not args or args[-1] in ("-h", "--help") or (group and len(args) == 1)
        print(_overview(group), file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"\npostbc: there is no command {' '.join(args)!r}", file=sys.stderr)
        return 0 if asked else 2
    try:
        parse(words, args[len(words.split()) :]).run()
    except InputError as error:
        print(f"postbc {words}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"postbc {words}: The disk is full.\n  what to do: free some space, then run it again with --resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"postbc {words}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
