"""The posterior without an ensemble: ridge regression on the features of one regressor, and what leaving each trajectory out changes.

f(s) = φ(s)ᵀW with φ = [hidden features, 1] is refitted without trajectory b exactly and for the price of a small linear system:
the residuals of b's own windows, predicted without b, are (I − M_bb)⁻¹(y_b − f_b) with the hat matrix M = Φ(ΦᵀΦ + λI)⁻¹Φᵀ. The
delete-one-trajectory jackknife (Tukey 1958; Efron and Stein 1981) of these fits f₋₁ … f₋G is the covariance:
cov(s) = (G−1)/G · Σ_b (f₋_b − f̄)(f₋_b − f̄)ᵀ. Hundreds of trajectories are left out in groups.

The regressor's features have seen every trajectory, so what it says of one "left out" is far too good. Two more regressors, of half of
the trajectories each, give features that have not. By the other half, predicted from those, ridge and layer are chosen and α is found.

The jackknife moves the last layer only, and is too narrow for networks of which every layer is trained. How wide those are, the halves
tell: they are independent, so that their mean squared difference is the sum of their variances, each that of a network of all over
its share of the trajectories. One number brings the jackknife's variance to it, in the mean over windows and dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import StackedMLP
from postbc.posterior.calibration import FEW_WINDOWS, WINDOWS, OutOfBag, best_likelihood, evenly
from postbc.posterior.ensemble import EnsembleConfig, fit_ensemble
from postbc.posterior.factor import Factor
from postbc.runs import Run
from postbc.schemas import Positive, schema
from postbc.seeding import make_generator

REGRESSORS = 3
"""Networks that are trained: of all trajectories, and of either half."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ that are tried; the features are scaled to a mean square norm of 1, so that it counts windows."""
GROUPS = 10
"""Groups of trajectories that are left out, two at a time, to choose ridge and layer. Even: a group lies in one half."""


@schema
class ClosedFormConfig:
    """The closed form (not in the paper). Its regressors are members of `ensemble`: hidden, layers, steps, ….."""

    ridge: Positive | None = None
    """λ, penalty of the weights on features of mean square norm 1; default: chosen by trajectories left out."""
    layer: Annotated[int, Field(ge=0, le=99)] | None = None
    """Hidden layer whose features are taken, counted from 1; 0: the regressor's own inputs (an encoder's features), and no regressor
    is trained; default: chosen."""
    blocks: Annotated[int, Field(ge=2, le=1000)] = 50
    """G at most: more trajectories than that are left out in so many groups."""


@schema
class Choice:
    """What a closed form is made with."""

    ridge: Positive
    layer: Annotated[int, Field(ge=0, le=99)]
    groups: Annotated[int, Field(ge=1, le=1000)]
    """G, groups of trajectories that are left out."""


