"""Algorithm 1 from images in the paper's way: K regressors, each with an image encoder of its own, trained end to end.

They learn one after another, a step each: convolutions fill a device, and one member's activations at a time take the memory of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postbc.data.batches import Batches, read_ahead
from postbc.data.normalization import Normalization
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import MLP, check_memory, generator_state, set_generator_state
from postbc.policies.networks.encoders import Encoder
from postbc.posterior.ensemble import Bootstrapped, EnsembleConfig, Regressors, train_ensemble
from postbc.posterior.factor import Factor
from postbc.posterior.member import AdamState, adam
from postbc.runs import Run
from postbc.seeding import make_generator

Shapes = Mapping[str, tuple[int, ...]]


class Member(nn.Module):
    """One regressor: an encoder and a multilayer perceptron; raw named observations of B states -> (B, outputs)."""

    def __init__(
        self, config: EnsembleConfig, shapes: Shapes, observation_steps: int, outputs: int, generator: torch.Generator,
        state_features: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = Encoder(config.vision, shapes, observation_steps, generator, state_features)
        self.head = MLP(self.encoder.feature_dim, (config.hidden,) * config.layers, outputs, generator)

    def forward(
        self, observation: Mapping[str, Tensor], normalization: Normalization, generator: torch.Generator | None = None
    ) -> Tensor:
        output: Tensor = self.head(self.encoder(observation, normalization, generator))
        return output


class SeeingEnsemble(Regressors):
    """K regressors from raw named observations to chunks (K, B, D), in normalised units.

    Args:
        config: architecture and training; its `vision` are the encoders.
        shapes: name -> shape of what is observed, images among it.
        observation_steps: To, newest observations.
        chunk: T.
        action_dim: A.
        generator: source of the members' initialisation, one after another.
        state_features: as encoders take it.

    Raises:
        InputError: no image is observed, or one that the encoders cannot take.
    """

    def __init__(
        self, config: EnsembleConfig, shapes: Shapes, observation_steps: int, chunk: int, action_dim: int,
        generator: torch.Generator, state_features: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, chunk, action_dim)
        require(any(len(shape) == 3 for shape in shapes.values()), "There are no images for encoders.", key="ensemble.encoder",
                found=f"own, and observations {', '.join(shapes)}", expected="features",
                remedy="leave it out, or give --data.image-keys")  # fmt: skip
        self.shapes, self.observation_steps = {name: tuple(shape) for name, shape in shapes.items()}, observation_steps
        what = config, shapes, observation_steps, self.outputs, generator, state_features
        made = (Member(*what) for _ in range(config.ensemble_size))
        self.members = nn.ModuleList(made)
        first: Any = self.members[0]
        self.feature_dim = first.encoder.feature_dim

    @torch.no_grad()
    def predict(self, observation: Mapping[str, Tensor], normalization: Normalization) -> Tensor:
        """Raw named observations of B states -> (K, B, D): every member's predicted chunk."""
        return self.predicted(torch.stack([member(observation, normalization) for member in self.members]))

    def predictions(self, windows: Windows, normalization: Normalization, batch: int = 256) -> Iterator[Tensor]:
        """Every member's predicted chunks (K, n, D) at all windows, in their order, part by part."""
        every, device = torch.arange(len(windows)).split(batch), next(self.parameters()).device
        for observation in read_ahead(windows, every, device):
            yield self.predict(observation, normalization)

    def factor(self, windows: Windows, normalization: Normalization, batch: int = 256) -> Factor:
        """The posterior covariance of the chunk at every window (Algorithm 1, last line), as at most D rows each."""
        parts = self.predictions(windows, normalization, batch)
        return Factor(torch.cat([Factor.from_predictions(part).compact().rows for part in parts]))


