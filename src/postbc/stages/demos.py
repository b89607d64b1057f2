"""`postbc demos collect | inspect | replay | download | convert | embed`: the options of each, and what it prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from rich.table import Table

from postbc.data.download import Release, RobomimicSet
from postbc.errors import InputError, require
from postbc.progress import console, progress, say
from postbc.schemas import Count, CountOrZero, NonNegative, Seed, schema


@schema
class Collect:
    """Record demonstrations by scripted operators: eight people of four qualities (MetaWorld: its own expert), successes only, the same
    file for the same seed."""

    output: Path
    """File to write (robomimic HDF5)."""
    task: str = "Lift"
    """Lift, Can, Square, libero/kitchen (all sixteen tasks), some (libero/kitchen/3+14), or one
    (libero/KITCHEN_SCENE3_turn_on_the_stove); one of MetaWorld's (metaworld/push-v3)."""
    num: Count = 50
    """Demonstrations in all, shared equally among the tasks and the operators."""
    operators: tuple[str, ...] | None = None
    """operator_a … operator_h, a quality (proficient, better, okay, worse), or all; default all, for LIBERO proficient and better."""
    seed: Seed = 0
    """Decides initial states, habits and noise; the number of environments does not."""
    num_envs: Count = 8
    """Environments side by side (MetaWorld: one)."""
    horizon: Count | None = None
    """Steps (20 are a second; MetaWorld: 80) after which an unsolved episode is given up; by default 250 (Lift), 450 (Can, Square), 600
    (LIBERO), 500 (MetaWorld)."""
    tail: CountOrZero = 5
    """Steps that the task has to stay solved for, as recorders of people's demonstrations ask; they are kept."""
    noise: NonNegative | None = None
    """MetaWorld: standard deviation of what is added to the expert's commands; by default 0.3."""
    native: bool = True
    """Compiled control loop; --no-native uses robosuite's own, several times slower."""
    images: bool = False
    """Record two cameras, and not the objects (LIBERO: 128 × 128, a twentieth as fast; Lift, Can, Square: 84 × 84)."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels of a side of those (Lift, Can, Square)."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Collect, write, and print the success share of each operator."""
        from postbc.data.robomimic_write import check_writable, write_robomimic
        from postbc.data.scripted.operators import find_operators

        _check_free(self.output, self.overwrite)
        check_writable(self.output)  # before the minutes of collecting, not after them
        libero, metaworld = self.task.startswith("libero/"), self.task.startswith("metaworld/")
        operators = self.operators if self.operators is not None else ("proficient", "better") if libero else ("all",)
        find_operators(operators)
        collect: Any
        options: dict[str, Any] = {} if self.horizon is None else {"horizon": self.horizon}
        require(metaworld or self.noise is None, "Only MetaWorld's experts are given noise.", key="noise", found=self.noise,
                remedy="choose --operators: each has noise of its own")  # fmt: skip
        if metaworld:
            asked = {"operators": self.operators, "images": self.images or None, "image_size": self.image_size,
                     "native": None if self.native else False}  # fmt: skip
            given = [key for key, value in asked.items() if value is not None]
            require(not given, "MetaWorld has one expert a task, no compiled loop, and is recorded by states.",
                    key=given[0] if given else None, remedy="leave the option out")  # fmt: skip
            from postbc.environments.metaworld_collect import collect

            options |= {} if self.noise is None else {"noise": self.noise}
        elif libero:
            require(
                self.native,
                "LIBERO's tasks are stepped by the compiled loop only.",
                key="native",
                remedy="leave out --no-native",
            )
            from postbc.environments.libero.collect import collect

            require(self.image_size is None, "LIBERO's tasks are recorded in its own size.", key="image_size", found=self.image_size,
                    remedy="record states, then `postbc demos convert --image-size`")  # fmt: skip
            options |= {"operators": operators, "num_envs": self.num_envs, "images": self.images}
        else:
            require(self.images or self.image_size is None, "There are no images to have a size.", key="image_size",
                    found=self.image_size, remedy="give --images too")  # fmt: skip
            from postbc.environments.robosuite.collect import collect

            options |= {"operators": operators, "num_envs": self.num_envs, "native": self.native, "images": self.images,
                        "image_size": self.image_size}  # fmt: skip
        with progress("Collecting", self.num) as bar:
            collection = collect(
                self.task.removeprefix("libero/").removeprefix("metaworld/"), self.num, seed=self.seed, tail=self.tail,
                progress=lambda name, success, length: bar.advance(int(success), steps=length), **options,
            )  # fmt: skip
        dataset = collection.dataset
        _check_free(self.output, self.overwrite)  # nobody has put something there meanwhile
        write_robomimic(self.output, dataset, model_xml=collection.model_xml, attributes=collection.habits)
        table = _table(
            f"{len(dataset)} demonstrations of {self.task}, {dataset.num_steps} steps",
            (
                "task" if set(collection.attempts) <= set(dataset.tasks) else "operator",
                "kept",
                "of episodes",
                "success",
                "mean length",
            ),
        )
        for name, (kept, episodes) in collection.attempts.items():
            if episodes:
                length = dataset.select(name).lengths.mean()
                table.add_row(name, str(kept), str(episodes), f"{kept / episodes:.2f}", f"{length:.0f}")
        console().print(table)
        say(f"Written: {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)")