# -- ridge regression ----------------------------------------------------------------------------------------------------------
class Ridge:
    """Ridge regression, and its fits without any of the groups that the windows are in, exactly.

    Args:
        inputs: (N, P).
        targets: (N, D).
        group: (N,) numbers from 0.
        ridge: λ > 0.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, group: Tensor, ridge: float = 1.0) -> None:
        inputs, self.targets = inputs.double(), targets.double()
        values, self.basis = torch.linalg.eigh(inputs.T @ inputs)
        self.values, self.inputs = values.clamp(min=0), inputs @ self.basis  # in this basis ΦᵀΦ is diagonal
        self.products = self.inputs.T @ self.targets
        self.rows = [torch.nonzero(group == g)[:, 0] for g in range(int(group.max()) + 1)]
        self._grams: dict[int, Tensor] = {}
        self._without: dict[frozenset[int], Tensor] = {}
        self.at(ridge)

    def at(self, ridge: float) -> Ridge:
        """The same with another λ."""
        self.precision = self.values + ridge
        self.whole = self.products / self.precision[:, None]
        self._without.clear()
        return self

    def _gram(self, group: int) -> Tensor:
        if group not in self._grams:
            z = self.inputs[self.rows[group]]
            self._grams[group] = z.T @ z
        return self._grams[group]

    def without(self, *groups: int) -> Tensor:
        """(P, D): the weights of the fit without these groups, in the basis of `inputs`."""
        key = frozenset(groups)
        if key not in self._without:
            self._without[key] = self._fit_without(*groups)
        return self._without[key]

    def _fit_without(self, *groups: int) -> Tensor:
        rows = torch.cat([self.rows[g] for g in groups])
        z, y = self.inputs[rows], self.targets[rows]
        if len(rows) <= z.shape[1]:  # through the hat matrix: fewer windows than weights
            hat = (z / self.precision) @ z.T
            return (
                self.whole
                - z.T @ _solve(torch.eye(len(rows), dtype=z.dtype) - hat, y - z @ self.whole) / self.precision[:, None]
            )
        gram = torch.stack([self._gram(g) for g in groups]).sum(0)
        return _solve(torch.diag(self.precision) - gram, self.products - z.T @ y)

    def residuals(self, rows: Tensor, *groups: int) -> Tensor:
        """(n, D): targets of the windows `rows` (n,) less their prediction by the fit without these groups."""
        return self.targets[rows] - self.inputs[rows] @ self.without(*groups)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def jackknife(predictions: Tensor) -> Factor:
    """(G, N, D) predictions, each without one group -> the covariance of the prediction by all."""
    groups = len(predictions)
    centred = predictions - predictions.mean(0)
    return Factor((centred * ((groups - 1) / groups) ** 0.5).transpose(0, 1).contiguous())


def left_out(ridge: Ridge, of: Sequence[int], bound: float, rows: Sequence[Tensor]) -> tuple[Tensor, Factor]:
    """The groups `of` predicted without them, with the jackknife of all others, for which a second one is left out each time.

    Args:
        bound: predictions are clamped to ± this.
        rows: the windows of each group that are asked about, M together.

    Returns:
        Their residuals (M, D), factor of the covariance (M, G − 1, D).
    """
    residuals, spreads = [], []
    for b, own in zip(of, rows, strict=True):
        y = ridge.targets[own]
        residuals.append(y - (y - ridge.residuals(own, b)).clamp(-bound, bound))
        pairs = torch.stack([y - ridge.residuals(own, b, c) for c in range(len(ridge.rows)) if c != b])
        spreads.append(jackknife(pairs.clamp(-bound, bound)).rows)
    return torch.cat(residuals), Factor(torch.cat(spreads))


def groups_of(episode: Tensor, most: int, seed: int) -> Tensor:
    """(N,) trajectories -> (N,) groups of them, numbered from 0: each its own, or `most` of about equal size, drawn by the seed."""
    names, which = torch.unique(episode.cpu(), return_inverse=True)
    order = torch.randperm(len(names), generator=make_generator(seed, "ensemble/bootstrap"))
    group = torch.empty_like(order)
    group[order] = torch.arange(len(names)) % most
    return group[which]


# -- the posterior -------------------------------------------------------------------------------------------------------------
class ClosedForm(nn.Module):
    """The fits without each group, (B, F) -> (G, B, D), in normalised units.

    Args:
        config: of the regressors.
        choice: ridge, layer and groups.
        feature_dim: F.
        chunk: T.
        action_dim: A.
    """

    def __init__(self, config: EnsembleConfig, choice: Choice, feature_dim: int, chunk: int, action_dim: int) -> None:
        super().__init__()
        require(config.encoder == "features", "A closed form regresses from features; it has no encoders of its own.",
                key="ensemble.encoder", found=config.encoder, expected="features")  # fmt: skip
        self.config, self.choice = config, choice
        self.feature_dim, self.chunk, self.action_dim, self.dim = feature_dim, chunk, action_dim, chunk * action_dim
        hidden, nothing = (config.hidden,) * choice.layer, torch.Generator()
        # of all trajectories; and of all but the even groups, all but the odd ones
        self.regressor, self.halves = (first(StackedMLP(k, feature_dim, hidden, 1, nothing), choice.layer) for k in (1, 2))
        self.scale: Tensor
        self.inflation: Tensor
        self.inflation_left_out: Tensor
        self.weight: Tensor
        width = 1 + (config.hidden if choice.layer else feature_dim)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("inflation", torch.ones(()))
        self.register_buffer("inflation_left_out", torch.ones(()))
        self.register_buffer("weight", torch.zeros(choice.groups, width, self.dim))

    @property
    def bound(self) -> float:
        """Predictions are clamped to ± this."""
        return 1.0 if self.config.bound == "clamp" else float("inf")

    @torch.no_grad()
    def predict(self, features: Tensor, batch: int = 1024) -> Tensor:
        """(N, F) -> (G, N, D): the chunk that each fit predicts, inside the action range under `bound="clamp"`."""
        hidden = (self.regressor(part[None])[0] * self.scale for part in features.split(batch))
        return torch.cat([with_constant(part) @ self.weight for part in hidden], 1).clamp_(-self.bound, self.bound)

    def factor(self, features: Tensor) -> Factor:
        """(N, F) -> the jackknife's covariance of the chunk at each state, as wide as networks trained anew: a row a group."""
        return Factor(jackknife(self.predict(features)).rows * self.inflation)

    @torch.no_grad()
    def out_of_bag(self, features: Tensor, chunks: Tensor, episode: Tensor, seed: int) -> OutOfBag:
        """Every trajectory as the others predict it, from features of the half that it is not in.

        Args:
            features, chunks, episode, seed: those that it was fitted with.

        Raises:
            InputError: fewer than four groups of trajectories.
        """
        group = groups_of(torch.as_tensor(episode), self.choice.groups, seed)
        hidden = self.halves(features.expand(2, -1, -1)).cpu()
        ridges = [Ridge(scaled(half), chunks.flatten(1).cpu(), group, self.choice.ridge) for half in hidden]
        found = _out_of_bag(ridges, torch.as_tensor(episode).cpu(), self.action_dim, self.bound, WINDOWS)
        return dataclasses.replace(found, factor=Factor(found.factor.rows * self.inflation_left_out.cpu()))


