"""Bad input across the stages: each row ends with status 2 and its reason, and nothing is written. (Files of demonstrations have
their own table in test_demonstrations_bad_input.py.)"""

import json

import numpy as np
import pytest
import torch

from postbc.cli import main
from postbc.demonstrations import Demonstrations, Normalization, read_robomimic, write_robomimic
from postbc.errors import InputError
from postbc.finetuning.dsrl_training import finetune_dsrl
from postbc.nn import make_generators
from postbc.policies import DiffusionConfig, DiffusionPolicy
from test_pretraining import write_demonstrations

SMALL = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2)


def save_policy(directory, observation_dim=19, action_dim=7, task="Lift", **config):
    identity = Normalization(-np.ones(observation_dim), np.ones(observation_dim), -np.ones(action_dim), np.ones(action_dim))
    about = {"task": task, "method": "bc", "demonstrations": 1}
    settings = DiffusionConfig(**{**SMALL.__dict__, **config})
    policy = DiffusionPolicy(settings, observation_dim, action_dim, [0], make_generators([0]), [identity], about)
    policy.save(directory / "policy.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    save_policy(root / "lift")
    save_policy(root / "wide", observation_dim=23)
    save_policy(root / "can", observation_dim=23, task="PickPlaceCan")
    save_policy(root / "short_action", action_dim=4)
    save_policy(root / "ddpm", sampler="ddpm")
    save_policy(root / "unknown", task=None)
    write_demonstrations(root / "demos.hdf5")
    data = read_robomimic(root / "demos.hdf5")
    newer = Demonstrations(
        data.trajectories, data.observation_keys, data.observation_dims, {**data.environment, "env_version": "1.5.1"}
    )
    write_robomimic(root / "newer.hdf5", newer)
    (root / "pickle").mkdir()
    torch.save({"weights": torch.ones(3)}, root / "pickle/policy.safetensors")
    (root / "truncated").mkdir()
    whole = (root / "lift/policy.safetensors").read_bytes()
    (root / "truncated/policy.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "taken").mkdir()
    (root / "taken/thesis.tex").write_text("mine")
    return root


STAGES = {
    "evaluate": ["evaluate", "--episodes", "1", "--videos", "0"],
    "dsrl": ["finetune", "dsrl"],
    "best-of-n": ["finetune", "best-of-n"],
}
POLICIES = {
    "wide": "observation size",
    "short_action": "action",
    "pickle": "pickle",
    "truncated": "not a readable checkpoint",
    "missing": "There is no such",
    "unknown": "does not say what task",
}


@pytest.mark.simulator
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_that_do_not_fit(files, tmp_path, capsys, stage, policy):
    output = tmp_path / "out"
    assert main([*STAGES[stage], "--policy", str(files / policy), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert POLICIES[policy] in said
    assert policy in said, "the message names the file"
    assert not output.exists()


@pytest.mark.simulator
@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_of_another_task_and_a_taken_directory(files, tmp_path, capsys, stage):
    output = tmp_path / "out"
    assert main([*STAGES[stage], "--policy", str(files / "can"), "--task", "Lift", "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert "another task" in said
    assert "Can" in said
    assert not output.exists()
    assert main([*STAGES[stage], "--policy", str(files / "lift"), "--output", str(files / "taken")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (files / "taken").iterdir()] == ["thesis.tex"]


def test_dsrl_refuses_a_sampler_with_noise_of_its_own(files, tmp_path):
    """The command samples by DDIM whatever the file says; somebody's own policy object may not."""
    with pytest.raises(InputError, match="deterministic"):
        finetune_dsrl(DiffusionPolicy.load(files / "ddpm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.simulator
@pytest.mark.parametrize("stage", [["posterior", "fit"], ["pretrain", "--pretraining.method", "bc"]])
def test_data_of_another_simulator_version(files, tmp_path, capsys, stage):
    arguments = [*stage, "--data.demonstrations", str(files / "newer.hdf5"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "another version of the simulator" in said
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
        (
            ["--data.demonstrations", "{root}/demos.hdf5", "--data.chunk", "50", "--policy.chunk", "50"],
            "shorter than the action chunk",
        ),
    ],
)
def test_demonstrations_that_cannot_be_used(files, tmp_path, capsys, option, reason):
    option = [word.format(root=files) for word in option]
    assert main(["pretrain", "--pretraining.method", "bc", *option, "--output", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rollouts_of_another_size(files, tmp_path, capsys):
    rng = np.random.default_rng(0)
    data = Demonstrations.from_arrays([rng.random((9, 4))], [rng.uniform(-1, 1, (9, 7))], observation_keys=["state"])
    write_robomimic(tmp_path / "rollouts.hdf5", data)
    arguments = [
        "--policy",
        str(files / "lift"),
        "--rollouts",
        str(tmp_path / "rollouts.hdf5"),
        "--best-of-n.observation-keys",
        "state",
    ]
    assert main(["finetune", "best-of-n", *arguments, "--best-of-n.eval-episodes", "0", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "19" in said
    assert "4" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_results_file_is_not_reported_on(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps([{"task": "Lift"}])[:-5])
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")]) == 2
    assert "results.json" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
