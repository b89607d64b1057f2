"""One wide member of an ensemble, trained alone: steps of plain regression with the backward pass written out.

A member's parameters and moments are larger than a core's cache. So each layer's gradient is used while it is there: product, Adam, and
the copy of the new weights for the next step's products follow each other layer by layer, and memory is written again, not taken anew.
"""

import torch
from torch import Tensor

from postbc.members import scripted


@torch.jit.ignore
def _adam(
    values: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], count: Tensor, lr: float
) -> None:
    """torch's own step, which TorchScript would leave out: it does not see that the lists' tensors are changed."""
    torch._fused_adam_(
        values, gradients, first, second, [], [count] * len(values),
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


@scripted
def train_member(
    values: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    count: Tensor,
    observations: Tensor,
    targets: Tensor,
    lr: float,
    gaussian: bool,
    log_std_range: list[float],
    reduced: bool,
    anchors: list[Tensor],
    pull: float,
) -> Tensor:
    """n ≥ 1 steps of Adam on a multilayer perceptron with ReLU, in place; returns the last step's loss (), without the pull.

    Args:
        values: weight (i, o), bias (1, o) of each layer.
        first, second: their moments.
        count: Adam's steps so far.
        observations, targets: (n, B, S), (n, B, D): a batch a step.
        lr: step size.
        gaussian: the last layer gives mean and log standard deviation (B, 2·D), and the loss is the negative log-likelihood; otherwise
            mean-squared error.
        log_std_range: bounds of the log standard deviation.
        reduced: products in bfloat16; parameters, moments and losses stay float32.
        anchors: parameters that `pull`·Σ‖θ − anchor‖² pulls to, in the order of `values`; may be empty.
        pull: its weight.
    """
    dtype = torch.bfloat16 if reduced else torch.float32
    rows, depth, widest = observations.shape[1], len(values) // 2, max([value.numel() for value in values])
    used = [value.to(dtype) for value in values]  # the same memory in float32
    hidden = [torch.empty([rows, bias.shape[1]], dtype=dtype) for bias in values[1::2]]
    inner = [torch.empty([rows, weight.shape[0]], dtype=dtype) for weight in values[::2]]
    product, memory = torch.empty(widest, dtype=dtype), torch.empty(widest)  # of one layer's gradient, used again for the next
    inputs, size, loss = observations.to(dtype), targets[0].numel(), torch.zeros([])
    for step in range(observations.shape[0]):
        x, y = inputs[step], targets[step]
        for k in range(depth):
            torch.addmm(used[2 * k + 1], hidden[k - 1] if k > 0 else x, used[2 * k], out=hidden[k])
            if k < depth - 1:
                hidden[k].relu_()
        output = hidden[-1].to(torch.float32)
        if gaussian:
            mean, raw = output.chunk(2, -1)
            log_std = raw.clamp(log_std_range[0], log_std_range[1])
            scale = torch.exp(-log_std)
            error = (mean - y) * scale
            loss = (0.5 * error.square() + log_std).mean()
            gradient = torch.cat((error * scale, (1 - error.square()) * (raw == log_std)), -1) / size
        else:
            error = output - y
            loss = error.square().mean()
            gradient = error * (2 / size)
        gradient = gradient.to(dtype)
        count += 1
        for i in range(depth):
            k = depth - 1 - i
            weight, bias = values[2 * k], values[2 * k + 1]
            before = hidden[k - 1] if k > 0 else x
            of_bias = gradient.sum(0, keepdim=True, dtype=torch.float32)
            of_weight = torch.mm(before.t(), gradient, out=product[: weight.numel()].view(weight.shape))
            if k > 0:
                torch.mm(gradient, used[2 * k].t(), out=inner[k])
                gradient = torch.ops.aten.threshold_backward(inner[k], before, 0, grad_input=inner[k])
            if reduced:
                of_weight = memory[: weight.numel()].view(weight.shape).copy_(of_weight)
            if len(anchors) > 0:
                of_weight.add_(weight - anchors[2 * k], alpha=2 * pull)
                of_bias.add_(bias - anchors[2 * k + 1], alpha=2 * pull)
            _adam(
                values[2 * k : 2 * k + 2], [of_weight, of_bias], first[2 * k : 2 * k + 2], second[2 * k : 2 * k + 2], count, lr
            )
            if reduced:
                used[2 * k].copy_(weight)
                used[2 * k + 1].copy_(bias)
    return loss
