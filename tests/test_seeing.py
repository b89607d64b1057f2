"""Algorithm 1 with an encoder a member: its steps against torch's own, resuming, the file, the stages and the recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

import postbc.experiments.report as report
from made import write_demonstrations
from mutations import mutate
from postbc.cli import main
from postbc.data.normalization import fit_normalization
from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.files import load_tree, save_tree
from postbc.policies import load_policy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import EnsembleConfig, Posterior, SeeingEnsemble, fit_seeing_ensemble
from postbc.posterior.diagnostics import extremes
from postbc.posterior.seeing import SeeingTraining
from postbc.runs import Run
from postbc.schemas import plain
from postbc.stages.posterior import PosteriorFit, fit_posterior, posterior_at
from test_pretraining import pixel_demonstrations

DATA = pixel_demonstrations(6, 0.1)
WINDOWS, NORMALIZATION = Windows(DATA, 2, tail="pad"), fit_normalization(DATA, DATA)
CHUNKS = NORMALIZATION.normalize_action(WINDOWS.chunk(torch.arange(len(WINDOWS))))


def config(**changes: Any) -> EnsembleConfig:
    vision = EncoderConfig(keypoints=4, channels=(4,), crop=changes.pop("crop", None))
    return EnsembleConfig(**{
        "ensemble_size": 3, "hidden": 8, "layers": 1, "steps": 6, "batch_size": 8, "learning_rate": 1e-2, "encoder": "own",
        "vision": vision, **changes,
    })  # fmt: skip


def made(of: EnsembleConfig) -> SeeingEnsemble:
    return SeeingEnsemble(of, WINDOWS.shapes, 1, 2, 2, torch.Generator().manual_seed(0))


def training(of: EnsembleConfig, ensemble: SeeingEnsemble | None = None) -> SeeingTraining:
    return SeeingTraining(ensemble or made(of), WINDOWS, CHUNKS, NORMALIZATION, seed=1)


def weights(of: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in of.parameters()])


# -- training ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bootstrap", ["trajectory", "pair"])
@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
def test_steps_are_those_of_networks_trained_alone_by_torch(likelihood: str, bootstrap: str) -> None:
    of = config(likelihood=likelihood, bootstrap=bootstrap, target_noise=0.1, prior_weight=0.3, learning_rate=1e-3)
    ensemble = made(of)
    first = copy.deepcopy(ensemble)
    ours = training(of, ensemble)
    generator = ours.data.clone_state()
    ours.train(5)
    draws = [ours.sampler.draw(8, generator) for _ in range(5)]
    assert ours.noise is not None
    for k, network in enumerate(copy.deepcopy(first).members):
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        for rows in (draw[k] for draw in draws):
            target = CHUNKS.flatten(1)[rows] + ours.noise[k, rows]
            output = network(WINDOWS.observation(rows), NORMALIZATION)
            if likelihood == "mse":
                loss = torch.nn.functional.mse_loss(output, target)
            else:
                normal = torch.distributions.Normal(output[:, :4], output[:, 4:].clamp(-5, 2).exp())
                loss = -normal.log_prob(target).mean() - 0.5 * np.log(2 * np.pi)
            for p, anchor in zip(network.parameters(), first.members[k].parameters()):
                loss = loss + 0.3 / CHUNKS.numel() * (p - anchor).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        # what they say, as a bias of maps before their softmax has no gradient but rounding's, which Adam makes large
        with torch.no_grad():
            every = WINDOWS.observation(torch.arange(len(WINDOWS)))
            alone, ours_k, before = (m(every, NORMALIZATION) for m in (network, ensemble.members[k], first.members[k]))
        torch.testing.assert_close(ours_k, alone, atol=1e-4, rtol=0)
        assert (alone - before).abs().mean() > 2e-3
    members = [weights(member) for member in ensemble.members]
    assert all(not torch.equal(members[0], other) for other in members[1:])


@pytest.mark.parametrize("cached", [True, False])
def test_training_resumes_to_the_bit_wherever_it_is_cut(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    windows, of, found = Windows(DATA, 2, tail="pad"), config(crop=28, target_noise=0.1, prior_weight=0.5), []
    assert windows.reads_files != cached
    for blocks in ((5,), (2, 3), (1, 1, 3)):
        ensemble = made(of)
        whole = SeeingTraining(ensemble, windows, CHUNKS, NORMALIZATION, seed=1)
        for block in blocks:
            state, anchors = whole.state(), whole.anchors
            whole = SeeingTraining(ensemble, windows, CHUNKS, NORMALIZATION, seed=1)
            whole.anchors = anchors
            whole.load_state(state)
            whole.train(block)
        found.append(weights(ensemble))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_fit_that_was_stopped_goes_on_to_the_same_ensemble(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def save_and_stop(step: int, state: Any) -> None:
        save(step, state)
        raise Stop

    of = config(crop=28)
    whole = fit_seeing_ensemble(WINDOWS, NORMALIZATION, of, 5)
    with Run(tmp_path / "r", of) as run:
        save, run.save = run.save, save_and_stop  # type: ignore[method-assign, assignment]
        with pytest.raises(Stop):
            fit_seeing_ensemble(WINDOWS, NORMALIZATION, of, 5, run=run, checkpoint_seconds=0)
    with Run(tmp_path / "r", of, resume=True) as run:
        resumed = fit_seeing_ensemble(WINDOWS, NORMALIZATION, of, 5, run=run)
    assert torch.equal(weights(whole), weights(resumed))


def test_members_learn_to_see_and_agree_less_where_nothing_was_shown() -> None:
    """The error falls to a fraction of the targets' variance; frames of noise, which nobody demonstrated, leave them divided."""
    data = pixel_demonstrations(25, 0.05)
    windows, normalization = Windows(data, 2, tail="pad"), fit_normalization(data, data)
    of = config(
        ensemble_size=4,
        hidden=64,
        steps=150,
        batch_size=64,
        learning_rate=3e-3,
        vision=EncoderConfig(keypoints=16, channels=(16, 16)),
    )
    ensemble = fit_seeing_ensemble(windows, normalization, of, 0)
    rows = torch.arange(len(windows))
    seen, chunks = windows.observation(rows), normalization.normalize_action(windows.chunk(rows)).flatten(1)
    predicted = ensemble.predict(seen, normalization)
    assert (predicted.mean(0) - chunks).square().mean() < 0.3 * chunks.var(0).mean()
    frames = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apart = ensemble.predict({"image.top": frames}, normalization).std(0).mean()
    factor = ensemble.factor(windows, normalization, batch=50)
    assert apart > 1.5 * factor.std().mean()
    expected = np.cov(predicted[:, 7].numpy(), rowvar=False)  # Algorithm 1's last line
    np.testing.assert_allclose(factor.covariance()[7].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["small", "resnet18"])