@schema
class Inspect:
    """Print counts, lengths, ranges and operators of a demonstration file, and draw a picture of it. Overwrites only if told."""

    file: Annotated[Path, tyro.conf.Positional]
    """Demonstrations (robomimic's or LIBERO's HDF5, a folder of such files, a LeRobotDataset v3, or diffusion_policy's zarr)."""
    output: Path | None = None
    """Picture to write (.png, .pdf, .svg); by default beside the file, under its name with .png, or -2.png, … if that is taken."""
    overwrite: bool = False
    """Replace an existing picture of the name given by --output."""
    filter_key: str | None = None
    """Only the demonstrations of this filter (mask)."""
    observation_keys: tuple[str, ...] | None = None
    """Observations that make the state, in this order; by default robomimic's four low-dimensional ones (zarr, LeRobot: their own)."""
    image_keys: tuple[str, ...] = ()
    """Cameras to look for (agentview_image)."""
    clip_actions: bool = False
    """Clip commands to [-1, 1] first, as robosuite did when it executed them."""
    allow_out_of_range: bool = False
    """Go on when actions lie outside [-1, 1], to see where."""

    def run(self) -> None:
        """Print the tables and write the picture."""
        from postbc.data.inspect import draw, draw_beside, summarise
        from postbc.data.readers import describe, read_dataset
        from postbc.data.training_set import jumping_quaternions

        say(describe(self.file))
        dataset = read_dataset(
            self.file, filter_key=self.filter_key, observation_keys=self.observation_keys, image_keys=self.image_keys,
            clip_actions=self.clip_actions, check_actions=not self.allow_out_of_range, parts=("rewards", "dones"),
        )  # fmt: skip
        if self.output is not None:
            _check_free(self.output, self.overwrite)
        summary, environment = summarise(dataset), dataset.environment
        shapes = ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in dataset.shapes.items())
        if dataset.state_keys:
            say("state: " + ", ".join(f"{key} ({width})" for key, width in zip(dataset.state_keys, dataset.state_dims)))
        say(
            f"{self.file}: {len(dataset)} demonstrations, {dataset.num_steps} steps; observations: {shapes}; actions "
            f"{dataset.action_dim}; {environment.get('env_name') or 'no environment'}, simulator "
            f"{environment.get('env_version') or 'of unknown version'}"
        )
        counted = ", ".join(f"{task} ({count})" for task, count in dataset.count_tasks().items())
        if counted:
            say(f"Tasks: {counted}; of {len(dataset.tasks)} that language tells apart")
        groups = _table("Who and what", ("", "demos", "steps", "length: least, mean, most", "solved", "command", "resting"))
        groups.caption = (
            "solved: at the last step; command: mean length of x, y, z; resting: all commands but the gripper's under 0.05"
        )
        sections = [("", (summary.total,)), ("", summary.operators), ("filter ", summary.filters)]
        for word, members in sections:
            for g in members:
                low, mean, high = g.length
                solved = "?" if g.solved is None else f"{g.solved:.2f}"
                groups.add_row(
                    word + g.name, str(g.count), str(g.steps), f"{low} / {mean:.0f} / {high}", solved, f"{g.command:.2f}",
                    f"{g.resting:.2f}",
                )  # fmt: skip
            groups.add_section()
        terminal = console()
        terminal.print(groups)
        if summary.habits:
            habits = (f"{name} {', '.join(f'{v} {n}' for v, n in of.items())}" for name, of in summary.habits.items())
            say(f"Habits (filters, as side=left): {'; '.join(habits)}")
        if summary.success is not None:
            say(f"Solved is unknown: {summary.success}")
        for title, dimensions in (("State (raw units)", summary.observations), ("Actions", summary.actions)):
            table = _table(title, ("dimension", "min", "max", "mean", "std", "at ±1" if title == "Actions" else "0.01 outside"))
            for d in dimensions:
                bound = f"{d.at_bound:.1%}" if max(-d.low, d.high) <= 1 else "unbounded"
                last = bound if title == "Actions" else f"{d.off_by_a_hundredth:.2g}"
                table.add_row(d.name, f"{d.low:.4f}", f"{d.high:.4f}", f"{d.mean:.4f}", f"{d.std:.4f}", last)
            if dimensions:
                terminal.print(table)
        say("0.01 outside: how far, in normalised units, a value 0.01 beyond the data's range lies from it.")
        narrow = [d.name for d in (*summary.observations, *summary.actions) if d.narrow]
        if narrow:
            say(
                f"Constant or nearly so: {', '.join(narrow)}. Min-max normalisation divides by their range (+1e-6), so that any other "
                "value met later becomes huge. Normalise by more data, or widen them (--data.minimum-range)."
            )
        else:
            say("No dimension is constant.")
        for name, share in jumping_quaternions(dataset).items():
            say(f"The quaternion {name} changes its sign at {share:.1%} of the steps, not its rotation: --data.rotations 6d.")
        if self.output is not None:
            say(f"Picture: {draw(dataset, self.output, self.overwrite)}")
            return
        try:
            say(f"Picture: {draw_beside(dataset)}")
        except InputError as error:
            say(f"No picture: {error.what} {self.file.parent} cannot be written; --output PICTURE.png puts it elsewhere.")


