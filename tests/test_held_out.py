"""`postbc held-out`: the score, which trajectories it is of, what is said of it, and the command."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import h5py
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
    for noise in (0.05, 0.002):  # also where the policies are all but one: then the reference's own mean is what is not known
        said = []
        for i in range(300):
            reference = random.uniform(0.5, 1.5, 20)
            candidate = 1.02 * reference + noise * random.standard_normal(20)
            said.append(compare_scores(np.stack((candidate, reference), 1), 1, 0.02, 0.05, i).decision)
        for verdict in ("not worse", "worse"):
            assert 0.02 < said.count(verdict) / 300 < 0.09


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
    other = write_demonstrations(tmp_path / "other.hdf5", trajectories=6, length=9, seed=1)  # none of another file was seen
    assert cli.main([*words(made, tmp_path / "p"), "--demonstrations", str(other)]) == 0
    assert read_json(tmp_path / "p/seed_0/held_out.json", Scored).trajectories == 6


@pytest.mark.parametrize(("other", "said"), [
    ({"policy": "long"}, "different lengths"),
    ({"reference": "all"}, "found: 1 expected: 5 at least"),
    ({"demonstrations": "none.hdf5"}, "no such demonstration file"),
    ({"policy": "none"}, "policy.safetensors"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, other: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(made, tmp_path / "o", **other)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


def test_a_file_that_has_changed_and_trajectories_shorter_than_a_chunk(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made / "d.hdf5", tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "r+") as file:
        for i in range(8, 10):  # two more, one of them short
            file.copy("data/demo_0", f"data/demo_{i}")
        short = file["data/demo_9"]
        for key in ("actions", "rewards", "dones", *(f"obs/{k}" for k in short["obs"])):
            values = short[key][:3]
            del short[key]
            short[key] = values
        short.attrs["num_samples"] = 3
    assert cli.main([*words(made, tmp_path / "o"), "--demonstrations", str(tmp_path / "d.hdf5")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trajectories of the same names are left out" in said
    assert "1 trajectories are left out, which are shorter than a chunk" in said
    assert read_json(tmp_path / "o/seed_0/held_out.json", Scored).trajectories == 6


def test_other_seeds_are_not_mixed(made: Path, tmp_path: Path) -> None:
    config = HeldOut(policy=made / "a/seed_0", reference=made / "b/seed_0", demonstrations=made / "d.hdf5", output=tmp_path)
    with pytest.raises(InputError, match="seed"):
        compare_held_out(config, 1)
