"""`postbc held-out`: the score, which trajectories it is of, what is said of it, and the command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from made import write_demonstrations
from postbc import cli
from postbc.errors import InputError
from postbc.schemas import read_json
from postbc.stages.held_out import HeldOut, Scored, compare_held_out, compare_scores, energy_score


# -- score -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-1.0, 2.0)])
def test_of_one_number_it_is_the_ranked_probability_score(mean: float, std: float) -> None:
    draws = mean + std * torch.randn(4000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = (0.4 - mean) / std
    crps = std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    found = energy_score(draws, torch.full((1, 1), 0.4, dtype=torch.float64))
    assert float(found) == pytest.approx(crps, abs=0.05 * std)


def test_of_few_draws_it_has_no_bias_and_the_truth_is_best() -> None:
    random = torch.Generator().manual_seed(0)
    target = torch.randn(20000, 3, generator=random)
    means = {}
    for scale in (0.0, 0.5, 1.0, 1.5):
        by_count = [energy_score(scale * torch.randn(m, 20000, 3, generator=random), target).mean().item() for m in (2, 16)]
        assert by_count[0] == pytest.approx(by_count[1], abs=0.02)
        means[scale] = by_count[1]
    assert min(means, key=means.__getitem__) == 1.0


# -- verdict -----------------------------------------------------------------------------------------------------------------------
def test_the_level_holds_where_the_loss_is_the_margin() -> None:
    random = np.random.default_rng(0)
    said = []
    for i in range(400):
        reference = random.uniform(0.5, 1.5, 20)
        said.append(compare_scores(np.stack((1.02 * reference.mean() - reference.mean() + reference + 0.05 * random.standard_normal(20),
                                             reference), 1), 1, 0.02, 0.05, i).decision)  # fmt: skip
    for verdict in ("not worse", "worse"):
        assert 0.02 < said.count(verdict) / 400 < 0.085


def test_what_is_said() -> None:
    reference = np.linspace(1, 2, 12)
    cases = {"not worse": reference, "worse": reference * 1.1, "open": reference + np.tile([0.3, -0.3], 6)}
    for verdict, candidate in cases.items():
        found = compare_scores(np.stack((candidate, reference), 1), 99, 0.01, 0.05)
        assert (found.decision, found.trajectories, found.windows) == (verdict, 12, 99)
        assert found.loss_interval[0] <= found.loss <= found.loss_interval[1]
        assert found.loss == pytest.approx(candidate.mean() / reference.mean() - 1)


# -- command -----------------------------------------------------------------------------------------------------------------------
def pretrain(file: Path, output: Path, *more: str) -> None:
    words = ["pretrain", "--data.demonstrations", str(file), "--data.num-trajectories", "3", "--output", str(output), "--policy.hidden",
             "16", "--policy.layers", "1", "--pretraining.method", "bc", "--pretraining.steps", "20", *more]  # fmt: skip
    assert cli.main(words) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    file = write_demonstrations(folder / "d.hdf5", trajectories=8)
    pretrain(file, folder / "a", "--pretraining.learning-rate", "0.001")
    pretrain(file, folder / "b")
    pretrain(file, folder / "long", "--data.chunk", "5")
    pretrain(file, folder / "all", "--data.num-trajectories", "7")
    return folder


def words(made: Path, output: Path, **other: str) -> list[str]:
    chosen = {"policy": "a", "reference": "b", "demonstrations": "d.hdf5", **other}
    return ["held-out", *(w for key, name in chosen.items() for w in (f"--{key}", str(made / name))), "--output", str(output)]


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(made, tmp_path / "o")) == 0
    assert "on 5 trajectories held out" in capsys.readouterr().out
    found = read_json(tmp_path / "o/seed_0/held_out.json", Scored)
    assert (found.trajectories, found.windows) == (5, 5 * 9)
    assert cli.main([*words(made, tmp_path / "o"), "--resume"]) == 0
    assert cli.main(words(made, tmp_path / "same", policy="b")) == 0  # against itself: the same noise, no difference
    same = read_json(tmp_path / "same/seed_0/held_out.json", Scored)
    assert (same.loss, same.loss_interval, same.decision) == (0.0, (0.0, 0.0), "not worse")
    other = write_demonstrations(tmp_path / "other.hdf5", trajectories=4, seed=1)  # none of another file was seen
    assert cli.main([*words(made, tmp_path / "p"), "--demonstrations", str(other)]) == 0
    assert read_json(tmp_path / "p/seed_0/held_out.json", Scored).trajectories == 4


@pytest.mark.parametrize(("other", "said"), [
    ({"policy": "long"}, "different lengths"),
    ({"reference": "all"}, "1 of 8"),
    ({"demonstrations": "none.hdf5"}, "no such demonstration file"),
    ({"policy": "none"}, "policy.safetensors"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, other: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(made, tmp_path / "o", **other)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


def test_other_seeds_are_not_mixed(made: Path, tmp_path: Path) -> None:
    config = HeldOut(policy=made / "a/seed_0", reference=made / "b/seed_0", demonstrations=made / "d.hdf5", output=tmp_path)
    with pytest.raises(InputError, match="seed"):
        compare_held_out(config, 1)