@schema
class Replay:
    """Play demonstrations open-loop in the simulator from their first state, and report how many succeed."""

    file: Annotated[Path, tyro.conf.Positional]
    """Demonstrations with simulator states (robomimic's or LIBERO's HDF5, or a folder of such files)."""
    num: CountOrZero | None = None
    """Play this many, a random subset drawn by the seed; by default all."""
    seed: int = 0
    """Seed of that subset."""
    filter_key: str | None = None
    """Only the demonstrations of this filter (mask)."""
    clip_actions: bool = False
    """Clip commands to [-1, 1], as robosuite did when it executed them."""
    native: bool = True
    """Compiled control loop; --no-native uses robosuite's own, several times slower."""
    num_envs: Count = 8
    """Environments side by side."""
    allow_version_mismatch: bool = False
    """Go on although the data was made with another version of the simulator (expect near 0 % success)."""

    def play(self) -> tuple[Any, Any]:
        """The demonstrations (a :class:`~postbc.data.episodes.Dataset`), and their playback in the simulator that they are of.

        Raises:
            InputError: demonstrations that cannot be read, or do not belong to a simulator here.
        """
        from postbc.data.readers import list_dataset, read_dataset

        names = None
        if self.num is not None:
            from postbc.data.episodes import choose, draw

            listing = list_dataset(self.file)
            chosen = (
                choose(listing.names, listing.filters, self.filter_key, str(self.file)) if self.filter_key else listing.names
            )
            names = draw(chosen, self.num, self.seed, str(self.file), listing.task_of)
        dataset = read_dataset(
            self.file, filter_key=self.filter_key, names=names, clip_actions=self.clip_actions, parts=("states",)
        )
        with progress("Replaying", len(dataset)) as bar:
            replay: Any
            options: dict[str, Any] = {"num_envs": self.num_envs, "allow_version_mismatch": self.allow_version_mismatch}
            if str(dataset.environment.get("env_name")).startswith("libero/"):
                require(self.native, "LIBERO's tasks are stepped by the compiled loop only.", key="native")
                from postbc.environments.libero.playback import replay
            else:
                from postbc.environments.robosuite.playback import replay

                options["native"] = self.native
            return dataset, replay(dataset, progress=bar.reach, **options)

    def run(self) -> None:
        """Replay and print the success rate with its Wilson interval."""
        from postbc.statistics import wilson_interval

        _, result = self.play()
        for warning in result.warnings:
            say(f"Warning: {warning}")
        successes, n = int(result.successes.sum()), len(result.successes)
        low, high = wilson_interval(successes, n)
        say(f"{successes} of {n} succeeded: {successes / n:.3f} (95 % Wilson interval {low:.3f} to {high:.3f})")
        say(
            f"End effector off the recorded path by at most {result.drift.max() * 1000:.1f} mm (median of the demonstrations' "
            f"largest distances {sorted(result.drift)[n // 2] * 1000:.1f} mm)"
        )
        failed = [name for name, success in zip(result.names, result.successes) if not success]
        if failed:
            say(f"Failed: {', '.join(failed)}")


