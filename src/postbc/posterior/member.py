"""One wide member of an ensemble, trained alone on a CPU: steps of plain regression with the backward pass written out.

A member's parameters and moments are larger than a core's cache, so what is written is used soon and its memory written again, not
taken anew; and activations are columns, (features, B): in bfloat16 the three products of a layer together take a seventh less time
that way. Its numbers are those of the stack, to rounding, and do not depend on the other members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDE = 2**14
"""B·H, rows times width, from which a member is computed alone rather than in the stack."""


class AdamState(NamedTuple):
    """What a step of Adam changes in place."""

    values: list[Tensor]
    """The parameters' values."""
    first: list[Tensor]
    """Their first moments."""
    second: list[Tensor]
    """Their second moments."""
    steps: Tensor
    """() float: how many so far."""

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> AdamState:
        """The state before the first step."""
        values = [p.detach() for p in parameters]
        first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
        return cls(values, first, second, torch.zeros((), device=values[0].device))

    def of_member(self, k: int) -> AdamState:
        """Member k of a stack, in the same memory: weights (i, o), biases (1, o); its steps are counted on their own."""
        values, first, second = ([tensor[k] for tensor in part] for part in self[:3])
        return AdamState(values, first, second, self.steps.clone())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def adam(state: AdamState, gradients: Sequence[Tensor], lr: float) -> None:
    """torch's Adam (β 0.9, 0.999, ε 1e-8) in its fused form: one pass over memory instead of about ten."""
    state.steps.add_(1)
    torch._fused_adam_(
        state.values, list(gradients), state.first, state.second, [], [state.steps] * len(state.values),
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


@torch.no_grad()
def train_member(
    state: AdamState,
    lr: float,
    features: Tensor,
    targets: Tensor,
    *,
    log_std_range: tuple[float, float] | None,
    reduced: bool,
    anchors: Sequence[Tensor] = (),
    pull: float = 0.0,
) -> Tensor:
    """n ≥ 1 steps of Adam on a multilayer perceptron with ReLU, in place; returns the last step's loss (), without the pull.

    Args:
        state: of weight (i, o), bias (1, o) of each layer.
        lr: step size.
        features, targets: (n, B, F), (n, B, D): a batch a step.
        log_std_range: given, the last layer is mean and log standard deviation (B, 2·D), kept inside this range, and the loss the
            negative log-likelihood; otherwise mean-squared error.
        reduced: products in bfloat16; parameters, moments and losses stay float32.
        anchors: parameters that `pull`·Σ‖θ − anchor‖² pulls to, in the order of `state.values`; may be empty.
        pull: its weight.
    """
    dtype = torch.bfloat16 if reduced else torch.float32
    values, (steps, rows) = state.values, features.shape[:2]
    depth, size = len(values) // 2, targets[0].numel()
    used = [value.to(dtype) for value in values]  # the same memory in float32
    weights, biases = [w.t() for w in used[::2]], [b.t() for b in used[1::2]]
    hidden = [torch.empty((bias.shape[1], rows), dtype=dtype) for bias in values[1::2]]
    inner = [torch.empty((weight.shape[0], rows), dtype=dtype) for weight in values[::2]]
    # bfloat16 numbers compared as int16: the sign is in the same place, and comparing with 0 takes a fifth of the time
    signs, inner_signs = ([t.view(torch.int16) if reduced else t for t in tensors] for tensors in (hidden, inner))
    gradients = [torch.empty_like(value) for value in values]
    product = torch.empty(max(value.numel() for value in values), dtype=dtype)  # a layer's gradient in bfloat16
    inputs, loss = features.to(dtype).transpose(1, 2).contiguous(), torch.zeros(())
    for step in range(steps):
        x, y = inputs[step], targets[step].t()
        for k in range(depth):
            torch.addmm(biases[k], weights[k], hidden[k - 1] if k else x, out=hidden[k])
            if k < depth - 1:
                signs[k].clamp_min_(0)  # ReLU
        output = hidden[-1].float()
        if log_std_range is None:
            error = output - y
            loss = error.square().mean() if step == steps - 1 else loss
            gradient = error.mul_(2 / size)
        else:
            mean, raw = output.chunk(2)
            log_std = raw.clamp(*log_std_range)
            scale = torch.exp(-log_std)
            error = (mean - y) * scale
            loss = (0.5 * error.square() + log_std).mean() if step == steps - 1 else loss
            gradient = torch.cat((error * scale, (1 - error.square()) * (raw == log_std))) / size
        gradient = gradient.to(dtype)
        for k in range(depth - 1, -1, -1):
            before, of_weight, of_bias = hidden[k - 1] if k else x, gradients[2 * k], gradients[2 * k + 1]
            torch.sum(gradient, [1], True, dtype=torch.float32, out=of_bias.t())
            if reduced:
                rounded = product[: of_weight.numel()].view(of_weight.shape)
                of_weight.copy_(torch.mm(before, gradient.t(), out=rounded))
            else:
                torch.mm(before, gradient.t(), out=of_weight)
            if k:
                torch.mm(used[2 * k], gradient, out=inner[k])
                torch.ops.aten.threshold_backward(inner_signs[k], signs[k - 1], 0, grad_input=inner_signs[k])
                gradient = inner[k]
        for of_value, value, anchor in zip(gradients, values, anchors):
            of_value.add_(value - anchor, alpha=2 * pull)
        adam(state, gradients, lr)
        if reduced:
            for mine, value in zip(used, values):
                mine.copy_(value)
    return loss
