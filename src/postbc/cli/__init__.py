"""The `postbc` command: one thin file a subcommand, imported when it is asked for. Nothing in the library imports this package."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

from postbc.errors import InputError, require

#: command words -> (module of this package, one line for the overview). A module has `parse(args)` -> options and `run(options)`, or
#: a class `Command(last word)` that has them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demos collect": ("demos_collect", "record scripted operators of several styles and qualities"),
    "demos inspect": ("demos_inspect", "what is in a demonstration file: counts, lengths, ranges, a picture"),
    "demos replay": ("demos_replay", "play demonstrations open-loop in the simulator"),
    "demos convert": ("demos_convert", "robomimic, LeRobot and zarr into one another; raw recordings by playing them back"),
    "demos download": ("demos_download", "fetch the official files of robomimic and LIBERO"),
    "demos embed": ("demos_embed", "a language model's vectors for tasks, once, for --data.language"),
    "posterior fit": ("posterior_fit", "Algorithm 1: the posterior, by a bootstrapped ensemble or in closed form"),
    "posterior calibrate": ("posterior_calibrate", "the posterior weight α from the demonstrations, with a picture"),
    "pretrain": ("pretrain", "Algorithm 2: BC, σ-BC or PostBC"),
    "evaluate": ("evaluate", "success rates with intervals, episodes and videos"),
    "no-regression": ("no_regression", "is a policy no worse than BC? Plays both until the answer is known"),
    "held-out": ("held_out", "the same question by demonstrations that neither was trained on; nothing is played"),
    "finetune dsrl": ("finetune", "RL over the policy's latent noise (NA or SAC)"),
    "finetune dppo": ("finetune", "PPO through the policy's last denoising steps"),
    "finetune residual": ("finetune", "a small correction of the policy's chunks, learnt off-policy: the fewest steps"),
    "finetune best-of-n": ("finetune", "IQL on the policy's rollouts, then the best of N samples"),
    "robot rollout": ("robot_rollout", "play on a robot in real time; a person resets and labels"),
    "robot compare": ("robot_compare", "two agents or more on a robot, blind, until it is known which is better"),
    "lerobot train": ("lerobot_train", "lerobot-train on PostBC's targets: LeRobot's policy, dataset and checkpoint"),
    "lerobot import": ("lerobot_import", "a LeRobot diffusion checkpoint as a policy of ours, to be evaluated and finetuned"),
    "lerobot export": ("lerobot_export", "a policy or finetuned agent as a folder that lerobot-eval and robots play"),
    "robot label": ("robot_label", "label the episodes of a session: a page with films, or the terminal"),
    "report": ("report", "one self-contained page: table, curves, pictures, commands"),
    "run": ("run", "a whole experiment by name, from demonstrations to report"),
    "sweep": ("sweep", "recipes × methods × seeds as one graph of runs, on this machine or a Ray cluster"),
    "recipes": ("recipes", "the experiments that `run` knows"),
    "theory": ("theory", "section 2 of the paper, executed: tables and plots"),
    "doctor": ("doctor", "check this machine, and data against the simulator"),
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


def command(words: str) -> Any:
    """The module of a command: `parse(args)` and `run(options)`."""
    module = importlib.import_module(f"postbc.cli.{COMMANDS[words][0]}")
    return module.Command(words.split()[-1]) if hasattr(module, "Command") else module


def options(kind: Any, words: str, args: list[str], **more: Any) -> Any:
    """`args` as a `kind` (a schema). Prints help or a usage error and raises SystemExit as argparse does."""
    import tyro

    return tyro.cli(kind, prog=f"postbc {words}", args=args, **more)


def _require_text(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise InputError("A name is no text: records could not hold it.", found=repr(word), expected="UTF-8",
                         remedy="choose another name, or make a link to it") from None  # fmt: skip


def given(args: list[str], option: str, default: str) -> str:
    """The value of an option that decides what the others are (`--policy.kind flow`), before they are parsed."""
    for word, following in zip(args, [*args[1:], ""]):
        if word == option:
            require(following, "A value is missing.", key=option)
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return default


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status: 0 done, 1 a job failed, 2 the input cannot be used, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a substitute
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # what it says, not where in the code
    args = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: your own modules beside where you are
    words = find(args)
    if words is None:
        group = f"{args[0]} " if args and any(known.startswith(f"{args[0]} ") for known in COMMANDS) else ""
        asked = not args or args[-1] in ("-h", "--help") or bool(group and len(args) == 1)
        print(_overview(group), file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"\npostbc: there is no command {' '.join(args)!r}", file=sys.stderr)
        return 0 if asked else 2
    from postbc.jobs import Interrupted, JobError, interruptible, load_plugins

    chosen: Any = None
    try:
        with interruptible():
            for word in args:
                _require_text(word)
            load_plugins()
            module = command(words)
            chosen = module.parse(args[len(words.split()) :])
            module.run(chosen)
    except InputError as error:
        print(f"postbc {words}: {error}", file=sys.stderr)
        return 2
    except JobError as error:
        print(f"postbc {words}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        named = f"\n  file: {error.filename}" if error.filename else ""
        print(f"postbc {words}: The operating system refuses: {error.strerror or error}{named}", file=sys.stderr)
        return 2
    except Interrupted as error:
        again = "; the same command with --resume goes on" if hasattr(chosen, "resume") else ""
        print(f"postbc {words}: {error}{again}", file=sys.stderr)
        return error.status
    return 0
