"""Several tasks and what tells them apart: in files, in training, in play, and in what is reported."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from made import write_demonstrations
from postbc import cli
from postbc.agents.best_of_n import BestOfNConfig
from postbc.agents.dsrl import DSRLConfig
from postbc.agents.iql import IQLConfig
from postbc.cli import main
from postbc.data import Dataset, TrainingSetConfig, load_training_set, read_dataset, write_robomimic
from postbc.data.language import read_vectors, sentences_of, with_language, write_vectors
from postbc.data.libero_tasks import KITCHEN
from postbc.environments import registry
from postbc.environments.registry import Environment
from postbc.errors import InputError
from postbc.evaluation import Evaluation, TaskRate
from postbc.policies.base import load_policy
from postbc.posterior.features import state_features
from postbc.statistics import wilson_interval
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.results import read_result
from toy import SPEED, PointReach

TASKS = ("come", "flee")
FACTS = {"env_name": "toy/Two", "type": 2, "env_kwargs": {}}


class TwoTasks(PointReach):
    """Odd episodes are solved at the goal's mirror image; "language" says which task it is, and nothing else does."""

    vocabulary = TASKS

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.shapes = {"state": (4,), "language": (2,)}

    @property
    def task_names(self) -> list[str]:
        return [TASKS[seed % 2] for seed in self.seeds]

    @property
    def sign(self) -> np.ndarray:
        return 1 - 2 * (self.seeds % 2)[:, None]

    def observation(self) -> dict[str, np.ndarray]:
        shown = np.concatenate([self.at[:, :2], self.sign * self.at[:, 2:]], 1).astype(np.float32)
        return {"state": shown, "language": np.eye(2, dtype=np.float32)[self.seeds % 2]}


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("toy/Two", TwoTasks, horizon=30, chunk=2, facts=lambda: FACTS, state_keys=("state",))
    monkeypatch.setitem(registry.ENVIRONMENTS, "toy/Two", lambda: environment)


