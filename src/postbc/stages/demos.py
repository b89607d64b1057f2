"""`postbc demos collect | inspect | replay | download`: the options of each, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from postbc.errors import InputError


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Collect:
    """Record demonstrations by scripted operators: six people of three qualities, successes only, the same file for the same seed."""

    output: Path
    """File to write (robomimic HDF5)."""
    task: Literal["Lift", "Can"] = "Lift"
    """Task to demonstrate."""
    num: int = 50
    """Demonstrations in all, shared equally among the operators."""
    operators: tuple[str, ...] = ("all",)
    """operator_a … operator_f, or a quality (better, okay, worse), or all."""
    seed: int = 0
    """Decides initial states, habits and noise; the number of environments does not."""
    num_envs: int = 8
    """Environments side by side."""
    horizon: int | None = None
    """Steps (20 are a second) after which an unsolved episode is given up; by default 250 for Lift, 450 for Can."""
    tail: int = 5
    """Steps kept after the first successful one, as people's demonstrations have a few."""
    native: bool = True
    """Compiled control loop; --no-native uses robosuite's own, several times slower."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Collect, write, and print the success share of each operator."""
        from postbc.demonstrations.collect import collect
        from postbc.demonstrations.robomimic_write import check_writable, write_robomimic
        from postbc.progress import progress

        if self.output.exists() and not self.overwrite:
            raise InputError(
                "The output exists already.", file=self.output, remedy="choose another name, or pass --overwrite to replace it"
            )
        check_writable(self.output)  # before the minutes of collecting, not after them
        with progress("Collecting", max(self.num, 1)) as bar:
            collection = collect(
                self.task, self.num, self.operators, self.seed, num_envs=self.num_envs, horizon=self.horizon, tail=self.tail,
                native=self.native, progress=lambda name, success, length: bar.advance(int(success), steps=length),
            )  # fmt: skip
        demonstrations = collection.demonstrations
        write_robomimic(self.output, demonstrations, model_xml=collection.model_xml)
        table = Table(title=f"{len(demonstrations)} demonstrations of {self.task}, {demonstrations.num_steps} steps")
        for heading in ("operator", "kept", "of episodes", "success", "mean length"):
            table.add_column(heading, justify="left" if heading == "operator" else "right")
        for name, (kept, episodes) in collection.attempts.items():
            if episodes:
                length = demonstrations.select(name).lengths.mean()
                table.add_row(name, str(kept), str(episodes), f"{kept / episodes:.2f}", f"{length:.0f}")
        _console().print(table)
        _console().print(f"Written: {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)")


@dataclass(frozen=True)
class Inspect:
    """Print counts, lengths, ranges and operators of a demonstration file, and draw a picture of it."""

    file: Annotated[Path, tyro.conf.Positional]
    """Demonstration file (robomimic HDF5)."""
    output: Path | None = None
    """Picture to write (PNG); by default beside the file, with the ending .png."""
    filter_key: str | None = None
    """Only the demonstrations of this filter (mask)."""
    allow_out_of_range: bool = False
    """Go on when actions lie outside [-1, 1], to see where."""

    def run(self) -> None:
        """Print the tables and write the picture."""
        from postbc.demonstrations.inspect import draw, summarise
        from postbc.demonstrations.robomimic import read_robomimic

        demonstrations = read_robomimic(
            self.file, filter_key=self.filter_key, action_range=None if self.allow_out_of_range else (-1.0, 1.0)
        )
        summary, console = summarise(demonstrations), _console()
        environment = demonstrations.environment
        console.print(
            f"{self.file}: {len(demonstrations)} demonstrations, {demonstrations.num_steps} steps, observations "
            f"{demonstrations.observation_dim}, actions {demonstrations.action_dim}; {environment.get('env_name', 'no environment')}, "
            f"robosuite {environment.get('env_version', 'of unknown version')}"
        )
        groups = Table(
            title="Who and what",
            caption="solved: at the last step; command: mean length of x, y, z; resting: every command but the gripper's under 0.05",
        )
        for heading in ("", "demos", "steps", "length: least, mean, most", "solved", "command", "resting"):
            groups.add_column(heading, justify="right" if heading else "left")
        sections = [("", (summary.total,)), ("", summary.operators), ("filter ", summary.filters)]
        for word, members in sections:
            for g in members:
                low, mean, high = g.length
                groups.add_row(
                    word + g.name, str(g.count), str(g.steps), f"{low} / {mean:.0f} / {high}", f"{g.solved:.2f}", f"{g.command:.2f}",
                    f"{g.resting:.2f}",
                )  # fmt: skip
            groups.add_section()
        console.print(groups)
        for title, dimensions in (("Observations (raw units)", summary.observations), ("Actions", summary.actions)):
            table = Table(title=title)
            for heading in ("dimension", "min", "max", "mean", "std", "at ±1" if title == "Actions" else "0.01 outside"):
                table.add_column(heading, justify="left" if heading == "dimension" else "right")
            for d in dimensions:
                last = f"{d.at_bound:.1%}" if title == "Actions" else f"{d.off_by_a_hundredth:.2g}"
                table.add_row(d.name, f"{d.low:.4f}", f"{d.high:.4f}", f"{d.mean:.4f}", f"{d.std:.4f}", last)
            console.print(table)
        console.print("0.01 outside: how far, in normalised units, a value 0.01 beyond the data's range lies from it.")
        narrow = [d.name for d in (*summary.observations, *summary.actions) if d.narrow]
        if narrow:
            console.print(
                f"Constant or nearly so: {', '.join(narrow)}. Min-max normalisation divides by their range (+1e-6), so that any other "
                "value met later becomes huge. Normalise by more data, or widen them (Normalization.fit(…, minimum_range=…))."
            )
        else:
            console.print("No dimension is constant.")
        console.print(f"Picture: {draw(demonstrations, self.output or self.file.with_suffix('.png'))}")


