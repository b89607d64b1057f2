"""Bad input across the stages: each row ends with status 2 and its reason, and nothing is written. (Files of demonstrations have
their own table in test_data_bad_input.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from made import LIFT, save_policy, write_demonstrations
from postbc.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    save_policy(root / "lift")
    save_policy(root / "wide", 23)
    save_policy(root / "can", 23, task="PickPlaceCan")
    save_policy(root / "short_action", action_dim=4)
    save_policy(root / "unknown", task=None)
    write_demonstrations(root / "demos.hdf5")
    write_demonstrations(root / "newer.hdf5", environment={**LIFT, "env_version": "1.5.1"})
    (root / "pickle").mkdir()
    torch.save({"weights": torch.ones(3)}, root / "pickle/policy.safetensors")
    (root / "truncated").mkdir()
    whole = (root / "lift/policy.safetensors").read_bytes()
    (root / "truncated/policy.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "flipped").mkdir()
    flipped = bytearray(whole)
    flipped[-9] ^= 4
    (root / "flipped/policy.safetensors").write_bytes(flipped)
    (root / "taken").mkdir()
    (root / "taken/thesis.tex").write_text("mine")
    return root


STAGES = {
    "evaluate": ["evaluate", "--episodes", "1", "--videos", "0"],
    "dsrl": ["finetune", "dsrl"],
    "best-of-n": ["finetune", "best-of-n"],
}
POLICIES = {
    "wide": "23",
    "short_action": "action",
    "pickle": "pickle",
    "truncated": "truncated",
    "flipped": "checksum",
    "missing": "There is no",
    "unknown": "does not say what environment",
}


@pytest.mark.simulator
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_that_do_not_fit(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, policy: str
) -> None:
    output = tmp_path / "out"
    assert main([*STAGES[stage], "--policy", str(files / policy), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert POLICIES[policy] in said
    assert policy in said, "the message names the file"
    assert not output.exists()


@pytest.mark.simulator
@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_of_another_task_and_a_taken_directory(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    output = tmp_path / "out"
    arguments = [*STAGES[stage], "--policy", str(files / "can"), "--environment", "postbc/Lift", "--output", str(output)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Can" in said
    assert "Lift" in said
    assert not output.exists()
    (tmp_path / "taken/seed_0").mkdir(parents=True)
    (tmp_path / "taken/seed_0/thesis.tex").write_text("mine")
    assert main([*STAGES[stage], "--policy", str(files / "lift"), "--output", str(tmp_path / "taken")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "taken/seed_0").iterdir() if not p.name.startswith(".")] == ["thesis.tex"]


@pytest.mark.simulator
@pytest.mark.parametrize("stage", [["posterior", "fit"], ["pretrain", "--pretraining.method", "bc"]])
def test_data_of_another_simulator_version(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: list[str]
) -> None:
    arguments = [*stage, "--data.demonstrations", str(files / "newer.hdf5"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "version" in said
    assert "1.5.1" in said
    assert "newer.hdf5" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--data.demonstrations", "{root}/none.hdf5"], "none.hdf5"),
        (["--data.demonstrations", "{root}/lift/policy.json"], "policy.json"),
        (["--data.demonstrations", "{root}/demos.hdf5", "--data.num-trajectories", "99"], "99"),
        (["--data.demonstrations", "{root}/demos.hdf5", "--data.filter-key", "nobody"], "nobody"),
        (["--data.demonstrations", "{root}/demos.hdf5", "--data.chunk", "50"], "shorter than the action chunk"),
    ],
)
def test_demonstrations_that_cannot_be_used(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], reason: str
) -> None:
    option = [word.format(root=files) for word in option]
    assert main(["pretrain", "--pretraining.method", "bc", *option, "--output", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


OPTIONS = {
    "pretrain": [
        "--policy.hidden", "--policy.layers", "--policy.time-dim", "--policy.inference-steps", "--policy.denoising-steps",
        "--policy.denoised-clip", "--pretraining.steps", "--pretraining.batch-size", "--pretraining.learning-rate",
        "--pretraining.posterior-weight", "--pretraining.ema-decay", "--pretraining.weight-decay", "--data.chunk", "--epochs",
        "--threads", "--jobs", "--seeds",
    ],
    "posterior fit": ["--ensemble.ensemble-size", "--ensemble.hidden", "--ensemble.learning-rate", "--ensemble.prior-weight"],
    "finetune dsrl": [
        "--dsrl.lr", "--dsrl.discount", "--dsrl.tau", "--dsrl.utd", "--dsrl.action-magnitude", "--training.budget-env-steps",
        "--training.initial-steps", "--training.num-envs", "--training.eval-episodes", "--inference-steps",
    ],
    "finetune best-of-n": ["--best-of-n.samples", "--best-of-n.episodes", "--iql.lr", "--iql.expectile", "--iql.steps"],
    "evaluate": ["--episodes", "--videos", "--horizon", "--num-envs"],
}  # fmt: skip
#: What is no mistake: a number that the option can have.
FINE = {
    ("--pretraining.posterior-weight", "0"), ("--pretraining.ema-decay", "0"), ("--pretraining.weight-decay", "0"),
    ("--seeds", "0"), ("--ensemble.prior-weight", "0"),
    ("--dsrl.discount", "0"), ("--videos", "0"), ("--training.initial-steps", "0"),
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_options_out_of_range_are_refused_before_anything_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    inputs = {
        "pretrain": ["--data.demonstrations", str(files / "demos.hdf5"), "--pretraining.method", "bc"],
        "posterior fit": ["--data.demonstrations", str(files / "demos.hdf5")],
    }.get(command, ["--policy", str(files / "lift")])
    for option in OPTIONS[command]:
        for value in ("-1", "nan", "inf", *(["0"] if (option, "0") not in FINE else [])):
            output = tmp_path / "out"
            try:
                status = main([*command.split(), *inputs, "--output", str(output), option, value])
            except SystemExit as error:  # tyro's own refusal
                status = int(error.code or 0)
            assert status == 2, f"{option} {value}"
            assert "Traceback" not in capsys.readouterr().err
            assert not output.exists(), f"{option} {value}"


def test_an_unknown_observation_is_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demonstrations(tmp_path / "lab.hdf5", environment={"env_name": "", "type": 2}, widths={"eef": 3, "cube": 7})
    arguments = ["pretrain", "--data.demonstrations", str(tmp_path / "lab.hdf5"), "--pretraining.method", "bc"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "observation-keys" in said
    assert "cube" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_results_file_is_not_reported_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps({"task": "Lift"})[:-5])
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")]) == 2
    assert "results.json" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
