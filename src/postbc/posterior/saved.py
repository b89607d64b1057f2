"""A fitted posterior as a file: its ensemble or closed form, and what is needed to use it on the right windows only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.data.normalization import Normalization
from postbc.data.windows import Windows
from postbc.errors import require
from postbc.files import load_tree, save_tree
from postbc.nn import check_finite, check_weights, from_file, header_of
from postbc.posterior.calibration import OutOfBag
from postbc.posterior.closed_form import Choice, ClosedForm
from postbc.posterior.ensemble import Ensemble, EnsembleConfig
from postbc.posterior.factor import Factor
from postbc.posterior.features import Encode, window_features
from postbc.posterior.seeing import SeeingEnsemble
from postbc.schemas import Seed, Width, later, parse, plain, schema

POSTERIOR_FILE = "posterior.safetensors"
Model = Ensemble | SeeingEnsemble | ClosedForm
At = Tensor | Windows
"""What a posterior is asked about: features (N, F), or, if its members see, windows."""


@schema
class PosteriorHead:
    """All of a posterior's file but the weights."""

    kind: Literal["posterior"]
    seed: Seed
    config: EnsembleConfig
    feature_dim: Width
    chunk: Width
    action_dim: Width
    fingerprint: Annotated[str, Field(max_length=200)]
    normalization: dict[str, Any]
    encoder: Annotated[str, Field(max_length=200)] | None
    closed_form: Choice | None = later(None)
    """None: an ensemble."""
    shapes: dict[str, Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)]] | None = later(None)
    """Of what members with encoders of their own observe; None: they look at features."""
    observation_steps: Annotated[int, Field(ge=1, le=1000)] = later(1)
    """Of those observations."""

    def make(self, state_features: int) -> Model:
        """The model, its weights drawn; `state_features` of the normalisation."""
        sizes, nothing = (self.chunk, self.action_dim), torch.Generator()
        if self.closed_form is not None:
            return ClosedForm(self.config, self.closed_form, self.feature_dim, *sizes)
        if self.config.encoder == "features":
            return Ensemble(self.config, self.feature_dim, *sizes, nothing)
        require(self.shapes is not None, "The header does not say what is observed.", key="shapes")
        return SeeingEnsemble(self.config, self.shapes or {}, self.observation_steps, *sizes, nothing, state_features)


