"""A fitted posterior as a file: the ensemble or the closed form, and what is needed to use it on the right windows only."""

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
from postbc.posterior.closed_form import Choice, ClosedForm
from postbc.posterior.ensemble import Ensemble, EnsembleConfig
from postbc.posterior.factor import Factor
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
    closed_form: Choice | None = later(None)
    """None: an ensemble."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """One seed's posterior: saved once, reused by any policy of the same windows."""

    model: Ensemble | ClosedForm
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
        path, m = Path(directory) / POSTERIOR_FILE, self.model
        check_finite(m.state_dict(), "The weights are not finite; the posterior is not saved.", path)
        head = PosteriorHead(
            kind="posterior", seed=self.seed, config=m.config, feature_dim=m.feature_dim, chunk=m.chunk, action_dim=m.action_dim,
            fingerprint=self.fingerprint, normalization=self.normalization.to_dict(), encoder=self.encoder,
            closed_form=m.choice if isinstance(m, ClosedForm) else None,
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
                sizes = (head.feature_dim, head.chunk, head.action_dim)
                model = (
                    Ensemble(head.config, *sizes, torch.Generator()) if head.closed_form is None
                    else ClosedForm(head.config, head.closed_form, *sizes)
                )  # fmt: skip
            check_weights(weights, model.state_dict(), path)
            model.load_state_dict(weights, assign=True)
        model.to(device).eval().requires_grad_(False)
        return cls(model, normalization.to(device), head.fingerprint, head.seed, head.encoder)

    @torch.no_grad()
    def factor(self, features: Tensor, batch: int = 1024) -> Factor:
        """(N, F) -> the covariance of the chunk at each state, as at most D rows a state, computed in batches."""
        return Factor(torch.cat([self.model.factor(part).compact().rows for part in features.split(batch)]))

    @torch.no_grad()
    def leading(self, features: Tensor, rank: int, batch: int = 1024) -> tuple[Factor, float]:
        """(N, F) -> the R = `rank` directions among members that hold most of the variance there, as R rows a state; and their share.

        The directions are the same at every state, so that coordinates along them mean the same hypothesis everywhere.

        Raises:
            InputError: the posterior has fewer members (a closed form: groups of trajectories).
        """
        members = self.model.choice.groups if isinstance(self.model, ClosedForm) else self.model.config.ensemble_size
        require(rank < members, "The posterior has not so many directions.", key="coherent", found=rank,
                expected=f"less than {members}")  # fmt: skip
        gram = torch.zeros(members, members, dtype=torch.float64)
        for part in features.split(batch):
            rows = self.model.factor(part).rows.cpu().double()
            gram += torch.einsum("nkd,nld->kl", rows, rows)
        values, vectors = torch.linalg.eigh(gram)
        basis = vectors.flip(1)[:, :rank].to(features)
        leading = [torch.einsum("nkd,kr->nrd", self.model.factor(part).rows, basis) for part in features.split(batch)]
        return Factor(torch.cat(leading)), (values[-rank:].sum() / values.sum().clamp(min=1e-30)).item()
