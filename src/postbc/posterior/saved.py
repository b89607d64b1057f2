"""A fitted posterior as a file: the ensemble, and what is needed to use it on the right windows only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.data.normalization import Normalization
from postbc.errors import require
from postbc.files import load_tree, save_tree
from postbc.nn import check_finite, check_weights, header_of
from postbc.posterior.ensemble import Ensemble, EnsembleConfig
from postbc.posterior.factor import Factor
from postbc.schemas import Seed, Width, parse, plain, schema

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


@dataclass(frozen=True, eq=False)
class Posterior:
    """One seed's posterior: saved once, reused by any policy of the same windows."""

    ensemble: Ensemble
    """Fitted, frozen."""
    normalization: Normalization
    """Of the demonstrations that it was fitted on."""
    fingerprint: str
    """Of those demonstrations' windows, so that it is not used with other data by mistake."""
    seed: int
    encoder: str | None = None
    """Fingerprint of the policy whose encoder made the features; None: they are the normalised states."""

    def save(self, directory: str | Path) -> None:
        """Write `directory`/posterior.safetensors.

        Raises:
            NotFiniteError: a weight is NaN or infinite; nothing is written.
        """
        path, e = Path(directory) / POSTERIOR_FILE, self.ensemble
        check_finite(dict(e.named_parameters()), "The ensemble's weights are not finite; the posterior is not saved.", path)
        head = PosteriorHead(
            kind="posterior", seed=self.seed, config=e.config, feature_dim=e.feature_dim, chunk=e.chunk, action_dim=e.action_dim,
            fingerprint=self.fingerprint, normalization=self.normalization.to_dict(), encoder=self.encoder,
        )  # fmt: skip
        save_tree(path, {**plain(head), "parameters": dict(e.named_parameters())})

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
                ensemble = Ensemble(head.config, head.feature_dim, head.chunk, head.action_dim, torch.Generator())
            check_weights(weights, ensemble.state_dict(), path)
            ensemble.load_state_dict(weights, assign=True)
        ensemble.to(device).eval().requires_grad_(False)
        return cls(ensemble, normalization.to(device), head.fingerprint, head.seed, head.encoder)

    @torch.no_grad()
    def factor(self, features: Tensor, batch: int = 1024) -> Factor:
        """(N, F) -> the covariance of the chunk at each state, as at most D rows a state, computed in batches."""
        return Factor(torch.cat([self.ensemble.factor(part).compact().rows for part in features.split(batch)]))