@schema
class Download:
    """Fetch official robomimic or LIBERO files; says their size and licence first, checks what arrives, resumes."""

    task: str = "lift"
    """lift, can or square; libero/kitchen (sixteen files), one of LIBERO's tasks (libero/KITCHEN_SCENE3_turn_on_the_stove), some of
    the sixteen (libero/kitchen/3+14), or a suite of it (libero/libero_goal)."""
    dataset: RobomimicSet = "mh"
    """robomimic: ph, proficient human, 200 demonstrations by one person; mh, multi-human, 300 by six people of three qualities; mg
    (sparse rewards) or mg-dense, machine-generated: 1500 (lift) or 3900 (can) rollouts of an agent at stages of its training."""
    version: Release = "v1.5"
    """robomimic: v1.5, made with robosuite 1.5.1, from the hub; or v1.4.1, for the simulator that is here, from its own server."""
    output_dir: Path = Path("data")
    """Directory; files land in it as VERSION/TASK/DATASET/low_dim_….hdf5 or SUITE/TASK_demo.hdf5."""
    dry_run: bool = False
    """Only say what would be downloaded."""
    force: bool = False
    """Download again although the file is there."""

    def run(self) -> None:
        """State, download, check."""
        from postbc.data.download import DEMONSTRATIONS, OF_A_TASK, VERSION_NOTE, fetch, look_up, look_up_libero

        libero = self.task.startswith("libero/")
        named = (self.task, self.dataset)
        remotes = look_up_libero(self.task.removeprefix("libero/")) if libero else [look_up(*named, self.version)]
        for remote in remotes:
            say(f"{remote.repository}: {remote.filename} at {remote.commit[:12]}")
        say(f"Size: {sum(remote.size for remote in remotes) / 1e6:.1f} MB. Licence: {remotes[0].licence}.")
        if not libero and self.version == "v1.5":
            say(VERSION_NOTE)
        if self.dry_run:
            return
        count = OF_A_TASK if libero else DEMONSTRATIONS[named]
        for remote in remotes:
            path = fetch(remote, self.output_dir, count, force=self.force)
            say(f"Arrived whole: {path}, {count} demonstrations. Next: postbc demos inspect {path}")


