"""A LeRobot policy as one of ours: what it sees becomes its features, its latent noise steers it (DSRL, Best-of-N)."""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.data.belonging import Facts
from postbc.data.lerobot import ACTION, ENVIRONMENT_STATE, STATE, camera_name, state_parts
from postbc.data.normalization import EPSILON, Normalization
from postbc.data.readers import read_dataset
from postbc.errors import InputError, require
from postbc.lerobot.steering import KINDS, UNKNOWN, WHY_NOT
from postbc.policies.base import About, Observation, Shapes, save_policy
from postbc.schemas import Count, CountOrZero, plain, schema
from postbc.training.dsrl import check_deterministic

#: LeRobot's kinds of normalisation that are not IDENTITY -> the statistics that they need.
STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


@schema
class LeRobotConfig:
    """A LeRobot policy: its own configuration, and how our observations become its."""

    kind: Literal["lerobot"] = "lerobot"
    """One of LeRobot's policies (`postbc.lerobot.steering.KINDS`)."""
    lerobot: dict[str, Any] = field(default_factory=dict)
    """Its config.json."""
    task: str = ""
    """What it is told to do, of one that reads words."""
    own: CountOrZero = 0
    """How many numbers of the state, from the first on, are `observation.state`; the rest is `observation.environment_state`."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Our name of a camera -> LeRobot's."""
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    """LeRobot's feature -> statistics that its processors normalise by."""
    seen: CountOrZero = 0
    """How many numbers of its features learners see."""
    context: CountOrZero = 0
    """How many more it samples from."""
    inference_steps: Count = 10
    """Denoising or integration steps."""


