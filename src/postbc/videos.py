"""Videos of evaluated episodes: recorded actions played again from the episode's seed, drawn without a display.

An episode's seed decides its initial state and the simulation is deterministic, so the recorded actions are the episode. Playing them
again one action at a time costs nothing during the evaluation and gives a frame a control step, chunked or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from postbc.errors import InputError
from postbc.evaluation import Episode, Evaluation
from postbc.runs import atomic_path

FPS = 20  # robosuite's control rate: real time


def choose(evaluation: Evaluation, number: int) -> list[Episode]:
    """Up to `number` successful and `number` failed episodes, spread over the members; the same ones every time."""
    chosen: list[Episode] = []
    for success in (True, False):
        rows = [[e for e in evaluation.episodes if e.member == m and e.success == success] for m in range(evaluation.members)]
        turns = [row[k] for k in range(max(map(len, rows))) for row in rows if k < len(row)]
        chosen += turns[:number]
    return chosen


def play(
    env: VectorEnv, episode_seed: int, actions: np.ndarray, *, height: int = 256, width: int = 256
) -> Iterable[np.ndarray]:
    """Frames (H, W, 3) uint8: the initial state, then one after each of the raw `actions` (steps, A).

    Args:
        env: one environment with chunk 1 that never terminates, with `render_frame`.
    """
    renderer: Any = env
    env.reset(options={"reset_mask": np.ones(1, bool), "seeds": np.array([episode_seed])})
    yield renderer.render_frame(0, height, width)
    for action in actions:
        env.step(np.asarray(action, np.float32)[None, None])
        yield renderer.render_frame(0, height, width)


def check_rendering(make_env: Callable[[], VectorEnv]) -> None:
    """Draw one small frame. InputError saying what to install if that is not possible: better now than after 200 episodes."""
    env = make_env()
    try:
        next(iter(play(env, 0, np.zeros((0, 1)), height=64, width=64)))
    except InputError as error:
        raise InputError(f"Videos cannot be rendered here.\n{error}", remedy="or go without videos: --videos 0") from error
    finally:
        env.close()


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: int = FPS) -> None:
    """H.264 in MP4, playable in browsers, atomically.

    Raises:
        InputError: imageio or its ffmpeg is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise InputError(
            "Videos need imageio-ffmpeg.", found=str(error), remedy="pip install 'postbc[robosuite]', or give --videos 0"
        ) from error
    with atomic_path(path) as temporary:
        writer: Any = None
        try:
            for frame in frames:
                if writer is None:
                    height, width = frame.shape[:2]
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary), (width, height), fps=fps, codec="libx264", pix_fmt_in="rgb24", macro_block_size=2,
                        quality=None, output_params=["-crf", "28", "-movflags", "+faststart", "-f", "mp4"], ffmpeg_log_level="error",
                    )  # fmt: skip
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
        finally:
            if writer is not None:  # or ffmpeg would go on writing after its file has been removed
                writer.close()


def name_of(episode: Episode) -> str:
    """success_seed0_1000000003.mp4: outcome, the policy's seed, the episode's seed."""
    return f"{'success' if episode.success else 'failure'}_seed{episode.seed}_{episode.episode_seed}.mp4"


def record(evaluation: Evaluation, make_env: Callable[[], VectorEnv], folder: str | Path, number: int) -> list[Path]:
    """Write videos of up to `number` successes and `number` failures; returns their paths.

    Args:
        evaluation: with recorded actions.
        make_env: an environment for :func:`play`.

    Raises:
        InputError: rendering without a display is not possible here (the message says what to install).
    """
    chosen, paths = choose(evaluation, number), []
    env = make_env()
    try:
        for episode in chosen:
            path = Path(folder) / name_of(episode)
            write_video(path, play(env, episode.episode_seed, evaluation.actions[episode.member, episode.episode_seed]))
            paths.append(path)
    finally:
        env.close()
    return paths