def test_in_bfloat16_it_stays_near(kind: Any) -> None:
    of, found = config(ensemble_size=2, vision=EncoderConfig(4, (4,), kind=kind)), []
    for precision in ("float32", "bfloat16"):
        compute = Compute(device="cpu", precision=precision)
        rounded = SeeingTraining(made(of), WINDOWS, CHUNKS, NORMALIZATION, 0, compute)
        found.append(rounded.train(1))
        assert all(p.dtype == torch.float32 for p in rounded.ensemble.parameters())
        assert rounded.train(1).isfinite().all()
    torch.testing.assert_close(*found, atol=0, rtol=0.03)
    assert not torch.equal(*found)


@pytest.mark.slow
def test_compiled_it_fits_the_same() -> None:
    of, found = config(ensemble_size=2, learning_rate=1e-3), []
    for compiled in (False, True):
        ensemble = made(of)
        SeeingTraining(ensemble, WINDOWS, CHUNKS, NORMALIZATION, 0, Compute(device="cpu", compile=compiled)).train(4)
        found.append(ensemble.predict(WINDOWS.observation(torch.arange(20)), NORMALIZATION))
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [True, False])
def test_a_gpu_fits_nearly_the_same(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    of, found = config(ensemble_size=2, learning_rate=1e-3), []
    for device in ("cpu", "cuda"):
        windows = Windows(DATA, 2, tail="pad", device=device)
        ensemble = fit_seeing_ensemble(windows, copy.deepcopy(NORMALIZATION).to(device), of, 0, Compute(device=device))
        found.append(ensemble.factor(windows, copy.deepcopy(NORMALIZATION).to(device)).std().cpu())
    torch.testing.assert_close(*found, atol=5e-3, rtol=0)


# -- what is refused -----------------------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own encoders[\s\S]*ensemble.vision"):
        EnsembleConfig(vision=EncoderConfig(kind="resnet18"))
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    seen = TrainingSetConfig(file, image_keys=("top_image",))
    for wanted, words in (
        (PosteriorFit(TrainingSetConfig(file), tmp_path / "p", ensemble=config()), r"no images[\s\S]*image-keys"),
        (PosteriorFit(seen, tmp_path / "p", ensemble=config(crop=17)), "smaller than the crop"),
        (PosteriorFit(seen, tmp_path / "p", tmp_path, ensemble=config()), r"of their own, or share[\s\S]*leave one"),
    ):
        with pytest.raises(InputError, match=words):
            fit_posterior(wanted, 0)
        assert not (tmp_path / "p").exists()


def test_extremes_are_apart() -> None:
    level, step = np.array([5.0, 4, 3, 0, 1, 2, 9, 8]), np.array([0, 1, 2, 3, 4, 20, 0, 30])
    episode = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    assert extremes(level, episode, step, 3) == ([3, 5, 7], [6, 7, 0])
    assert extremes(level, episode, step, 1) == ([3], [6])


# -- the stages ----------------------------------------------------------------------------------------------------------------------
def test_the_stages_without_any_policy_before(tmp_path: Path) -> None:
    """Fit by the command line, pretrain by PostBC with full and with diagonal covariance; the picture of frames; a damaged file."""
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    data = (
        f"--data.demonstrations {file} --data.image-keys top_image --data.num-trajectories 3 --data.observation-steps 2".split()
    )
    posterior = str(tmp_path / "posterior")
    fit = (
        f"--output {posterior} --ensemble.encoder own --ensemble.ensemble-size 2 --ensemble.hidden 8 --ensemble.steps 3 "
        "--ensemble.batch-size 8 --ensemble.bootstrap pair --ensemble.vision.channels 4 --ensemble.vision.keypoints 4 "
        "--ensemble.vision.crop 14"
    ).split()
    assert main(["posterior", "fit", *data, *fit]) == 0
    folder = tmp_path / "posterior/seed_0"
    assert {"posterior.safetensors", "posterior.png", "posterior_frames.png", "diagnostics.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "encoder.safetensors").exists()
    report.build([tmp_path / "posterior"], tmp_path / "report")
    assert "seed_0/posterior_frames.png" in (tmp_path / "report/report.html").read_text()
    found = Posterior.load(folder)
    assert isinstance(found.model, SeeingEnsemble)
    assert (found.model.observation_steps, found.model.config.vision.crop) == (2, 14)
    training_set = load_training_set(TrainingSetConfig(file, 3, image_keys=("top_image",), observation_steps=2), 0)
    factor = posterior_at(tmp_path / "posterior", training_set, 0).factor()
    torch.testing.assert_close(factor.std(), found.of_windows(training_set.windows).std())
    assert factor.std().min() >= 0
    assert factor.std().max() > 0
    train = (
        f"--posterior {posterior} --policy.hidden 8 --policy.denoising-steps 4 --policy.inference-steps 2 --policy.encoder.channels 4 "
        "--pretraining.steps 3 --pretraining.batch-size 8"
    ).split()
    for output, more in (("full", []), ("diagonal", ["--pretraining.diagonal"])):
        assert main(["pretrain", *data, *train, *more, "--output", str(tmp_path / output)]) == 0
        policy = load_policy(tmp_path / output / "seed_0")
        assert (policy.about.method, set(policy.shapes)) == ("postbc", {"state", "image.top"})
    with pytest.raises(InputError, match="other windows"):
        posterior_at(tmp_path / "posterior", load_training_set(TrainingSetConfig(file, 3, image_keys=("top_image",)), 0), 0)
    tree = load_tree(folder / "posterior.safetensors")
    del tree["shapes"]
    save_tree(folder / "posterior.safetensors", tree)
    with pytest.raises(InputError, match="shapes"):
        Posterior.load(folder)


def test_members_are_told_the_task_by_the_vectors_of_a_file(tmp_path: Path) -> None:
    """Beside what they see; kept in the posterior's file, so that the vectors' own is not needed again."""
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)}, tasks=("come", "flee"))
    vectors = {"come": np.array([1, 2, 3], np.float32), "flee": np.array([-1, 0, 5], np.float32)}
    save_file(vectors, tmp_path / "v.safetensors")
    data = TrainingSetConfig(file, image_keys=("top_image",), language=tmp_path / "v.safetensors")
    fitted = fit_posterior(PosteriorFit(data, tmp_path / "p", ensemble=config()), 0)
    member: Any = fitted.model.members[1]
    assert torch.equal(member.encoder.vectors, torch.tensor([[1.0, 2, 3], [-1, 0, 5]]))
    training_set = load_training_set(data, 0)
    seen = training_set.windows.observation(torch.tensor([0]))
    other = seen | {"language": 1 - seen["language"]}
    ensemble: Any = fitted.model
    assert not torch.equal(ensemble.predict(seen, fitted.normalization), ensemble.predict(other, fitted.normalization))
    assert posterior_at(tmp_path / "p", training_set, 0).factor().rows.isfinite().all()


def test_files_of_before_are_written_as_before() -> None:
    """Nothing is said of encoders where members look at features."""
    assert not {"encoder", "vision"} & set(plain(EnsembleConfig()))
    assert plain(config())["encoder"] == "own"
    assert "kind" not in plain(config())["vision"]


def test_a_mutated_file_is_refused_or_is_a_posterior(tmp_path: Path) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    ensemble = made(config()).requires_grad_(False)
    Posterior(ensemble, NORMALIZATION, "abc", 0).save(tmp_path)
    again = Posterior.load(tmp_path)
    assert torch.equal(again.of_windows(WINDOWS).rows, ensemble.factor(WINDOWS, NORMALIZATION).rows)
    path = tmp_path / "mutated.safetensors"

    @hypothesis.settings(max_examples=20, deadline=None)
    @hypothesis.given(found=hypothesis.strategies.data())
    def check(found: Any) -> None:
        tree = load_tree(tmp_path / "posterior.safetensors")
        mutate(tree, found)
        save_tree(path, tree)
        try:
            posterior = Posterior.load(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert posterior.model.config.ensemble_size >= 2

    check()
