"""The posterior covariance of an action chunk, kept as the rows that generate it: no Cholesky, any rank.

With centred predictions R (K, D) of the ensemble, w = Rᵀg/√(K−1), g ~ N(0, I_K), has exactly the ensemble's covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """cov(s_n) = rows_nᵀ·rows_n for N states.

    Attributes:
        rows: (N, R, D), D = T·A. R = K as it comes from the ensemble.
    """

    rows: Tensor

    @classmethod
    def from_predictions(cls, predictions: Tensor, ddof: int = 1) -> Factor:
        """From the members' predictions (K, N, D); `ddof` 1 divides by K−1 (default), 0 by K.

        Raises:
            ValueError: fewer than two members (or than ddof + 1).
        """
        members = len(predictions)
        if members <= max(ddof, 1):
            raise ValueError(f"a covariance needs at least two members, found {members}")
        centred = predictions - predictions.mean(0)
        return cls((centred / (members - ddof) ** 0.5).transpose(0, 1).contiguous())

    def sample(self, generator: torch.Generator, index: Tensor | None = None) -> Tensor:
        """w ~ N(0, cov) for the states `index` (B,) (default: all): (B, D)."""
        rows = self.rows if index is None else self.rows[index]
        g = torch.randn(rows.shape[:2], generator=generator, dtype=rows.dtype, device=rows.device)
        return self.at(g, index)

    def at(self, g: Tensor, index: Tensor | None = None) -> Tensor:
        """w of the coordinates g (B, R) at the states `index` (B,) (default: all): (B, D)."""
        rows = self.rows if index is None else self.rows[index]
        return torch.bmm(g.unsqueeze(1), rows).squeeze(1)

    def covariance(self) -> Tensor:
        """(N, D, D)."""
        return self.rows.transpose(1, 2) @ self.rows

    def std(self) -> Tensor:
        """(N, D) marginal standard deviations."""
        return self.rows.square().sum(1).sqrt()

    def compact(self) -> Factor:
        """The same covariance from at most D rows (thin QR: RᵀR = (QU)ᵀQU = UᵀU); cheaper to sample when K > D."""
        if self.rows.shape[1] <= self.rows.shape[2]:
            return self
        rows = self.rows.cpu() if self.rows.device.type == "mps" else self.rows  # which has no double precision
        upper: Tensor = torch.linalg.qr(rows.double(), mode="r").R
        return Factor(upper.to(self.rows))

    def diagonal(self) -> Factor:
        """The diagonal version (LIBERO Best-of-N): the same variances, no correlation over chunk or action."""
        return Factor(torch.diag_embed(self.std()))
