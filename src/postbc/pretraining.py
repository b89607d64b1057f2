"""Algorithm 2: posterior behavioral cloning. BC, σ-BC and PostBC are one trainer; they differ in the target alone.

ã = a                               BC
ã = a + σ·g,   g ~ N(0, I)          σ-BC
ã = a + α·w,   w ~ N(0, cov(s))     PostBC
ã = a + α·w(g), g ~ N(0, I_R), and the policy observes g: coherent PostBC
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.data.batches import Batches
from postbc.data.episodes import COORDINATES
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import NotFiniteError, require
from postbc.nn import EMA, check_finite, generator_state, set_generator_state
from postbc.policies.base import lacking, policy_tree
from postbc.posterior.factor import Factor
from postbc.progress import progress
from postbc.runs import Checkpoints, Run
from postbc.schemas import Count, NonNegative, Positive, Share, Width, later, schema
from postbc.seeding import make_generator

Method = Literal["bc", "sigma-bc", "postbc", "value-dice"]


@schema
class PretrainingConfig:
    """Algorithm 2 and the optimiser (paper, Table of pretraining; DPPO)."""

    method: Method = "postbc"
    """Target of the regression: bc, sigma-bc or postbc; or value-dice, which is no regression (postbc.value_dice)."""
    posterior_weight: NonNegative | Literal["auto"] = 1.0
    """α, multiplies the posterior's standard deviation (postbc). auto: by trajectories left out (`postbc posterior calibrate`),
    1 at most."""
    sigma: NonNegative = 0.1
    """σ, standard deviation of isotropic noise, normalised units (sigma-bc)."""
    steps: Count = 6000
    """Gradient steps. The paper counts epochs: steps = epochs · ⌈windows / batch⌉."""
    batch_size: Width = 256
    """Windows a step."""
    learning_rate: Positive = 1e-4
    """AdamW's, after warm-up."""
    final_learning_rate: NonNegative = 1e-5
    """AdamW's at the end of the cosine."""
    warmup: Share = 100 / 3000
    """Share of the steps over which the rate rises linearly (DPPO: 100 of 3000 epochs)."""
    weight_decay: NonNegative = 1e-6
    """AdamW's."""
    ema_decay: Share = 0.995
    """Decay of the averaged weights, which are what is saved."""
    ema_every: Count = 10
    """Steps between two updates of the average."""
    ema_start: Share = 20 / 3000
    """Share of the steps before which the average is a plain copy (DPPO: 20 of 3000 epochs)."""
    resample: bool = True
    """Draw w afresh at each step (Algorithm 2), or once for each window."""
    clip_targets: bool = False
    """Clip perturbed targets to the action range. It biases the mean where actions sit at the bound (the gripper)."""
    diagonal: bool = False
    """Use the variances alone, without correlation over chunk and action (LIBERO Best-of-N)."""
    coherent: Annotated[int, Field(ge=0, le=1000)] = later(0)
    """R, leading directions of the posterior whose coordinates the policy observes and an episode keeps; 0: perturb every step anew."""

    def __post_init__(self) -> None:
        require(
            not self.coherent or (self.method == "postbc" and self.resample and not self.diagonal),
            "A coherent policy is PostBC's, of coordinates that are drawn afresh along directions of the whole chunk.", key="coherent",
            found=f"method {self.method}, resample {self.resample}, diagonal {self.diagonal}",
            expected="method postbc, resample, no diagonal",
        )  # fmt: skip


