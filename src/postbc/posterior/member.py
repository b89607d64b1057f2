"""One wide member of an ensemble, trained alone: steps of plain regression with the backward pass written out.

A member's parameters and moments are larger than a core's cache, so what is written is used soon and its memory written again, not
taken anew; members on several threads meet in Python once a step; and activations are columns, (features, B): in bfloat16 the three
products of a layer together take a seventh less time that way.
"""

import torch
from torch import Tensor

from postbc.members import AdamState, adam, scripted


@torch.jit.ignore  # type: ignore[untyped-decorator]
def as_integers(tensors: list[Tensor]) -> list[Tensor]:
    """The memory of bfloat16 numbers as int16: the sign is in the same place, and comparing with 0 takes a fifth of the time."""
    return [t.view(torch.int16) for t in tensors]


@scripted
def train_member(
    state: AdamState,
    observations: Tensor,
    targets: Tensor,
    gaussian: bool,
    log_std_range: list[float],
    reduced: bool,
    anchors: list[Tensor],
    pull: float,
) -> Tensor:
    """n ≥ 1 steps of Adam on a multilayer perceptron with ReLU, in place; returns the last step's loss (), without the pull.

    Args:
        state: of weight (i, o), bias (1, o) of each layer.
        observations, targets: (n, B, S), (n, B, D): a batch a step.
        gaussian: the last layer gives mean and log standard deviation (B, 2·D), and the loss is the negative log-likelihood; otherwise
            mean-squared error.
        log_std_range: bounds of the log standard deviation.
        reduced: products in bfloat16; parameters, moments and losses stay float32.
        anchors: parameters that `pull`·Σ‖θ − anchor‖² pulls to, in the order of `state.values`; may be empty.
        pull: its weight.
    """
    dtype = torch.bfloat16 if reduced else torch.float32
    values = state.values
    rows, depth, widest = observations.shape[1], len(values) // 2, max([value.numel() for value in values])
    used = [value.to(dtype) for value in values]  # the same memory in float32
    hidden = [torch.empty([bias.shape[1], rows], dtype=dtype) for bias in values[1::2]]
    inner = [torch.empty([weight.shape[0], rows], dtype=dtype) for weight in values[::2]]
    compared, compared_inner = (as_integers(hidden), as_integers(inner)) if reduced else (hidden, inner)
    gradients = [torch.empty_like(value) for value in values]
    product = torch.empty(widest, dtype=dtype)  # a layer's gradient in bfloat16
    inputs, size, loss = observations.to(dtype).transpose(1, 2).contiguous(), targets[0].numel(), torch.zeros([])
    for step in range(observations.shape[0]):
        x, y, last = inputs[step], targets[step].t(), step == observations.shape[0] - 1
        for k in range(depth):
            torch.addmm(used[2 * k + 1].t(), used[2 * k].t(), hidden[k - 1] if k > 0 else x, out=hidden[k])
            if k < depth - 1:
                compared[k].clamp_min_(0)  # ReLU
        output = hidden[-1].to(torch.float32)
        if gaussian:
            mean, raw = output.chunk(2)
            log_std = raw.clamp(log_std_range[0], log_std_range[1])
            scale = torch.exp(-log_std)
            error = (mean - y) * scale
            if last:
                loss = (0.5 * error.square() + log_std).mean()
            gradient = torch.cat((error * scale, (1 - error.square()) * (raw == log_std))) / size
        else:
            error = output - y
            if last:
                loss = error.square().mean()
            gradient = error * (2 / size)
        gradient = gradient.to(dtype)
        for i in range(depth):
            k = depth - 1 - i
            before, of_weight, of_bias = hidden[k - 1] if k > 0 else x, gradients[2 * k], gradients[2 * k + 1]
            torch.sum(gradient, [1], True, dtype=torch.float32, out=of_bias.t())
            if reduced:
                rounded = product[: of_weight.numel()].view(of_weight.shape)
                of_weight.copy_(torch.mm(before, gradient.t(), out=rounded))
            else:
                torch.mm(before, gradient.t(), out=of_weight)
            if k > 0:
                torch.mm(used[2 * k], gradient, out=inner[k])
                torch.ops.aten.threshold_backward(compared_inner[k], compared[k - 1], 0, grad_input=compared_inner[k])
                gradient = inner[k]
        if len(anchors) > 0:
            for k in range(len(values)):
                gradients[k].add_(values[k] - anchors[k], alpha=2 * pull)
        adam(state, gradients)
        if reduced:
            for k in range(len(used)):
                used[k].copy_(values[k])
    return loss
