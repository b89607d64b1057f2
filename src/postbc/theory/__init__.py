"""Section 2 of the paper, executable: exact tabular MDPs, the estimators, and one function a statement.

`STATEMENTS` maps a statement's name (as in ``postbc theory NAME``) to its function. All have the signature
``(seed, repetitions, track) -> StatementResult``; their docstrings are the statements.
"""

from __future__ import annotations

from collections.abc import Callable

from postbc.theory.cloning_fails import bc_fails_to_cover
from postbc.theory.gaussian_lemma import gaussian_lemma
from postbc.theory.main_theorem_coverage import main_theorem_coverage
from postbc.theory.main_theorem_return import main_theorem_return
from postbc.theory.near_optimality import near_optimality
from postbc.theory.results import StatementResult
from postbc.theory.return_lemma import return_lemma
from postbc.theory.rl_finetuning import rl_finetuning
from postbc.theory.uniform_noise import uniform_noise_fails

STATEMENTS: dict[str, Callable[..., StatementResult]] = {
    "bc-fails-to-cover": bc_fails_to_cover,
    "uniform-noise-fails": uniform_noise_fails,
    "main-theorem-return": main_theorem_return,
    "main-theorem-coverage": main_theorem_coverage,
    "return-lemma": return_lemma,
    "near-optimality": near_optimality,
    "gaussian-lemma": gaussian_lemma,
    "rl-finetuning": rl_finetuning,
}

__all__ = ["STATEMENTS", "StatementResult"]