@dataclass(frozen=True, eq=False)
class Posterior:
    """One seed's posterior: saved once, reused by any policy of the same windows."""

    model: Model
    """Fitted, frozen."""
    normalization: Normalization
    """Of the demonstrations that it was fitted on."""
    fingerprint: str
    """Of those demonstrations' windows, so that it is not used with other data by mistake."""
    seed: int
    encoder: str | None = None
    """Fingerprint of the policy whose encoder made the features; None: they are the normalised states, or there are none."""

    def save(self, directory: str | Path) -> None:
        """Write `directory`/posterior.safetensors.

        Raises:
            NotFiniteError: a weight is NaN or infinite; nothing is written.
        """
        path, m = Path(directory) / POSTERIOR_FILE, self.model
        check_finite(m.state_dict(), "The weights are not finite; the posterior is not saved.", path)
        shapes, steps = (m.shapes, m.observation_steps) if isinstance(m, SeeingEnsemble) else (None, 1)
        head = PosteriorHead(
            kind="posterior", seed=self.seed, config=m.config, feature_dim=m.feature_dim, chunk=m.chunk, action_dim=m.action_dim,
            fingerprint=self.fingerprint, normalization=self.normalization.to_dict(), encoder=self.encoder,
            closed_form=m.choice if isinstance(m, ClosedForm) else None, shapes=shapes, observation_steps=steps,
        )  # fmt: skip
        save_tree(path, {**plain(head), "parameters": m.state_dict()})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Posterior:
        """Read what :meth:`save` wrote: a file, or the directory with it.

        Raises:
            InputError: no posterior there, or one whose header does not fit its weights.
        """
        path = Path(path)
        path = path / POSTERIOR_FILE if path.is_dir() else path
        require(path.exists(), "There is no posterior here.", file=path,
                remedy="run `postbc posterior fit`, or wait until it has finished")  # fmt: skip
        tree = load_tree(path, kind="posterior")
        weights = tree.pop("parameters", None)
        head = parse(PosteriorHead, tree, path)
        with header_of(path, "posterior"):
            normalization = Normalization.from_dict(head.normalization)
            require(normalization.action_dim == head.action_dim, "The normalisation has another width than the posterior.",
                    key="action_dim", found=normalization.action_dim, expected=head.action_dim)  # fmt: skip
            with torch.device("meta"):  # shapes without memory: a header may ask for anything
                blank = head.make(normalization.state_features)
            check_weights(weights, blank.state_dict(), path)
            model = blank
            if isinstance(blank, SeeingEnsemble):  # whose encoders have buffers that no file holds
                with from_file():
                    model = head.make(normalization.state_features)
            model.load_state_dict(weights, assign=True)
        model.to(device).eval().requires_grad_(False)
        return cls(model, normalization.to(device), head.fingerprint, head.seed, head.encoder)

    def at(self, windows: Windows, encode: Encode | None = None) -> At:
        """What the model looks at of every window: the features (N, F) that `encode` makes, or the windows themselves."""
        if isinstance(self.model, SeeingEnsemble):
            return windows
        require(encode is not None, "This posterior looks at features.", key="encoder", found="none")
        assert encode is not None
        return window_features(windows, encode)

    def of_windows(self, windows: Windows, encode: Encode | None = None) -> Factor:
        """The covariance at every window; `encode` makes the features of a model that looks at some."""
        return self.factor(self.at(windows, encode))

    @torch.no_grad()
    def factor(self, at: At, batch: int = 1024) -> Factor:
        """The covariance of the chunk at features (N, F), or at windows if members see, as at most D rows each, in batches."""
        return Factor(torch.cat([part.compact().rows for part in self._factors(at, batch)]))

    @torch.no_grad()
    def leading(self, at: At, rank: int, batch: int = 1024) -> tuple[Factor, float]:
        """The R = `rank` directions among members that hold most of the variance there, as R rows a state; and their share.

        The directions are the same at every state, so that coordinates along them mean the same hypothesis everywhere.

        Args:
            at: as :meth:`factor` takes it.
            rank: R.
            batch: states at a time.

        Raises:
            InputError: the posterior has fewer members (a closed form: groups of trajectories).
        """
        members = self.model.choice.groups if isinstance(self.model, ClosedForm) else self.model.config.ensemble_size
        require(rank < members, "The posterior has not so many directions.", key="coherent", found=rank,
                expected=f"less than {members}")  # fmt: skip
        gram = torch.zeros(members, members, dtype=torch.float64)
        for part in self._factors(at, batch):
            rows = part.rows.cpu().double()
            gram += torch.einsum("nkd,nld->kl", rows, rows)
        values, vectors = torch.linalg.eigh(gram)
        basis = vectors.flip(1)[:, :rank]
        leading = [torch.einsum("nkd,kr->nrd", part.rows, basis.to(part.rows)) for part in self._factors(at, batch)]
        return Factor(torch.cat(leading)), (values[-rank:].sum() / values.sum().clamp(min=1e-30)).item()

    def out_of_bag(self, at: At, chunks: Tensor, episode: Tensor) -> OutOfBag:
        """Trajectories as what was fitted without them predicts them.

        Args:
            at, chunks, episode: those that it was fitted with; `at` as :meth:`factor` takes it.

        Raises:
            InputError: no trajectory can be left out.
        """
        if isinstance(self.model, SeeingEnsemble):
            parts = self.model.predictions(self._windows(at), self.normalization)
            return self.model.left_out(parts, chunks, episode, self.seed)
        return self.model.out_of_bag(self._features(at), chunks, episode, self.seed)

    def _factors(self, at: At, batch: int) -> Iterator[Factor]:
        """The covariance, a row a member, part by part."""
        if isinstance(self.model, SeeingEnsemble):
            return map(Factor.from_predictions, self.model.predictions(self._windows(at), self.normalization))
        return map(self.model.factor, self._features(at).split(batch))

    def _windows(self, at: At) -> Windows:
        require(isinstance(at, Windows), "This posterior looks at images, not at features.", key="encoder", found="own")
        assert isinstance(at, Windows)
        return at

    def _features(self, at: At) -> Tensor:
        require(isinstance(at, Tensor), "This posterior looks at features.", key="encoder", found="windows")
        assert isinstance(at, Tensor)
        require(at.shape[1] == self.model.feature_dim, "These are not the features that the posterior was fitted on.",
                key="feature_dim", found=at.shape[1], expected=self.model.feature_dim)  # fmt: skip
        return at