def first(network: nn.Sequential, layers: int) -> nn.Sequential:
    """The first hidden layers of a network, each with its activation."""
    return nn.Sequential(*list(network)[: 2 * layers])


def with_constant(hidden: Tensor) -> Tensor:
    """(N, P) -> (N, P + 1)."""
    return torch.cat((hidden, torch.ones_like(hidden[:, :1])), 1)


def _scale(hidden: Tensor) -> float:
    """What brings the mean square norm of (N, P) features to 1."""
    return hidden.square().sum(1).mean().clamp(min=1e-12).rsqrt().item()


def scaled(hidden: Tensor) -> Tensor:
    """Hidden features (N, P) -> φ (N, P + 1), their mean square norm 1."""
    return with_constant(hidden * _scale(hidden))


def _out_of_bag(ridges: list[Ridge], episode: Tensor, action_dim: int, bound: float, most: int | None = None) -> OutOfBag:
    """Even groups from the features of the first, odd ones from those of the second; at most so many windows, evenly spaced."""
    groups = len(ridges[0].rows)
    require(
        groups >= 4, "There are too few trajectories to leave some out.", key="trajectories", found=groups,
        expected="at least 4", remedy="use more demonstrations, or a number for α",
    )  # fmt: skip
    halves = [range(half, groups, 2) for half in range(2)]
    every = torch.cat([ridges[0].rows[b] for half in halves for b in half])
    kept = every[evenly(len(every), most)]
    which = [[rows[torch.isin(rows, kept)] for rows in (ridges[0].rows[b] for b in half)] for half in halves]
    found = [left_out(ridge, half, bound, rows) for ridge, half, rows in zip(ridges, halves, which)]
    residuals, spreads = torch.cat([part[0] for part in found]), Factor(torch.cat([part[1].rows for part in found]))
    freedom, names = torch.full((len(kept),), groups - 2.0), episode.unique()
    return OutOfBag(residuals, spreads, freedom, torch.zeros(len(kept)), episode[kept], action_dim, len(names))


def check_closed_form(trajectories: int, layers: int, config: ClosedFormConfig) -> None:
    """InputError where a closed form cannot be made of so many trajectories, or the regressor lacks the hidden layer."""
    require(
        trajectories >= 2,
        "A closed form leaves trajectories out, and there is but one.",
        key="trajectories",
        found=trajectories,
    )
    require(config.layer is None or config.layer <= layers, "The regressor has no such hidden layer.", key="closed_form.layer",
            found=config.layer, expected=f"0 to {layers}")  # fmt: skip
    given = config.ridge is not None and config.layer is not None
    require(
        given or min(trajectories, config.blocks) >= 4, "There are too few trajectories to choose ridge and layer by some left out.",
        key="trajectories", found=min(trajectories, config.blocks), expected="at least 4",
        remedy="use more demonstrations (or blocks), or give --closed-form.ridge and --closed-form.layer",
    )  # fmt: skip


