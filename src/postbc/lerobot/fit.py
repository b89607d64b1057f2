"""Algorithm 1 on the frames of a LeRobotDataset: features of every frame, bootstrapped regressors on them, the file of factors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.data.lerobot import ACTION, ENVIRONMENT_STATE, STATE
from postbc.data.lerobot_files import INFO, LeRobotFolder
from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.errors import require
from postbc.lerobot.factors import About, write_factors
from postbc.posterior.calibration import WINDOWS, Calibration, calibrate
from postbc.posterior.ensemble import Ensemble, EnsembleConfig, fit_ensemble
from postbc.progress import progress
from postbc.schemas import plain

#: A camera's name and frames (n, 3, H, W) of 0 to 1 -> features (n, F).
Encode = Callable[[str, Tensor], Tensor]
BATCH = 64


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of some episodes, one after another."""

    actions: np.ndarray
    """(N, A) float32."""
    numbers: np.ndarray
    """(N, S) float32: state and environment state."""
    index: np.ndarray
    """(N,) the dataset's numbers of the frames."""
    episode: np.ndarray
    """(N,) which episode."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of actions, numbers and episodes."""
        digest = hashlib.sha256(repr(self.actions.shape).encode())
        for values in (self.actions, self.numbers, self.index, self.episode):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]


def inputs(policy: Any, meta: Any, renamed: Mapping[str, str]) -> tuple[str, ...]:
    """The dataset's features that a policy sees and its posterior can: states, and cameras that are no depth maps.

    Args:
        policy: its configuration; one without input features, as before a first training, sees all.
        meta: of the dataset.
        renamed: the dataset's names -> the policy's.
    """
    there = [key for key in (STATE, ENVIRONMENT_STATE) if key in meta.features]
    there += [key for key in meta.camera_keys if key not in meta.depth_keys]
    chosen = policy.input_features
    return tuple(key for key in there if not chosen or renamed.get(key, key) in chosen)


def read_frames(
    root: str | Path, episodes: Sequence[int] | None = None, keys: Sequence[str] = (STATE, ENVIRONMENT_STATE)
) -> Frames:
    """Actions and numbers (of the features `keys` that are states) of the frames of `episodes` (default: all) of a local dataset."""
    folder = LeRobotFolder(root)
    require(ACTION in folder.features, "The dataset has no actions.", file=folder.path / INFO, key="features", expected=ACTION)
    keys = [key for key in (STATE, ENVIRONMENT_STATE) if key in folder.features and key in keys]
    wanted = sorted(range(len(folder.starts)) if episodes is None else {int(e) for e in episodes})
    require(bool(wanted) and wanted[0] >= 0 and wanted[-1] < len(folder.starts), "There are no such episodes.", file=folder.path,
            found=f"{len(wanted)} asked for, {len(folder.starts)} there")  # fmt: skip
    parts: list[tuple[np.ndarray, ...]] = []
    for e, columns in folder.numbers([*keys, ACTION], wanted):
        n = len(columns[ACTION])
        numbers = np.concatenate([columns[key] for key in keys], 1) if keys else np.zeros((n, 0))
        parts.append((columns[ACTION].astype(np.float32), numbers.astype(np.float32),
                      folder.starts[e] + np.arange(n), np.full(n, e)))  # fmt: skip
    folder.close()
    return Frames(*(np.concatenate(values) for values in zip(*parts)))


