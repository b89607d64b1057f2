"""Algorithm 1 with an encoder a member: its steps against torch's own, resuming, the file, the stages and the recipe."""

from __future__ import annotations

import copy
import dataclasses
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
from postbc.policies import DiffusionConfig, load_policy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import (
    Calibration,
    ClosedForm,
    Ensemble,
    EnsembleConfig,
    Posterior,
    SeeingEnsemble,
    bootstrap_counts,
    fit_closed_form,
    fit_seeing_ensemble,
)
from postbc.posterior.diagnostics import extremes
from postbc.posterior.seeing import SeeingTraining
from postbc.pretraining import PretrainingConfig
from postbc.runs import Run
from postbc.schemas import plain, read_json
from postbc.seeding import make_generator
from postbc.stages.posterior import PosteriorFit, fit_posterior, posterior_at
from postbc.stages.pretrain import Pretrain, pretrain_policy
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


def test_in_bfloat16_it_stays_near() -> None:
    of, found = config(ensemble_size=2), []
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"compile": True}, {"precision": "bfloat16"}, {"compile": True, "precision": "bfloat16"}], ids=str
)
def test_a_gpu_fits_compiled_and_in_bfloat16(changes: dict[str, Any]) -> None:
    of, found = config(ensemble_size=2, learning_rate=1e-3), []
    for compute in (Compute(device="cuda"), Compute(device="cuda", **changes)):
        windows = Windows(DATA, 2, tail="pad", device="cuda")
        training = SeeingTraining(made(of).cuda(), windows, CHUNKS.cuda(), copy.deepcopy(NORMALIZATION).cuda(), 0, compute)
        found.append(training.train(8).cpu())
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.ensemble.parameters())
    torch.testing.assert_close(*found, atol=0, rtol=0.05)


# -- what else is asked of it ----------------------------------------------------------------------------------------------------
def test_trajectories_are_predicted_by_the_members_that_never_saw_them() -> None:
    """An encoder has seen no more than its member: nothing of a trajectory that it was fitted without."""
    posterior = Posterior(made(config(ensemble_size=9)), NORMALIZATION, "abc", 4)
    episode = torch.as_tensor(WINDOWS.episode)
    oob = posterior.out_of_bag(WINDOWS, CHUNKS, episode)
    counts = bootstrap_counts(episode, 9, "trajectory", make_generator(4, "ensemble/bootstrap"))
    left = {int(t): np.flatnonzero(counts[:, episode == t][:, 0] == 0) for t in episode.unique()}
    kept = [t for t in left if len(left[t]) >= 3]
    assert len(kept) > 0
    assert oob.trajectory.unique().tolist() == kept
    predictions = made(config(ensemble_size=9)).predict(WINDOWS.observation(torch.arange(len(WINDOWS))), NORMALIZATION).double()
    for t in kept:
        own, here = predictions[left[t]][:, episode == t], oob.trajectory == t
        expected = CHUNKS.flatten(1)[episode == t] - own.mean(0)
        np.testing.assert_allclose(oob.residual[here], expected, atol=1e-5)
        np.testing.assert_allclose(oob.factor.covariance()[here][0], np.cov(own[:, 0].numpy(), rowvar=False), atol=1e-6)
        assert (oob.freedom[here] == len(left[t]) - 1).all()


def test_by_pair_nothing_is_left_out_and_no_frame_is_looked_at_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = Posterior(made(config(bootstrap="pair")), NORMALIZATION, "abc", 4)
    monkeypatch.setattr(SeeingEnsemble, "predict", None)
    with pytest.raises(InputError, match="whole trajectories"):
        posterior.out_of_bag(WINDOWS, CHUNKS, torch.as_tensor(WINDOWS.episode))


@pytest.mark.parametrize("cached", [True, False])
def test_directions_are_the_principal_ones_of_all_windows_together(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    windows = Windows(DATA, 2, tail="pad")
    posterior = Posterior(made(config(ensemble_size=4, bound="none")), NORMALIZATION, "abc", 0)
    predictions = posterior.model.predict(WINDOWS.observation(torch.arange(len(WINDOWS))), NORMALIZATION)  # type: ignore[arg-type]
    rows = ((predictions - predictions.mean(0)) / 3**0.5).double().numpy()  # (K, N, D)
    _, singular, directions = np.linalg.svd(rows.reshape(4, -1).T, full_matrices=False)
    leading, share = posterior.leading(windows, 1)
    assert share == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-4)
    expected = np.einsum("knd,k->nd", rows, directions[0])
    sign = np.sign((expected * leading.rows[:, 0].numpy()).sum())
    np.testing.assert_allclose(leading.rows[:, 0], sign * expected, atol=1e-5)
    torch.testing.assert_close(posterior.leading(windows, 3)[0].covariance(), posterior.factor(windows).covariance())