@schema
class Embed:
    """Make a file of a language model's vectors for tasks, once, for `--data.language FILE`. Needs transformers."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Tasks as demonstrations name them, libero/… (libero/kitchen: all sixteen, in one policy's vocabulary), or files of
    demonstrations, whose tasks are meant."""
    output: Path
    """File to write (safetensors)."""
    model: str = "bert-base-cased"
    """Of transformers, with a pooled output: a folder, or a name that is fetched from the hub (LIBERO's is this one)."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Embed, and say the sentences."""
        from postbc.data.language import sentences_of, write_vectors
        from postbc.data.readers import list_dataset
        from postbc.data.robomimic_write import check_writable

        _check_free(self.output, self.overwrite)
        check_writable(self.output)
        names: list[str] = []
        for word in self.tasks:
            told = set(list_dataset(word).task_of.values()) if Path(word).exists() else {word}
            require(told, "These demonstrations do not say their tasks.", file=word, key="task")
            names += sorted(told)
        require(names, "No task is given.", key="tasks", expected="libero/kitchen, a file of demonstrations, or names")
        sentences = sentences_of(names)
        for task, sentence in sentences.items():
            say(f"{task}: {sentence!r}")
        write_vectors(self.output, sentences, self.model)
        say(f"{self.output}: {len(sentences)} vectors of {self.model}. Next: postbc pretrain --data.language {self.output} …")