def chunk_rows(episode: np.ndarray, delta: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of frames in order with their episode (N,): the rows of each frame's chunk (N, T), and where it leaves the episode (N, T).

    LeRobot's windows: clamped at both ends of the episode.
    """
    n = len(episode)
    first = np.r_[0, np.flatnonzero(np.diff(episode)) + 1]
    last = np.r_[first[1:], n] - 1
    which = np.searchsorted(first, np.arange(n), side="right") - 1
    wanted, low, high = np.arange(n)[:, None] + np.asarray(delta), first[which][:, None], last[which][:, None]
    return wanted.clip(low, high), (wanted < low) | (wanted > high)


@torch.no_grad()
def frame_features(root: str | Path, frames: Frames, encode: Encode | None, cameras: Sequence[str] = ()) -> np.ndarray:
    """(N, F) of every frame: its numbers and, of each of `cameras`, what `encode` makes of it."""
    parts = [frames.numbers]
    if encode is not None:
        folder = LeRobotFolder(root)
        runs = np.split(frames.index, np.flatnonzero(np.diff(frames.episode)) + 1)
        batches = [run[i : i + BATCH] for run in runs for i in range(0, len(run), BATCH)]
        with progress("features", len(frames.index) * len(cameras)) as bar:
            for camera in cameras:
                made = []
                for rows in batches:
                    images = torch.from_numpy(folder.frames(camera, int(rows[0]), int(rows[-1]) + 1))
                    first = folder.features[camera]["shape"][0] in (1, 3)
                    images = (images if first else images.movedim(-1, 1)).float() / 255
                    made.append(encode(camera, images.expand(-1, 3, -1, -1)).float().cpu())
                    bar.advance(len(rows))
                parts.append(torch.cat(made).numpy())
        folder.close()
    features = np.concatenate(parts, 1)
    require(features.shape[1] > 0, "There is nothing that the posterior could be a function of.", file=root,
            found="no state, no camera")  # fmt: skip
    return features


def fit_factors(
    path: str | Path, root: str | Path, frames: Frames, delta: Sequence[int], config: EnsembleConfig, seed: int, *,
    encode: Encode | None = None, cameras: Sequence[str] = (), described: dict[str, Any] | None = None, compute: Compute | None = None,
    calibrated: bool = False,
) -> float:  # fmt: skip
    """Fit the ensemble and write the factors of every frame; returns their mean standard deviation (normalised units).

    Args:
        path: file to write.
        root: the dataset.
        frames: of the episodes that are trained on.
        delta: which actions a chunk holds, relative to its frame.
        config: of the ensemble.
        seed: of initialisation, bootstrap and data order.
        encode: of cameras.
        cameras: features that it encodes.
        described: what else decided the result, recorded.
        compute: where.
        calibrated: whether α is found too, by trajectories left out, and recorded.

    Raises:
        InputError: α is to be found, and no trajectory can be left out.
    """
    rows, pad = chunk_rows(frames.episode, delta)
    features = frame_features(root, frames, encode, cameras)
    norm = Normalization(features.min(0), features.max(0), frames.actions.min(0), frames.actions.max(0))
    chunks = norm.normalize_action(torch.from_numpy(frames.actions[rows]))
    seen = norm.normalize_state(torch.from_numpy(features))
    ensemble = fit_ensemble(seen, chunks, frames.episode, config, seed, compute)
    n, (t, a) = len(seen), chunks.shape[1:]
    rank, inside = min(config.ensemble_size, t * a), torch.from_numpy(~pad)
    sizes: list[Tensor] = []
    device = next(ensemble.parameters()).device
    calibration = calibration_of(ensemble, seen, chunks, torch.from_numpy(frames.episode), inside, seed) if calibrated else None

    def blocks() -> Iterator[Tensor]:
        for i in range(0, n, 1024):
            factor = ensemble.factor(seen[i : i + 1024].to(device)).compact().rows.cpu()
            # what lies beyond the episode is padding, and is never perturbed
            block = (factor.unflatten(2, (t, a)) * inside[i : i + 1024, None, :, None]).flatten(2)
            sizes.append(block.square().sum(1).sqrt().mean(1))
            yield block

    made_of = plain(described if described is not None else {"ensemble": config, "seed": seed})
    about = About("lerobot-factors", frames.fingerprint, tuple(int(d) for d in delta), a, n, made_of, calibration)
    write_factors(path, about, torch.from_numpy(frames.index), (1 / norm.action_scale).repeat(t), rank, blocks())
    return float(torch.cat(sizes).mean())


def calibration_of(
    ensemble: Ensemble, features: Tensor, chunks: Tensor, episode: Tensor, inside: Tensor, seed: int
) -> Calibration:
    """α by trajectories left out, from evenly spaced frames whose chunk lies in its episode (as many as :func:`calibrate` looks at).

    Args:
        ensemble: fitted on what follows.
        features: (N, F) normalised.
        chunks: (N, T, A) normalised.
        episode: (N,) ascending.
        inside: (N, T) which actions of a chunk its episode has.
        seed: of the fit.

    Raises:
        InputError: no trajectory can be left out, or none is as long as a chunk.
    """
    first = torch.cat(
        [torch.ones(1, dtype=torch.bool), episode.diff() != 0]
    )  # one of each, so that the bootstrap is the fit's own
    some = torch.nonzero(first | (torch.arange(len(episode)) % max(1, len(episode) // (2 * WINDOWS)) == 0))[:, 0]
    device = next(ensemble.parameters()).device
    oob = ensemble.out_of_bag(features[some].to(device), chunks[some], episode[some], seed)
    left_out = some[torch.isin(episode[some], oob.trajectory)]  # in the order of `oob`
    whole = inside[left_out].all(1)
    require(bool(whole.any()), "α cannot be found: no trajectory that can be left out is as long as a chunk.", key="postbc.weight",
            found="auto", remedy="give a number")  # fmt: skip
    return calibrate(oob.of(whole), seed=seed)