class SeeingTraining(Bootstrapped):
    """Trains such an ensemble; `state`/`load_state` make it resumable bit for bit.

    Args:
        windows: of the demonstrations, raw units.
        normalization: of their states.
        seed: of the places of random crops, too; the others as :class:`~postbc.posterior.ensemble.Bootstrapped` takes them.
    """

    block = 1

    def __init__(self, ensemble: SeeingEnsemble, windows: Windows, chunks: Tensor, normalization: Normalization, seed: int,
                 compute: Compute | None = None) -> None:  # fmt: skip
        super().__init__(ensemble, chunks, torch.as_tensor(windows.episode), seed, compute)
        self.normalization = normalization.to(self.device)
        each = len(self.parameters) // self.config.ensemble_size
        values, first, second, steps = self.adam
        parts = [slice(k * each, (k + 1) * each) for k in range(self.config.ensemble_size)]
        self.members = [AdamState(values[part], first[part], second[part], steps.clone()) for part in parts]
        self.parts = parts
        self.crop = make_generator(seed, "ensemble/crop", self.device)
        # a draw is a batch for each member
        self.batches = Batches(windows, lambda g: self.sampler.draw(self.config.batch_size, g), self.data, self.device)
        self.losses = torch.compile(self._loss) if self.compute.compile else self._loss

    def train(self, steps: int) -> Tensor:
        for _ in range(steps):
            losses = [self._train_member(k, *self.batches.next()) for k in range(self.config.ensemble_size)]
        return torch.stack(losses)

    def _train_member(self, k: int, rows: Tensor, observation: Mapping[str, Tensor]) -> Tensor:
        """A step of member k; its loss ()."""
        part = self.parts[k]
        parameters = self.parameters[part]
        with self.compute.autocast():
            loss = self.losses(self.ensemble.members[k], observation, self.targets_of(k, rows))
        total = loss
        for parameter, anchor in zip(parameters, self.anchors[part]):
            total = total + self.pull * (parameter - anchor).square().sum()
        adam(self.members[k], torch.autograd.grad(total, parameters), self.lr)
        return loss.detach()

    def _loss(self, member: nn.Module, observation: Mapping[str, Tensor], target: Tensor) -> Tensor:
        output = member(observation, self.normalization, self.crop if self.config.vision.crop else None)
        loss: Tensor = self.ensemble.loss_of(output.float()[None], target[None])[0]
        return loss

    def state(self) -> dict[str, Any]:
        return {**super().state(), "crop": generator_state(self.crop)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        set_generator_state(self.crop, state["crop"])
        self.batches.restart()


def fit_seeing_ensemble(
    windows: Windows,
    normalization: Normalization,
    config: EnsembleConfig,
    seed: int,
    compute: Compute | None = None,
    run: Run | None = None,
    checkpoint_seconds: float = 60.0,
    vectors: Tensor | None = None,
) -> SeeingEnsemble:
    """Fit one ensemble whose members have encoders of their own; resumable when a `run` is given.

    Args:
        windows: of the demonstrations, raw units, images among their observations.
        normalization: of states and actions.
        config, seed, compute, run, checkpoint_seconds: as :func:`~postbc.posterior.ensemble.fit_ensemble` takes them.
        vectors: (E, V) what members read in place of the one-hot "language".

    Returns:
        The fitted ensemble, frozen.

    Raises:
        InputError: no image is observed, or one that the encoders cannot take.
        NotFiniteError: a member's loss is not finite.
    """
    compute = (compute or Compute()).resolved()
    device = compute.start()
    if vectors is not None:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, language=vectors.shape[1]))
    generator = make_generator(seed, "ensemble/initialisation")
    what = (config, windows.shapes, windows.observation_steps, windows.chunk_size, windows.action_dim, generator,
            normalization.state_features)  # fmt: skip
    with torch.device("meta"):
        check_memory(SeeingEnsemble(*what), 4, device, "ensemble")
    ensemble = SeeingEnsemble(*what).to(device)
    if vectors is not None:
        for member in ensemble.members:
            member.get_buffer("encoder.vectors").copy_(vectors)
    chunks = normalization.normalize_action(windows.chunk(torch.arange(len(windows))))
    training = SeeingTraining(ensemble, windows, chunks, normalization, seed, compute)
    fitted: SeeingEnsemble = train_ensemble(training, seed, run, checkpoint_seconds=checkpoint_seconds)
    training.batches.restart()
    return fitted