@dataclass(frozen=True)
class Replay:
    """Play demonstrations open-loop in the simulator from their first state, and report how many succeed."""

    file: Annotated[Path, tyro.conf.Positional]
    """Demonstration file (robomimic HDF5) with simulator states."""
    num: int | None = None
    """Play this many, a random subset drawn by the seed; by default all."""
    seed: int = 0
    """Seed of that subset."""
    filter_key: str | None = None
    """Only the demonstrations of this filter (mask)."""
    native: bool = True
    """Compiled control loop; --no-native uses robosuite's own, several times slower."""
    num_envs: int = 8
    """Environments side by side."""
    allow_version_mismatch: bool = False
    """Go on although the data was made with another version of the simulator (expect near 0 % success)."""

    def run(self) -> None:
        """Replay and print the success rate with its Wilson interval."""
        from postbc.demonstrations.replay import replay
        from postbc.demonstrations.robomimic import read_robomimic
        from postbc.demonstrations.versions import check_simulator_version
        from postbc.progress import progress
        from postbc.statistics import wilson_interval

        demonstrations, console = read_robomimic(self.file, filter_key=self.filter_key), _console()
        if self.num is not None:
            demonstrations = demonstrations.subset(self.num, self.seed)
        warning = check_simulator_version(
            demonstrations.environment, source=str(self.file), allow_mismatch=self.allow_version_mismatch
        )
        if warning is not None:
            console.print(f"Warning: {warning}")
        done = 0
        with progress("Replaying", len(demonstrations)) as bar:

            def advance(ended: int) -> None:
                nonlocal done
                bar.advance(ended - done)
                done = ended

            result = replay(
                demonstrations, native=self.native, num_envs=self.num_envs, allow_version_mismatch=self.allow_version_mismatch,
                progress=advance,
            )  # fmt: skip
        successes, n = int(result.successes.sum()), len(result.successes)
        low, high = wilson_interval(successes, n)
        console.print(f"{successes} of {n} succeeded: {successes / n:.3f} (95 % Wilson interval {low:.3f} to {high:.3f})")
        console.print(
            f"End effector off the recorded path by at most {result.drift.max() * 1000:.1f} mm (median of the demonstrations' "
            f"largest distances {sorted(result.drift)[n // 2] * 1000:.1f} mm)"
        )
        failed = [name for name, success in zip(result.names, result.successes) if not success]
        if failed:
            console.print(f"Failed: {', '.join(failed)}")


@dataclass(frozen=True)
class Download:
    """Fetch an official robomimic file from the public hub; says its size and licence first, checks what arrived, resumes."""

    task: Literal["lift", "can", "square"] = "lift"
    """Task."""
    dataset: Literal["ph", "mh"] = "mh"
    """ph: proficient human, 200 demonstrations by one person; mh: multi-human, 300 by six people of three qualities."""
    output_dir: Path = Path("data")
    """Directory; the file lands in it under the hub's own path, v1.5/TASK/DATASET/low_dim_v15.hdf5."""
    dry_run: bool = False
    """Only say what would be downloaded."""
    force: bool = False
    """Download again although the file is there."""

    def run(self) -> None:
        """State, download, check."""
        from postbc.demonstrations.download import DEMONSTRATIONS, REPOSITORY, VERSION_NOTE, fetch, look_up

        console = _console()
        remote = look_up(self.task, self.dataset)
        console.print(f"{REPOSITORY}: {remote.filename} at {remote.commit[:12]}")
        console.print(f"Size: {remote.size / 1e6:.1f} MB. Licence: {remote.licence}.")
        console.print(VERSION_NOTE)
        if self.dry_run:
            return
        count = DEMONSTRATIONS[self.dataset]
        path = fetch(remote, self.output_dir, count, force=self.force)
        console.print(f"Arrived whole: {path}, {count} demonstrations. Next: postbc demos inspect {path}")