class Target:
    """ã: the one thing in which the methods differ.

    Args:
        config: method, α, σ.
        shape: (N, T, A) of all windows' chunks.
        factor: posterior covariance of every window (postbc).
        generator: no other stream is touched, so α = 0 is BC to the bit.

    Raises:
        InputError: PostBC without a factor, or with one of other windows.
    """

    def __init__(self, config: PretrainingConfig, shape: torch.Size, factor: Factor | None, generator: torch.Generator) -> None:
        if config.method == "postbc":
            require(factor is not None, "PostBC needs a posterior.", key="posterior",
                    remedy="run `postbc posterior fit` first and give --posterior DIR")  # fmt: skip
            require(config.posterior_weight != "auto", "The posterior weight is no number yet.", key="posterior_weight", found="auto",
                    remedy="take Calibration.posterior_weight of postbc.posterior.calibrate")  # fmt: skip
            assert factor is not None
            windows, dim = factor.rows.shape[0], factor.rows.shape[2]
            require((windows, dim) == (shape[0], shape[1] * shape[2]), "The posterior's factor is of other windows.", key="factor",
                    found=f"{windows} windows of {dim} numbers", expected=f"{shape[0]} of {shape[1] * shape[2]}")  # fmt: skip
            require(config.coherent in (0, factor.rows.shape[1]), "The factor has other directions than the policy is to observe.",
                    key="coherent", found=factor.rows.shape[1], expected=config.coherent, remedy="take Posterior.leading")  # fmt: skip
            if not config.coherent:
                factor = (factor.diagonal() if config.diagonal else factor).compact()
            factor = Factor(factor.rows.to(generator.device))
        self.config, self.factor, self.generator, self.shape = config, factor, generator, shape[1:]
        self.fixed: Tensor | None = None
        if not config.resample and config.method != "bc":
            self.fixed = self._draw(torch.arange(shape[0], device=generator.device))

    def coordinates(self, count: int) -> Tensor:
        """(B, R) of coherent PostBC, B = `count`."""
        return torch.randn(count, self.config.coherent, generator=self.generator, device=self.generator.device)

    def _draw(self, rows: Tensor, g: Tensor | None = None) -> Tensor:
        """Perturbation of the windows `rows` (B,), with coordinates (B, R) where they are given: (B, T, A)."""
        if self.config.method == "sigma-bc":
            return self.config.sigma * torch.randn(len(rows), *self.shape, generator=self.generator, device=rows.device)
        assert self.factor is not None
        assert self.config.posterior_weight != "auto"
        w = self.factor.sample(self.generator, rows) if g is None else self.factor.at(g, rows)
        return self.config.posterior_weight * w.view(-1, *self.shape)

    def __call__(self, chunk: Tensor, rows: Tensor, g: Tensor | None = None) -> Tensor:
        """(B, T, A), (B,) -> ã (B, T, A); with coordinates g (B, R) what they imply."""
        if self.config.method == "bc":
            return chunk
        target = chunk + (self._draw(rows, g) if self.fixed is None else self.fixed[rows])
        return target.clamp(-1, 1) if self.config.clip_targets else target


def with_coordinates(observation: Mapping[str, Tensor], g: Tensor, observation_steps: int) -> dict[str, Tensor]:
    """Named observations (B, ...) and a coherent policy's coordinates (B, R), the same at each of several time steps."""
    return {**observation, COORDINATES: g if observation_steps == 1 else g[:, None].expand(-1, observation_steps, -1)}