def fit_closed_form(
    features: Tensor,
    chunks: Tensor,
    episode: Any,
    config: EnsembleConfig,
    closed_form: ClosedFormConfig | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    run: Run | None = None,
) -> ClosedForm:
    """Three regressors side by side, as an ensemble is trained (resumable), then the closed form on the features of one of them.

    Args:
        features: (N, F) of the demonstrations' windows.
        chunks: (N, T, A) normalised.
        episode: (N,) integers, the trajectory that each window comes from.
        config: of the regressors: width, layers, steps; ensemble_size and bootstrap do not count.
        closed_form: ridge and layer, where they are not to be chosen.
        seed, compute, run: as those of `fit_ensemble`.

    Raises:
        InputError: as `fit_ensemble`; a single trajectory, or fewer than four where ridge or layer are to be chosen.
    """
    closed_form, episode = closed_form or ClosedFormConfig(), torch.as_tensor(episode).cpu()
    group = groups_of(episode, closed_form.blocks, seed)
    groups, sizes = int(group.max()) + 1, (features.shape[1], chunks.shape[1], chunks.shape[2])
    check_closed_form(len(episode.unique()), config.layers, closed_form)
    tried = range(config.layers + 1) if closed_form.layer is None else (closed_form.layer,)
    ridges = RIDGES if closed_form.ridge is None else (closed_form.ridge,)
    bound = ClosedForm(config, Choice(1.0, 0, groups), *sizes).bound
    network: nn.Sequential = nn.Sequential()
    hidden, targets = features.expand(REGRESSORS, -1, -1), chunks.flatten(1).cpu()
    if closed_form.layer != 0:
        counts = torch.stack((torch.ones_like(group), group % 2, 1 - group % 2))
        three = dataclasses.replace(config, ensemble_size=REGRESSORS, bootstrap="none")
        network = fit_ensemble(features, chunks, episode, three, seed, compute, run, counts=counts).network
        hidden = hidden.to(next(network.parameters()).device)
    coarse, scores = group % GROUPS, dict[Choice, float]()
    for layer in tried if len(tried) * len(ridges) > 1 else ():
        made = [Ridge(scaled(half), targets, coarse) for half in first(network, layer)(hidden)[1:].cpu()]
        for ridge in ridges:
            oob = _out_of_bag([m.at(ridge) for m in made], episode, sizes[2], bound, FEW_WINDOWS)
            scores[Choice(ridge, layer, groups)] = best_likelihood(oob)
    choice = max(scores, key=lambda c: scores[c]) if scores else Choice(ridges[0], tried[0], groups)
    posterior = ClosedForm(config, choice, *sizes).to(hidden.device)
    weights = first(network, choice.layer).state_dict()
    posterior.regressor.load_state_dict({name: value[:1] for name, value in weights.items()})
    posterior.halves.load_state_dict({name: value[1:] for name, value in weights.items()})
    own, *halves = first(network, choice.layer)(hidden).cpu()
    posterior.scale.fill_(_scale(own))
    regression = Ridge(scaled(own), targets, group, choice.ridge)
    posterior.weight.copy_(torch.stack([regression.basis @ regression.without(g) for g in range(groups)]))
    if closed_form.layer != 0:
        fits, odd = network(hidden).clamp(-bound, bound), groups // 2
        variance = odd * (groups - odd) / groups**2 * (fits[1] - fits[2]).square().mean()  # of a network of all groups
        posterior.inflation.fill_(_ratio(variance, posterior.factor(hidden[0])))
        if groups >= 4:
            made = [Ridge(scaled(half), targets, coarse, choice.ridge) for half in halves]
            posterior.inflation_left_out.fill_(_ratio(variance, _out_of_bag(made, episode, sizes[2], bound).factor))
    return posterior.eval().requires_grad_(False)


def _ratio(variance: Tensor, factor: Factor) -> float:
    """What brings a factor's mean variance, over states and dimensions, to this."""
    return (variance.cpu() / factor.std().square().mean().cpu().clamp(min=1e-12)).sqrt().item()