def demonstrations(count: int = 60) -> Dataset:
    env, rng = TwoTasks(count, chunk=1), np.random.default_rng(0)
    seen = env.reset(np.arange(count))
    rows: list[list[tuple[np.ndarray, np.ndarray, bool]]] = [[] for _ in range(count)]
    while not env.over.all():
        actions = np.clip((env.at[:, 2:] - env.at[:, :2]) / SPEED + 0.1 * rng.normal(size=(count, 2)), -1, 1)
        waiting, step = env.over.copy(), env.step(actions[:, None])
        for i in np.flatnonzero(~waiting):
            rows[i].append((seen["state"][i], actions[i], bool(step.success[i])))
        seen = step.observation
    long = [i for i in range(count) if len(rows[i]) > 1]
    states, actions, wins = zip(*(zip(*rows[i]) for i in long))
    data = Dataset.from_arrays(
        [np.stack(x) for x in states],
        [np.stack(x) for x in actions],
        rewards=[np.array(x, float) for x in wins],
        environment=FACTS,
    )
    named = tuple(replace(e, task=TASKS[i % 2]) for e, i in zip(data, long))
    return replace(data, episodes=named, tasks=TASKS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_robomimic(tmp_path_factory.mktemp("two") / "two.hdf5", demonstrations())


def pretrain(file: Path, output: Path, *options: str) -> int:
    arguments = [
        "pretrain", "--data.demonstrations", str(file), "--output", str(output), "--data.chunk", "2", "--pretraining.method", "bc",
        "--pretraining.steps", "1500", "--pretraining.batch-size", "64", "--pretraining.learning-rate", "0.002",
        "--policy.hidden", "64",        "--policy.denoising-steps", "20", "--policy.inference-steps", "4",
    ]  # fmt: skip
    return cli.main([*arguments, *options])


def evaluated(policy: Path, output: Path) -> dict[str, Any]:
    options = ["--episodes", "40", "--videos", "0"]
    assert cli.main(["evaluate", "--policy", str(policy), "--output", str(output), *options]) == 0
    found: dict[str, Any] = json.loads((output / "seed_0/evaluation.json").read_text())
    return found


def test_told_its_task_a_policy_solves_both_and_untold_neither(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file to the table by task; by the vectors of a language model as by one-hot ones, which the policy's file then holds."""
    save_file({"come": np.ones(3, np.float32), "flee": np.float32([1, -1, 0])}, tmp_path / "words.safetensors")
    success = {}
    for name, options in {
        "untold": [], "told": ["--data.language", "one-hot"], "words": ["--data.language", str(tmp_path / "words.safetensors")]
    }.items():  # fmt: skip
        assert pretrain(file, tmp_path / name, *options) == 0
        success[name] = evaluated(tmp_path / name, tmp_path / f"evaluation-{name}")
    assert success["told"]["success"] > success["untold"]["success"] + 0.25
    assert success["words"]["success"] > success["untold"]["success"] + 0.25
    words = load_policy(tmp_path / "words/seed_0")
    assert (words.shapes["language"], words.feature_dim) == ((2,), 4 + 3)
    encoded = words.encode({"state": torch.zeros(2, 4), "language": torch.eye(2)})
    torch.testing.assert_close(encoded[:, 4:], torch.tensor([[1.0, 1, 1], [1, -1, 0]]))
    # by task
    rates = success["told"]["tasks"]
    assert [(rate["task"], rate["episodes"]) for rate in rates] == [("come", 20), ("flee", 20)]
    assert np.isclose(np.mean([rate["success"] for rate in rates]), success["told"]["success"])
    episodes = Evaluation.load(tmp_path / "evaluation-told/seed_0/episodes.jsonl").episodes
    assert all(e.task == TASKS[e.episode_seed % 2] for e in episodes)
    won = sum(e.success for e in episodes if e.task == "flee")
    assert tuple(rates[1]["success_interval"]) == pytest.approx(wilson_interval(won, 20))
    printed = capsys.readouterr().out
    assert "by task" in printed
    assert "flee" in printed
    # resumed by content: the same words elsewhere are the same, others are not
    (tmp_path / "moved.safetensors").write_bytes((tmp_path / "words.safetensors").read_bytes())
    assert pretrain(file, tmp_path / "words", "--data.language", str(tmp_path / "moved.safetensors"), "--resume") == 0
    save_file({"come": np.ones(3, np.float32), "flee": np.zeros(3, np.float32)}, tmp_path / "words.safetensors")
    assert pretrain(file, tmp_path / "words", "--data.language", str(tmp_path / "words.safetensors"), "--resume") == 2


def test_finetuners_learn_on_both_and_say_how_each_does(file: Path, tmp_path: Path) -> None:
    assert pretrain(file, tmp_path / "told", "--data.language", "one-hot", "--pretraining.steps", "300") == 0
    policy = load_policy(tmp_path / "told/seed_0")
    best = BestOfNConfig(episodes=12, samples=3, eval_episodes=10, num_envs=3)
    finetune_best_of_n(policy, "toy/Two", tmp_path / "best", best, IQLConfig(steps=20, hidden=(16,), batch_size=16))
    training = OnlineConfig(budget_env_steps=300, num_envs=2, initial_steps=60, eval_every=1000, eval_episodes=10, eval_envs=3)
    dsrl = DSRLConfig(variant="sac", hidden=16, layers=1, utd=1, batch_size=16)
    finetune_dsrl(policy, "toy/Two", tmp_path / "dsrl", dsrl, training)
    for folder in ("best", "dsrl"):
        result = read_result(tmp_path / folder)
        for rates, success in ((result.tasks_before, result.success_before), (result.tasks_after, result.success_after)):
            assert [rate.task for rate in rates] == list(TASKS)
            assert np.isclose(TaskRate.pooled(rates).success, success)  # type: ignore[arg-type]
    rollouts = with_language(read_dataset(tmp_path / "best/rollouts.hdf5"))
    assert rollouts.tasks == TASKS
    for episode in rollouts:
        assert episode.episode_seed is not None
        assert episode.task == TASKS[episode.episode_seed % 2]
        assert (np.asarray(episode.observations["language"]) == np.eye(2)[episode.episode_seed % 2]).all()


def test_a_posterior_is_told_the_task_too(file: Path, tmp_path: Path) -> None:
    data = load_training_set(TrainingSetConfig(file, chunk=2, language="one-hot"), 0)
    encode, rows = state_features(data.shapes, data.normalization), torch.arange(3)
    seen = data.windows.observation(rows)
    expected = torch.cat([data.normalization.normalize_state(seen["state"]), seen["language"]], 1)
    torch.testing.assert_close(encode(seen), expected)
    common = ["--data.demonstrations", str(file), "--data.chunk", "2", "--data.language", "one-hot", "--output"]
    small = ["--ensemble.ensemble-size", "3", "--ensemble.hidden", "8", "--ensemble.steps", "20"]
    assert cli.main(["posterior", "fit", *common, str(tmp_path / "posterior"), *small]) == 0
    options = ["--posterior", str(tmp_path / "posterior"), "--pretraining.steps", "20", "--policy.hidden", "8"]
    assert cli.main(["pretrain", *common, str(tmp_path / "postbc"), *options]) == 0


@given(tasks=st.lists(st.text("abcé ", min_size=1, max_size=8), min_size=1, max_size=5, unique=True), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_file_keeps_tasks(tasks: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, count = np.random.default_rng(seed), 4
    which = rng.integers(len(tasks), size=count)
    data = Dataset.from_arrays([rng.normal(size=(3, 2))] * count, [rng.normal(size=(3, 1))] * count)
    data = replace(data, tasks=tuple(tasks), episodes=tuple(replace(e, task=tasks[k]) for e, k in zip(data, which)))
    path = write_robomimic(tmp_path_factory.mktemp("tasks") / "d.hdf5", with_language(data))
    again = read_dataset(path)
    assert again.tasks == data.tasks
    assert [e.task for e in again] == [e.task for e in data]
    for episode, k in zip(with_language(again), which):
        np.testing.assert_array_equal(episode.observations["language"], np.eye(len(tasks))[[k] * 3])


def test_language_that_cannot_be_told(tmp_path: Path) -> None:
    lift = write_demonstrations(tmp_path / "lift.hdf5")
    with pytest.raises(InputError, match="do not say which task"):
        load_training_set(TrainingSetConfig(lift, language="one-hot"), 0)
    with pytest.raises(InputError, match="not listed"):
        replace(demonstrations(4), tasks=("come",))
    with pytest.raises(InputError, match="JSON list"):
        read_dataset(_with_tasks(tmp_path / "bad.hdf5", "[1]"))
    both = write_demonstrations(tmp_path / "two.hdf5", tasks=TASKS)
    assert (
        cli.main(["pretrain", "--data.demonstrations", str(both), "--output", str(tmp_path / "x"), "--policy.kind", "none"])
        == 2
    )
    save_file({"come": np.ones(3, np.float32)}, tmp_path / "few.safetensors")
    with pytest.raises(InputError, match=r"(?s)lacks tasks.*flee"):
        load_training_set(TrainingSetConfig(both, language=tmp_path / "few.safetensors"), 0)


def _with_tasks(path: Path, words: str) -> Path:
    import h5py

    write_demonstrations(path, tasks=TASKS)
    with h5py.File(path, "a") as file:
        file["data"].attrs["tasks"] = words
    return path


def test_vectors(tmp_path: Path) -> None:
    sound = {name: np.full(5, k, np.float32) for k, name in enumerate("abc")}
    save_file(sound, tmp_path / "all")
    np.testing.assert_array_equal(read_vectors(tmp_path / "all", ["c", "x", "b"], ["c"]), [[2] * 5, [0] * 5, [1] * 5])
    for change, words in (
        ({"b": None}, "lacks tasks"), ({"b": np.full(5, np.nan, np.float32)}, "cannot be used"),
        ({"b": np.zeros(4, np.float32)}, "cannot be used"), ({"a": np.zeros((5, 1), np.float32)}, "cannot be used"),
    ):  # fmt: skip
        save_file({k: v for k, v in (sound | change).items() if v is not None}, tmp_path / "changed")
        with pytest.raises(InputError, match=words):
            read_vectors(tmp_path / "changed", list("abc"), list("abc"))
    (tmp_path / "text").write_text("no vectors")
    for path in (tmp_path / "text", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"cannot be read(.|\n)*expected: one-hot, or"):
            read_vectors(path, ["a"], ["a"])


# -- a language model --------------------------------------------------------------------------------------------------------
def bert(folder: Path, pooler: bool = True) -> Any:
    """A BERT of random weights, with a vocabulary of letters, as transformers keeps them in a folder."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##"))]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": len(words),
    }
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.5), add_pooling_layer=pooler).eval()
    model.save_pretrained(folder)
    return model


def test_vectors_are_made_once_by_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each sentence alone through BERT, then tanh of its pooler's layer at the first token, by hand; a file that pretraining reads."""
    model, output = bert(tmp_path / "bert"), tmp_path / "vectors.safetensors"
    demonstrations = write_demonstrations(tmp_path / "d.hdf5", tasks=TASKS)
    line = ["demos", "embed", "libero/kitchen", "fetch it", str(demonstrations), "--output", str(output), "--model"]
    assert main([*line, str(tmp_path / "bert")]) == 0
    names = [*KITCHEN, "fetch it", *sorted(TASKS)]
    found = read_vectors(output, names, names)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    for name, vector in zip(names, found, strict=True):
        sentence = name.partition("SCENE")[2][2:].replace("_", " ") if name in KITCHEN else name
        with torch.no_grad():
            first = model.embeddings(torch.tensor([tokenizer.encode(sentence)]))
            hidden = model.encoder(first, attention_mask=None)[0][0, 0]
            expected = torch.tanh(model.pooler.dense.weight @ hidden + model.pooler.dense.bias)
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert len(np.unique(found.round(4), axis=0)) == len(names) - 1  # two scenes have a drawer to open, in the same words
    said = capsys.readouterr().out
    assert "'turn on the stove'" in said
    assert main([*line, str(tmp_path / "bert")]) == 2  # it is there
    assert "--overwrite" in capsys.readouterr().err


def test_models_that_cannot_embed_are_refused(tmp_path: Path) -> None:
    bert(tmp_path / "headless", pooler=False)
    with pytest.raises(InputError, match="no pooled output that was trained"):
        write_vectors(tmp_path / "v", {"a": "a"}, str(tmp_path / "headless"))
    with pytest.raises(InputError, match=r"cannot be had[\s\S]*give the folder"):
        write_vectors(tmp_path / "v", {"a": "a"}, str(tmp_path / "nowhere"))
    assert not (tmp_path / "v").exists()


def test_without_transformers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        write_vectors(tmp_path / "v", {"a": "a"}, "bert-base-cased")


def test_tasks_as_sentences() -> None:
    assert sentences_of(["libero/KITCHEN_SCENE3_turn_on_the_stove"]) == {
        "KITCHEN_SCENE3_turn_on_the_stove": "turn on the stove"
    }
    assert list(sentences_of(["libero/kitchen", "pick up the cup"])) == [*KITCHEN, "pick up the cup"]
