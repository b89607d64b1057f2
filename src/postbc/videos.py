"""Videos of evaluated episodes: recorded actions played again from the episode's seed, drawn without a display.

An episode's seed decides its initial state and the simulation is deterministic, so the recorded actions are the episode. Playing them
again one action at a time costs nothing during the evaluation and gives a frame a control step, chunked or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from postbc.environments.chunk import ChunkEnv
from postbc.errors import InputError
from postbc.evaluation import Episode, Evaluation
from postbc.files import atomic_path
from postbc.progress import progress


def choose(evaluation: Evaluation, number: int) -> list[Episode]:
    """Up to `number` successful and `number` failed episodes; the first ones, so the same every time."""
    return [e for success in (True, False) for e in [e for e in evaluation.episodes if e.success == success][:number]]


def play(
    env: ChunkEnv,
    episode_seed: int,
    actions: np.ndarray,
    *,
    height: int = 256,
    width: int = 256,
    found: list[bool] | None = None,
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8: the initial state, then one after each of the raw `actions` (steps, A).

    Args:
        env: an environment's `scene`: one environment with chunk 1 that never ends by itself, with `render_frame`.
        found: is given the success of every action.
    """
    drawn: Any = env
    env.reset([episode_seed])
    yield drawn.render_frame(0, height, width)
    for action in actions:
        step = env.step(np.asarray(action, np.float64)[None, None])
        if found is not None:
            found.append(bool(step.success[0]))
        yield drawn.render_frame(0, height, width)


def check_rendering(scene: Callable[[], ChunkEnv] | None) -> None:
    """Draw one small frame. InputError saying what to install if that is not possible: better now than after 200 episodes."""
    remedy = "or go without videos: --videos 0"
    if scene is None:
        raise InputError(
            "This environment cannot be drawn.", key="videos", expected="an environment with a scene", remedy=remedy
        )
    try:
        _import_ffmpeg()
        env = scene()
        try:
            next(play(env, 0, np.zeros((0, env.action_dim)), height=64, width=64))
        finally:
            env.close()
    except InputError as error:
        raise InputError(f"Videos cannot be rendered here.\n{error}", key="videos", remedy=remedy) from error


def _import_ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise InputError(
            "Videos need imageio-ffmpeg.", found=str(error), remedy="pip install imageio-ffmpeg, or give --videos 0"
        ) from error
    return imageio_ffmpeg


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """H.264 in MP4, playable in browsers, atomically.

    Raises:
        InputError: imageio-ffmpeg is not installed, or the file cannot be written.
    """
    ffmpeg = _import_ffmpeg()
    with atomic_path(path) as temporary:
        writer: Any = None
        try:
            for frame in frames:
                if writer is None:
                    height, width = frame.shape[:2]
                    writer = ffmpeg.write_frames(
                        str(temporary), (width, height), fps=fps, codec="libx264", pix_fmt_in="rgb24", macro_block_size=2,
                        quality=None, output_params=["-crf", "28", "-movflags", "+faststart", "-f", "mp4"], ffmpeg_log_level="error",
                    )  # fmt: skip
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
        finally:
            if writer is not None:  # or ffmpeg would go on writing after its file has been removed
                writer.close()


def name_of(episode: Episode) -> str:
    """success_1000000003.mp4: outcome and the episode's seed."""
    return f"{'success' if episode.success else 'failure'}_{episode.episode_seed}.mp4"


def record(
    episodes: Iterable[Episode],
    actions: Callable[[Episode], np.ndarray],
    scene: Callable[[], ChunkEnv],
    folder: str | Path,
    fps: int,
) -> None:
    """Write a video of each episode; those that are there already are left alone.

    Args:
        actions: an episode's recorded ones (steps, A).
        scene: see :func:`play`.

    Raises:
        InputError: rendering without a display is not possible here (the message says what to install).
    """
    missing = [episode for episode in episodes if not (Path(folder) / name_of(episode)).exists()]
    if not missing:
        return
    env = scene()
    try:
        with progress("Videos", len(missing)) as bar:
            for episode in missing:
                found: list[bool] = []
                write_video(
                    Path(folder) / name_of(episode), play(env, episode.episode_seed, actions(episode), found=found), fps
                )
                if any(found) != episode.success:
                    warnings.warn(
                        f"The film of episode {episode.episode_seed} does not end as the episode did: this environment does not repeat "
                        "itself from a seed and actions.", RuntimeWarning, stacklevel=2,
                    )  # fmt: skip
                bar.advance(1)
    finally:
        env.close()