def test_of_the_wrong_thing_it_says_what_it_looks_at() -> None:
    seeing = Posterior(made(config()), NORMALIZATION, "abc", 0)
    heads = Posterior(Ensemble(EnsembleConfig(2, 8), 3, 2, 2, torch.Generator()), NORMALIZATION, "abc", 0)
    for asked in (seeing.factor, lambda at: seeing.leading(at, 1)):
        with pytest.raises(InputError, match="looks at images"):
            asked(torch.zeros(5, 3))
    with pytest.raises(InputError, match="looks at features"):
        heads.factor(WINDOWS)
    with pytest.raises(InputError, match="looks at features"):
        heads.of_windows(WINDOWS)
    with pytest.raises(InputError, match="not the features"):
        heads.out_of_bag(torch.zeros(5, 4), CHUNKS, torch.as_tensor(WINDOWS.episode))


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
    with pytest.raises(InputError, match=r"regresses from features[\s\S]*kind[\s\S]*--encoder DIR"):
        PosteriorFit(seen, tmp_path / "p", kind="closed-form", ensemble=config())
    with pytest.raises(InputError, match="regresses from features"):
        fit_closed_form(torch.randn(20, 3), torch.randn(20, 2, 2), torch.arange(5).repeat(4), config())


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


def test_alpha_and_coordinates_come_of_it_as_of_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`posterior calibrate` and auto; a coherent policy that sees; by pair both say why not, before anything is written."""
    file = write_demonstrations(tmp_path / "d.hdf5", trajectories=8, images={"top_image": (16, 16, 3)})
    data = ["--data.demonstrations", str(file), "--data.image-keys", "top_image"]
    training_set = TrainingSetConfig(file, image_keys=("top_image",))
    network = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2, encoder=EncoderConfig(4, (4,)))
    for bootstrap in ("trajectory", "pair"):
        of = config(ensemble_size=10, steps=3, bootstrap=bootstrap)
        fit_posterior(PosteriorFit(training_set, tmp_path / bootstrap, ensemble=of), 0)
        line = [
            "posterior",
            "calibrate",
            *data,
            "--posterior",
            str(tmp_path / bootstrap),
            "--output",
            str(tmp_path / f"{bootstrap}-c"),
        ]
        auto = Pretrain(training_set, tmp_path / f"{bootstrap}-auto", network, tmp_path / bootstrap,
                        pretraining=PretrainingConfig(posterior_weight="auto", steps=3, batch_size=8))  # fmt: skip
        if bootstrap == "trajectory":
            assert main(line) == 0
            found = read_json(tmp_path / "trajectory-c/seed_0/calibration.json", Calibration)
            assert pretrain_policy(auto, 0).about.posterior_weight == found.posterior_weight
        else:
            assert main(line) != 0
            with pytest.raises(InputError, match="whole trajectories"):
                pretrain_policy(auto, 0)
            assert not (tmp_path / "pair-c").exists()
            assert not (tmp_path / "pair-auto").exists()
    coherent = dataclasses.replace(
        auto, output=tmp_path / "coherent", pretraining=PretrainingConfig(coherent=2, steps=3, batch_size=8)
    )
    policy = pretrain_policy(coherent, 0)
    assert dict(policy.shapes) == {"state": (19,), "image.top": (3, 16, 16), "posterior": (2,)}
    assert "2 coordinates hold" in capsys.readouterr().out


def test_the_closed_form_of_a_policys_features(tmp_path: Path) -> None:
    """From images it takes what any posterior of features takes: an encoder; and its frames are drawn."""
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    data = TrainingSetConfig(file, image_keys=("top_image",))
    network = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2, encoder=EncoderConfig(4, (4,)))
    pretrain_policy(Pretrain(data, tmp_path / "bc", network, pretraining=PretrainingConfig("bc", steps=3, batch_size=8)), 0)
    small = EnsembleConfig(hidden=8, layers=1, steps=5, batch_size=8)
    fit = PosteriorFit(data, tmp_path / "p", tmp_path / "bc", kind="closed-form", ensemble=small)
    assert isinstance(fit_posterior(fit, 0).model, ClosedForm)
    assert {"posterior_frames.png", "encoder.safetensors"} <= {p.name for p in (tmp_path / "p/seed_0").iterdir()}
    assert posterior_at(tmp_path / "p", load_training_set(data, 0), 0).calibrate(load_training_set(data, 0)).trajectories == 6


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