def _configuration(config: LeRobotConfig) -> Any:
    """LeRobot's own configuration object: deterministic sampling, and no weights from anywhere but our file."""
    importlib.import_module("lerobot.policies")
    kind = str(config.lerobot.get("type"))
    require(kind in KINDS, f"This LeRobot policy does not play here: {WHY_NOT.get(kind, UNKNOWN)}.", key="type", found=kind,
            expected=", ".join(KINDS))  # fmt: skip
    off: dict[str, Any] = {name: False for name in ("compile_model", "gradient_checkpointing") if name in config.lerobot}
    settings = {
        **config.lerobot,
        "device": "cpu",
        "pretrained_path": None,
        **off,
        **KINDS[kind].settings(config.inference_steps),
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
            made = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(folder)
    except Exception as error:  # draccus has errors of its own
        raise InputError(
            "LeRobot does not understand the policy's configuration.", key="lerobot", found=str(error)[:300]
        ) from None
    made.device = str(torch.get_default_device())
    return made


def _build(config: LeRobotConfig, checkpoint: Path | None = None) -> Any:
    """LeRobot's policy, with random weights or a checkpoint's, on torch's default device ("meta": without memory)."""
    made = _configuration(config)
    kind = importlib.import_module("lerobot.policies.factory").get_policy_class(made.type)
    if KINDS[made.type].reads_weights(made):
        made.device = "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(made.device):
        policy = kind(made) if checkpoint is None else kind.from_pretrained(checkpoint, config=made, strict=True)
    return policy


def _processor(theirs: Any, stats: Mapping[str, Mapping[str, Any]]) -> Any:
    """What LeRobot does with an observation of this policy before it sees it, but for moving it to a device."""
    factory, processor = (importlib.import_module(f"lerobot.{name}") for name in ("policies.factory", "processor"))
    numbers = {name: {key: torch.tensor(value) for key, value in of.items()} for name, of in stats.items()}
    before, _ = factory.make_pre_post_processors(theirs.config, dataset_stats=numbers)
    before.steps = [step for step in before.steps if not isinstance(step, processor.DeviceProcessorStep)]
    return before


class LeRobotPolicy(nn.Module):
    """See :class:`postbc.policies.base.Policy`; `chunk` is the part of the horizon that LeRobot plays (`n_action_steps`).

    Its features are what :mod:`postbc.lerobot.steering` says of its kind, of observations as LeRobot's own processors leave them.
    Latent noise (B, T, A) is of the part that is played; the horizon's other actions, which are thrown away, take that of the nearest,
    and what a policy pads its actions with takes 0.
    """

    Config = LeRobotConfig
    shapes: Shapes
    normalization: Normalization
    chunk: int
    feature_dim: int

    def __init__(
        self, config: LeRobotConfig, shapes: Shapes, action_dim: int, chunk: int, normalization: Normalization,
        generator: torch.Generator, observation_steps: int = 1, about: About | None = None, theirs: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.theirs: Any = _build(config) if theirs is None else theirs
        own = self.theirs.config
        require((own.n_obs_steps, own.n_action_steps) == (observation_steps, chunk), "The file contradicts itself.",
                key="n_obs_steps, n_action_steps", found=(observation_steps, chunk))  # fmt: skip
        self.config, self.shapes, self.action_dim, self.chunk = config, dict(shapes), action_dim, chunk
        self.normalization, self.observation_steps, self.about = normalization, observation_steps, about or About()
        self.seen_dim, self.feature_dim = config.seen, config.seen + config.context
        self._kind = KINDS[own.type]
        blank = torch.get_default_device().type == "meta"
        self._processor = None if blank else _processor(self.theirs, config.stats)

    def encode(self, observation: Observation) -> Tensor:
        """Raw named observations -> (B, F); of them learners see the first `seen_dim`."""
        return torch.cat(self.parts(observation), 1)

    def parts(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Features as what learners see (B, S) and what sampling needs besides (B, C)."""
        assert self._processor is not None
        timed = {name: observation[name] for name in self.shapes}
        if self._kind.timed and self.observation_steps == 1:
            timed = {name: value.unsqueeze(1) for name, value in timed.items()}
        state, own = timed["state"].float(), self.config.own
        raw: dict[str, Any] = {STATE: state[..., :own], "task": [self.config.task] * len(state)}
        if state.shape[-1] > own:
            raw[ENVIRONMENT_STATE] = state[..., own:]
        raw |= {theirs: timed[ours].to(state.dtype) / 255 for ours, theirs in self.config.cameras.items()}
        return self._kind.encode(self.theirs, self._processor(raw))

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """It is trained by LeRobot: InputError."""
        raise InputError("A LeRobot policy is trained by LeRobot.", remedy="postbc lerobot train")

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> chunks (B, T, A); deterministic given `noise` (B, T, A)."""
        (rows, width), first = self._kind.noise_shape(self.theirs.config), self._kind.first(self.theirs.config)
        if noise is None:
            if generator is None:
                raise ValueError("sampling needs latent noise, or a generator to draw it from")
            noise = torch.randn(len(features), rows, width, generator=generator, device=features.device)
        else:
            nearest = (torch.arange(rows, device=features.device) - first).clamp(0, self.chunk - 1)
            noise = noise.reshape(len(features), self.chunk, self.action_dim)[:, nearest]
            noise = nn.functional.pad(noise, (0, width - self.action_dim))
        seen, context = features.split((self.config.seen, self.config.context), 1)
        actions = self._kind.sample(self.theirs, seen, context, noise)
        return actions[:, first : first + self.chunk, : self.action_dim]


def _ends(stats: Mapping[str, Tensor], mode: str, width: int) -> tuple[list[float], list[float]]:
    """LeRobot's normalisation as ends of ours: every one of its kinds is affine. A dimension that never changed is 0 by its mean and
    standard deviation, and else -1."""
    known = "IDENTITY", *STATISTICS
    require(mode in known, "LeRobot normalises in a way that is not known here.", key="normalization_mapping", found=mode,
            expected=", ".join(known))  # fmt: skip
    if mode == "IDENTITY" or not stats:
        low, high = torch.full((width,), -1.0, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    else:
        low, high = (stats[name].double() for name in STATISTICS[mode])
    if mode == "MEAN_STD" and stats:
        mean, half = low, high.clamp(min=EPSILON / 2)
        low, high = mean - half, mean + half
    return low.tolist(), torch.maximum(high - EPSILON, low).tolist()  # ours adds that to every range


@schema
class Import:
    """Make a policy of ours of a LeRobot checkpoint, for evaluate, finetune dsrl and finetune best-of-n.

    Kinds: diffusion, multi_task_dit, smolvla, pi0, pi05. Diffusion plays by DDIM.
    """

    checkpoint: Path
    """The pretrained_model folder of lerobot-train."""
    output: Path
    """Directory to write policy.safetensors into."""
    dataset: Path | None = None
    """The dataset that it was trained on (a local folder): names of the state's parts, task, control frequency."""
    task: str | None = None
    """What a policy that reads words is told; default the dataset's task, if it has one alone."""
    inference_steps: Count = 10
    """Denoising steps (DDIM), or steps of a flow's integration."""

    def run(self) -> Path:
        """Convert, check that it is deterministic given its noise, and write; returns the file."""
        file = self.output / "policy.safetensors"
        require(not file.exists(), "There is a policy already.", file=file, remedy="choose another --output")
        policy = import_policy(self.checkpoint, self.dataset, self.inference_steps, self.task)
        check_deterministic(policy, "cpu", self.checkpoint)
        save_policy(file, policy)
        return file


@dataclass(frozen=True)
class _Checkpoint:
    """What lerobot-train leaves: its config.json, and of its processors the statistics and whether they read words."""

    config: dict[str, Any]
    stats: dict[str, dict[str, Tensor]]
    reads_words: bool

    def ends(self, name: str, kind: str) -> tuple[list[float], list[float]]:
        """Of a feature that is STATE, ENV or ACTION."""
        features = {**self.config["input_features"], **self.config["output_features"]}
        mode = self.config["normalization_mapping"].get(kind, "IDENTITY")
        return _ends(self.stats.get(name, {}), mode, int(features[name]["shape"][0]))


def _read(folder: Path) -> _Checkpoint:
    """InputError where a checkpoint is of a kind, or of a configuration, that no latent noise steers."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_bytes())
    kind = str(config["type"])
    why = WHY_NOT.get(kind, UNKNOWN) if kind not in KINDS else KINDS[kind].refused(config)
    require(why is None, f"This LeRobot policy cannot be finetuned here: {why}.", file=folder, key="type", found=kind,
            expected=", ".join(KINDS))  # fmt: skip
    require(STATE in config["input_features"], "The policy reads no state of the robot.", file=folder, key="input_features",
            found=list(config["input_features"]), expected=STATE)  # fmt: skip
    steps = json.loads((folder / "policy_preprocessor.json").read_bytes())["steps"]
    step = next(s for s in steps if s.get("registry_name") == "normalizer_processor")
    numbers = load_file(folder / step["state_file"]) if "state_file" in step else {}
    stats: dict[str, dict[str, Tensor]] = {}
    for name, value in numbers.items():
        feature, _, key = name.rpartition(".")
        if any(key in keys for keys in STATISTICS.values()) and feature in (*config["input_features"], ACTION):
            stats.setdefault(feature, {})[key] = value
    return _Checkpoint(config, stats, any(s.get("registry_name") == "tokenizer_processor" for s in steps))


def import_policy(
    checkpoint: Path, dataset: Path | None = None, inference_steps: int = 10, task: str | None = None
) -> LeRobotPolicy:
    """A LeRobot checkpoint as one of our policies, frozen.

    Raises:
        InputError: no checkpoint, a kind of policy that no latent noise steers, a dataset with other features, or no task for a policy
            that reads words.
    """
    with _blamed(checkpoint):
        read = _read(checkpoint)
        features = read.config["input_features"]
        steps_seen, chunk = int(read.config["n_obs_steps"]), int(read.config["n_action_steps"])
        action_dim = int(read.config["output_features"][ACTION]["shape"][0])
        parts = [name for name in (STATE, ENVIRONMENT_STATE) if name in features]
        both = [read.ends(name, features[name]["type"]) for name in parts]
        low, high = ([x for pair in both for x in pair[i]] for i in range(2))
        normalization = Normalization(low, high, *read.ends(ACTION, "ACTION"))
        visual = [name for name, feature in features.items() if feature["type"] == "VISUAL"]
        cameras = {camera_name(name): name for name in visual if "empty_camera" not in name}
        shapes: dict[str, tuple[int, ...]] = {"state": (len(low),)}
        shapes |= {name: tuple(features[theirs]["shape"]) for name, theirs in cameras.items()}
    about = About(method=None)
    if dataset is not None:
        data = read_dataset(dataset, image_keys=list(cameras))
        require((data.shapes.get("state"), data.action_dim) == (shapes["state"], action_dim),
                "The dataset is not the one that the policy was trained on.", file=dataset, key="observation.state, action",
                found=(data.shapes.get("state"), data.action_dim), expected=(shapes["state"], action_dim))  # fmt: skip
        later = [part.feature != STATE for part in state_parts(data.state_keys, data.state_dims)]
        require(later == sorted(later), "The dataset's state begins with the environment's part, the policy's with the robot's own.",
                file=dataset, key="state", found=list(data.state_keys), remedy="record the robot's own parts first",
                )  # fmt: skip
        facts = Facts.of_dataset(data)
        about = About(task=facts.environment, data=dataset.name, demonstrations=len(data), facts=plain(facts))
        task = data.tasks[0] if task is None and len(data.tasks) == 1 else task
    require(
        not read.reads_words or task, "The policy reads words: which task is it to do?", file=checkpoint, key="task",
        remedy="--task, in the words that it was trained with; --dataset says them where it has one task",
    )  # fmt: skip
    made = LeRobotConfig(
        lerobot=read.config, task=task if read.reads_words and task else "", own=int(features[STATE]["shape"][0]), cameras=cameras,
        stats={name: {key: value.tolist() for key, value in of.items()} for name, of in read.stats.items()},
        inference_steps=inference_steps,
    )  # fmt: skip
    sizes = shapes, action_dim, chunk, normalization, torch.Generator(), steps_seen, about
    with _blamed(checkpoint):
        theirs = _build(made, checkpoint)
        draft = LeRobotPolicy(made, *sizes, theirs).eval().requires_grad_(False)
        time = (steps_seen,) if steps_seen > 1 else ()
        seen, context = draft.parts({name: torch.zeros(1, *time, *shape) for name, shape in shapes.items()})
    made = replace(made, seen=seen.shape[1], context=context.shape[1])
    return LeRobotPolicy(made, *sizes, theirs).eval().requires_grad_(False)


@contextlib.contextmanager
def _blamed(checkpoint: Path) -> Iterator[None]:
    """Whatever goes wrong inside is an :class:`InputError` that names the checkpoint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors, JSON, torch and transformers have errors of their own
        raise InputError("This is no checkpoint of lerobot-train.", file=checkpoint, found=f"{type(error).__name__}: {error}"[:300],
                         expected="a pretrained_model folder: config.json, model.safetensors, policy_preprocessor.json",
                         ) from None  # fmt: skip
