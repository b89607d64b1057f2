"""A fitted posterior as a file: the ensemble, and what is needed to use it on the right windows only."""

from __future__ import annotations

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
from postbc.posterior.ensemble import Ensemble, EnsembleConfig
from postbc.posterior.factor import Factor
from postbc.posterior.features import Encode, window_features
from postbc.posterior.seeing import SeeingEnsemble
from postbc.schemas import Seed, Width, later, parse, plain, schema

POSTERIOR_FILE = "posterior.safetensors"


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
    shapes: dict[str, Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)]] | None = later(None)
    """Of what members with encoders of their own observe; None: they look at features."""
    observation_steps: Annotated[int, Field(ge=1, le=1000)] = later(1)
    """Of those observations."""

    def make(self) -> Ensemble | SeeingEnsemble:
        """The ensemble, its weights drawn."""
        if self.config.encoder == "features":
            return Ensemble(self.config, self.feature_dim, self.chunk, self.action_dim, torch.Generator())
        require(self.shapes is not None, "The header does not say what is observed.", key="shapes")
        return SeeingEnsemble(
            self.config, self.shapes or {}, self.observation_steps, self.chunk, self.action_dim, torch.Generator()
        )


@dataclass(frozen=True, eq=False)
class Posterior:
    """One seed's posterior: saved once, reused by any policy of the same windows."""

    ensemble: Ensemble | SeeingEnsemble
    """Fitted, frozen: of features, or of raw observations."""
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
        path, e = Path(directory) / POSTERIOR_FILE, self.ensemble
        check_finite(e.state_dict(), "The ensemble's weights are not finite; the posterior is not saved.", path)
        shapes, steps = (e.shapes, e.observation_steps) if isinstance(e, SeeingEnsemble) else (None, 1)
        head = PosteriorHead(
            kind="posterior", seed=self.seed, config=e.config, feature_dim=e.feature_dim, chunk=e.chunk, action_dim=e.action_dim,
            fingerprint=self.fingerprint, normalization=self.normalization.to_dict(), encoder=self.encoder,
            shapes=shapes, observation_steps=steps,
        )  # fmt: skip
        save_tree(path, {**plain(head), "parameters": e.state_dict()})

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
                blank = head.make()
            check_weights(weights, blank.state_dict(), path)
            ensemble = blank
            if isinstance(blank, SeeingEnsemble):  # whose encoders have buffers that no file holds
                with from_file():
                    ensemble = head.make()
            ensemble.load_state_dict(weights, assign=True)
        ensemble.to(device).eval().requires_grad_(False)
        return cls(ensemble, normalization.to(device), head.fingerprint, head.seed, head.encoder)

    @torch.no_grad()
    def factor(self, features: Tensor, batch: int = 1024) -> Factor:
        """(N, F) -> the covariance of the chunk at each state, as at most D rows a state, computed in batches."""
        require(
            isinstance(self.ensemble, Ensemble), "This posterior looks at images, not at features.", key="encoder", found="own"
        )
        require(features.shape[1] == self.ensemble.feature_dim, "These are not the features that the posterior was fitted on.",
                key="feature_dim", found=features.shape[1], expected=self.ensemble.feature_dim)  # fmt: skip
        assert isinstance(self.ensemble, Ensemble)
        return Factor(torch.cat([self.ensemble.factor(part).compact().rows for part in features.split(batch)]))

    def of_windows(self, windows: Windows, encode: Encode | None = None) -> Factor:
        """The covariance at every window; `encode` makes the features of an ensemble that looks at some."""
        if isinstance(self.ensemble, SeeingEnsemble):
            return self.ensemble.factor(windows, self.normalization)
        require(encode is not None, "This posterior looks at features.", key="encoder", found="none")
        assert encode is not None
        return self.factor(window_features(windows, encode))