class Pretraining:
    """Trains a policy step by step; `state`/`load_state` make it resumable bit for bit.

    Args:
        policy: any :class:`~postbc.policies.base.Policy` that is also a `torch.nn.Module`; trained in place.
        windows: of the demonstrations, raw units.
        config: method and optimiser.
        seed: of data order, the loss's and the target's noise.
        factor: posterior covariance of every window, in the order of `windows` (postbc).
        compute: device, precision, compilation.
    """

    def __init__(
        self,
        policy: Any,
        windows: Windows,
        config: PretrainingConfig,
        seed: int,
        factor: Factor | None = None,
        compute: Compute | None = None,
    ) -> None:
        missing = lacking(policy)
        require(config.method != "value-dice", "ValueDICE is no regression.", key="pretraining.method", found="value-dice",
                remedy="see postbc.value_dice")  # fmt: skip
        require(
            isinstance(policy, torch.nn.Module) and not missing, "This is not a policy that can be trained.",
            found=type(policy).__name__ + (" without " + ", ".join(missing) if missing else ""),
            remedy="see docs/bring-your-own-policy.md",
            expected="a torch.nn.Module with encode, loss, sample and the attributes of postbc.policies.base.Policy",
        )  # fmt: skip
        reads = policy.shapes.get(COORDINATES, (0,))[0]
        require(reads == config.coherent, "The policy does not read the coordinates that it is to be trained with.", key="coherent",
                found=reads, expected=config.coherent, remedy=f"make it of shapes with '{COORDINATES}'")  # fmt: skip
        self.compute = (compute or Compute()).resolved()
        self.device = device = self.compute.start()
        self.policy: Any = policy.to(device).train()
        self.windows, self.config, self.done = windows, config, 0
        names = ("data", "loss", "target", "crop", "dropout")
        self.streams = {name: make_generator(seed, f"pretraining/{name}", device) for name in names}
        self.augments = bool(getattr(policy, "augments", False))
        self.drops = any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in policy.modules())
        every = torch.arange(len(windows), device=windows.device)
        self.chunks = policy.normalization.normalize_action(windows.chunk(every).to(device))
        inside = windows.inside(every)
        self.inside = None if inside is None else inside.to(device)
        self.target = Target(config, self.chunks.shape, factor, self.streams["target"])
        self.batches = Batches(windows, self._draw, self.streams["data"], device)
        self.ema = EMA(policy, config.ema_decay)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.losses = self._losses
        if self.compute.compile:  # random numbers are drawn between its parts
            self.losses = torch.compile(self._losses, mode="reduce-overhead" if device.type == "cuda" else None)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_learning_rate`."""
        c = self.config
        warm = max(1, round(c.warmup * c.steps))
        if step < warm:
            return c.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, c.steps - warm)
        return c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * along))

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Windows of a batch (B,)."""
        return torch.randint(len(self.chunks), (self.config.batch_size,), generator=generator, device=self.device)

    def _losses(self, observation: Mapping[str, Tensor], target: Tensor, *weight: Tensor) -> Tensor:
        """(B,): the policy's own loss, through its encoder."""
        augmentation = (self.streams["crop"],) if self.augments else ()
        losses: Tensor = self.policy.loss(self.policy.encode(observation, *augmentation), target, self.streams["loss"], *weight)
        return losses

    def step(self) -> Tensor:
        """One gradient step; returns its loss ()."""
        config = self.config
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.done)
        rows, observation = self.batches.next()
        g = self.target.coordinates(len(rows)) if config.coherent else None
        target = self.target(self.chunks[rows], rows, g)
        if g is not None:
            observation = with_coordinates(observation, g, self.policy.observation_steps)
        weight: tuple[Tensor, ...] = ()
        if self.inside is not None:  # padding is left as it is, and out of the loss
            inside = self.inside[rows]
            target, weight = torch.where(inside[..., None], target, self.chunks[rows]), (inside.to(target.dtype),)
        if self.compute.compile and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        if self.drops:  # dropout draws torch's own numbers: each step has a seed of its own for them
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.streams["dropout"], device=self.device)))
        with self.compute.autocast():
            loss = self.losses(observation, target, *weight).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.done += 1
        if self.done % config.ema_every == 0:
            if self.done < config.ema_start * config.steps:
                self.ema.copy()
            else:
                self.ema.update()
        return loss.detach()

    def finish(self) -> None:
        """Put the averaged weights into the policy, which is what is evaluated, finetuned and saved.

        Raises:
            NotFiniteError: they are NaN or infinite.
        """
        self.batches.restart()  # reads no more
        if self.done < self.config.ema_every:  # too short for an average
            self.ema.copy()
        check_finite(self.ema.state_dict(), "The policy's weights are not finite; it is not saved.", remedy=REMEDY)
        self.policy.load_state_dict(self.ema.state_dict(), strict=False)
        self.policy.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Everything that decides the remaining steps."""
        return {
            "policy": self.policy.state_dict(),
            "averaged": policy_tree(self.policy, self.ema.state_dict()),  # plays: load_policy(checkpoint)
            "optimiser": self.optimiser.state_dict(),
            "streams": {name: generator_state(g) for name, g in self.streams.items()},
            "done": self.done,
            "ema_updates": self.ema.updates,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.policy.load_state_dict(state["policy"])
        self.ema.load_state_dict(state["averaged"]["parameters"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, saved in state["streams"].items():  # of former files fewer: what those policies drew
            set_generator_state(self.streams[name], saved)
        self.done, self.ema.updates = int(state["done"]), int(state["ema_updates"])
        self.batches.restart()


REMEDY = "lower pretraining.learning_rate, or look at the demonstrations with `postbc demos inspect`"


def pretrain(
    policy: Any,
    windows: Windows,
    config: PretrainingConfig,
    seed: int,
    factor: Factor | None = None,
    compute: Compute | None = None,
    run: Run | None = None,
    log_every: int = 1000,
    checkpoint_seconds: float = 60.0,
) -> Any:
    """Algorithm 2. Trains `policy` (in place) and returns it with its averaged weights, frozen; resumable when a `run` is given.

    Args:
        policy, windows, config, seed, factor, compute: as :class:`Pretraining` takes them.
        run: directory that checkpoints and metrics go to.
        log_every: steps between two rows of metrics.
        checkpoint_seconds: time between two checkpoints.

    Raises:
        InputError: PostBC without a factor, or with one of other windows.
        NotFiniteError: the loss or a weight is not finite.
    """
    train(
        Pretraining(policy, windows, config, seed, factor, compute), f"pretraining {config.method}, seed {seed}", config.steps, run,
        log_every, checkpoint_seconds,
    )  # fmt: skip
    return policy


def train(
    training: Any, title: str, steps: int, run: Run | None = None, log_every: int = 1000, checkpoint_seconds: float = 60.0
) -> None:
    """The loop of a pretraining (`step`, `done`, `state`, `load_state`, `finish`): `steps` steps, resumable when a `run` is given.

    Raises:
        NotFiniteError: the loss or a weight is not finite.
    """
    found = run.load() if run else None
    if run and found:
        with run.restoring():
            training.load_state(found[1])
    checkpoints = Checkpoints(run, checkpoint_seconds)
    with progress(title, steps, training.done) as bar:
        while training.done < steps:
            loss = training.step()
            if training.done % log_every == 0 or training.done == steps:
                if not bool(torch.isfinite(loss)):
                    raise NotFiniteError("The loss is not finite; the policy is not saved.", key=f"step {training.done}",
                                         found=loss.item(), remedy=REMEDY)  # fmt: skip
                if run:
                    run.log(training.done, {"pretraining/loss": loss.item()})
            if checkpoints.due:
                checkpoints.save(training.done, training.state())
            bar.advance(loss=loss)
    training.finish()