@schema
class Convert:
    """Make robomimic's HDF5 or a LeRobot dataset of what every command reads; of a raw robosuite recording (states and actions), played
    back in the simulator; or of LIBERO's demonstrations, drawn in their states. Goes on where it was stopped."""

    file: Annotated[Path, tyro.conf.Positional]
    """Recording (HDF5 with states), robomimic HDF5, LeRobotDataset v3, diffusion_policy's zarr, or LIBERO's demonstrations (ours or its
    own, a file or a folder)."""
    output: Path
    """File to write (robomimic HDF5), or folder (LeRobot)."""
    to: Literal["robomimic", "lerobot"] = "robomimic"
    """What to write: robomimic's HDF5, or a LeRobotDataset v3."""
    episodes: Count | None = None
    """zarr: number of episodes, for a file that does not say where they end (no meta/episode_ends): cut where the scene jumps most."""
    observation_keys: tuple[str, ...] | None = None
    """Observations that make the state, in this order; by default those that `demos inspect` shows."""
    image_keys: tuple[str, ...] | None = None
    """Cameras whose frames are copied too; by default all (zarr: none)."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """LIBERO: draw what its two cameras see in the recorded states, in pixels of a side, in place of the objects."""
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1
    """LIBERO: processes that draw."""
    fps: Count | None = None
    """LeRobot: steps a second, for data that does not say its control frequency."""
    video: bool = False
    """LeRobot: encode the frames as H.264 (small, not exact) instead of PNG (exact)."""
    num_envs: Count = 8
    """Recording: environments side by side."""
    allow_version_mismatch: bool = False
    """Recording: go on although it was made with another version of the simulator."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> None:
        """Convert, and say what came out."""
        from postbc.data.convert import finish
        from postbc.data.lerobot_files import is_lerobot
        from postbc.data.lerobot_write import finish_lerobot
        from postbc.data.robomimic_write import check_writable
        from postbc.data.zarr import is_zarr

        if (
            finish_lerobot(self.output) if self.to == "lerobot" else finish(self.output)
        ):  # it was stopped after the last step but one
            say(f"Written: {self.output}. Next: postbc demos inspect {self.output}")
            return
        _check_free(self.output, self.overwrite)
        require(os.path.realpath(self.output) != os.path.realpath(self.file), "A file cannot be converted into itself.",
                file=self.output, remedy="choose another --output")  # fmt: skip
        require(
            self.episodes is None or is_zarr(self.file),
            "Only zarr files are cut into episodes.",
            key="episodes",
            file=self.file,
        )
        require(self.to == "lerobot" or (self.fps is None and not self.video), "This is an option of LeRobot datasets.",
                key="video" if self.video else "fps", remedy="add --to lerobot, or leave it out")  # fmt: skip
        require(self.to == "robomimic" or self.image_size is None, "Frames are drawn into robomimic's HDF5.", key="image_size",
                remedy="draw them first, and convert what comes out --to lerobot")  # fmt: skip
        if self.to == "lerobot":
            steps, episodes, said = self._to_lerobot()
        else:
            check_writable(self.output)
            copied = is_zarr(self.file) or is_lerobot(self.file)
            make = self._draw if self.image_size is not None else self._copy if copied else self._play
            require(copied or (self.observation_keys is None and self.image_keys is None), "Only copied observations are chosen.",
                    file=self.file, key="observation_keys" if self.image_keys is None else "image_keys",
                    expected="zarr, a LeRobot dataset, or --to lerobot", remedy="leave the option out")  # fmt: skip
            steps, episodes, said = make()
        say(f"Written: {self.output}, {episodes} episodes, {steps} steps{said}. Next: postbc demos inspect {self.output}")

    def _copy(self) -> tuple[int, int, str]:
        from postbc.data.convert import copy_dataset

        dataset = self._read()
        with progress("Writing", len(dataset)) as bar:
            copy_dataset(dataset, self._chosen, self.output, bar.reach)
        return dataset.num_steps, len(dataset), _said(dataset)

    def _read(self) -> Any:
        from postbc.data.readers import list_cameras, read_dataset
        from postbc.data.robomimic import PARTS
        from postbc.data.zarr import is_zarr, read_zarr

        if is_zarr(self.file):
            return read_zarr(
                self.file, observation_keys=self.observation_keys, image_keys=self.image_keys or (), parts=("dones",),
                episodes=self.episodes,
            )  # fmt: skip
        cameras = list_cameras(self.file) if self.image_keys is None else self.image_keys
        return read_dataset(
            self.file, observation_keys=self.observation_keys, image_keys=cameras, parts=PARTS, check_actions=False
        )

    def _chosen(self) -> str:
        from postbc.files import digest

        return f"{digest(self.file)} {self.observation_keys} {self.image_keys} {self.episodes}"

    def _draw(self) -> tuple[int, int, str]:
        from postbc.data.readers import read_dataset
        from postbc.environments.libero import check
        from postbc.environments.libero.playback import draw

        check(images=True)
        assert self.image_size is not None
        dataset = read_dataset(draw(self.file, self.output, self.image_size, self.jobs), parts=())
        return dataset.num_steps, len(dataset), f", with images of {self.image_size} × {self.image_size}"

    def _to_lerobot(self) -> tuple[int, int, str]:
        from postbc.data.lerobot_write import LeRobotWriter, check_replaceable

        check_replaceable(self.output)
        dataset = self._read()
        writer = LeRobotWriter(self.output, dataset, self._chosen(), fps=self.fps, video=self.video)
        with progress("Writing", len(dataset)) as bar:
            writer.write(bar.reach)
        return dataset.num_steps, len(dataset), _said(dataset)

    def _play(self) -> tuple[int, int, str]:
        from postbc.data.convert import convert_recording
        from postbc.data.recordings import open_recording
        from postbc.data.robomimic import read_robomimic

        recording = open_recording(self.file)
        from postbc.environments.robosuite.playback import Observer

        observer = Observer(
            recording.environment, str(self.file), num_envs=self.num_envs, allow_version_mismatch=self.allow_version_mismatch
        )
        try:
            for warning in observer.warnings:
                say(f"Warning: {warning}")
            with progress("Playing back", len(recording.names)) as bar:
                convert_recording(recording, observer, self.output, bar.reach)
        finally:
            observer.close()
        dataset = read_robomimic(self.output, check_actions=False, parts=("rewards",))
        solved = sum(episode.rewards is not None and bool(episode.rewards.any()) for episode in dataset)
        return dataset.num_steps, len(dataset), f", {solved} of them solved at some step"


def _said(dataset: Any) -> str:
    rewards = "" if dataset[0].rewards is not None else "; rewards unknown"
    return f", {dataset.lengths.min()} to {dataset.lengths.max()} an episode{rewards}"


def _check_free(output: Path, overwrite: bool) -> None:
    require(overwrite or not os.path.lexists(output), "The output exists already.", file=output,
            remedy="choose another name, or pass --overwrite to replace it")  # fmt: skip


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "operator", "dimension") else "right")
    return table
