"""`postbc pretrain`: Algorithm 2 on the demonstrations of each seed, for any registered kind of policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
import tyro

from postbc.data.episodes import COORDINATES
from postbc.data.training_set import TrainingSet, TrainingSetConfig, load_training_set
from postbc.devices import Compute
from postbc.errors import require
from postbc.files import write_json
from postbc.nn import check_memory
from postbc.policies.base import POLICY_FILE, About, load_policy, policy_class, save_policy
from postbc.posterior import Calibration, ClosedForm
from postbc.pretraining import PretrainingConfig, pretrain, train
from postbc.progress import say
from postbc.runs import Run, digest
from postbc.schemas import Count, Seed, plain, schema
from postbc.seeding import make_generator
from postbc.stages.calibrate import CALIBRATION_FILE, warn
from postbc.stages.posterior import posterior_at
from postbc.stages.seeds import in_epochs, of_one_seed
from postbc.value_dice import ValueDICE, ValueDICEConfig, check_policy

C = TypeVar("C")


@schema
class Pretrain(Generic[C]):
    """Pretrain a policy by BC, σ-BC or PostBC (Algorithm 2), or by ValueDICE (--policy.kind gaussian).

    Writes seed_<seed>/policy.safetensors (averaged weights, everything inference needs) and policy.json into the output directory.
    """

    data: TrainingSetConfig
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    policy: C
    """Kind (--policy.kind diffusion, flow or gaussian; each has options of its own), architecture and sampling."""
    posterior: Path | None = None
    """Directory that `postbc posterior fit` wrote (postbc only)."""
    seeds: tuple[Seed, ...] = (0,)
    """One policy a seed."""
    pretraining: PretrainingConfig = PretrainingConfig()
    value_dice: ValueDICEConfig = ValueDICEConfig()
    """Of pretraining.method value-dice, which has none of the other's numbers."""
    epochs: Count | None = None
    """Epochs instead of pretraining.steps (paper: 3000)."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""


def pretrain_policy(config: Pretrain[Any], seed: int) -> Any:
    """Algorithm 2 for one seed, resumable; the policy that was saved.

    Raises:
        InputError: data, posterior or output directory cannot be used.
        NotFiniteError: the loss or a weight is not finite.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    pretraining, kind, factor = config.pretraining, policy_class(config.policy.kind), None
    require(
        pretraining.method != "postbc" or config.posterior is not None, "PostBC needs a posterior.", key="posterior",
        found="none given", expected="a directory", remedy="run `postbc posterior fit` first and give --posterior DIR",
    )  # fmt: skip
    require(
        pretraining.method == "postbc" or config.posterior is None, "A posterior is PostBC's alone.", key="posterior",
        found=f"{config.posterior} with method {pretraining.method}", remedy="leave --posterior out, or pretrain by postbc",
    )  # fmt: skip
    data = load_training_set(config.data, seed, device)
    pretraining = in_epochs(pretraining, config.epochs, len(data.windows))
    inputs, chosen, calibration, variant = {"demonstrations": data.fingerprint}, config.policy, None, list[str]()
    if data.vectors is not None:
        inputs["language"] = digest(str(config.data.language))
        require(hasattr(chosen, "encoder"), "This kind of policy keeps no vectors for its tasks.", key="data.language",
                found=f"policy.kind {chosen.kind}", expected="one-hot")  # fmt: skip
        chosen = dataclasses.replace(chosen, encoder=dataclasses.replace(chosen.encoder, language=data.vectors.shape[1]))
    if pretraining.method == "postbc":
        assert config.posterior is not None
        at = posterior_at(config.posterior, data, seed, device)
        inputs["posterior"] = at.digest
        if pretraining.coherent:
            factor, share = at.posterior.leading(at.at, pretraining.coherent)
            say(f"{pretraining.coherent} coordinates hold {share:.0%} of the posterior's variance at the demonstrations")
        else:
            factor = at.factor()
        variant += ["closed form"] * isinstance(at.posterior.model, ClosedForm)
        variant += [f"coherent {pretraining.coherent}"] * bool(pretraining.coherent)
        variant += ["auto"] * (pretraining.posterior_weight == "auto")
        if pretraining.posterior_weight == "auto":
            calibration = at.calibrate(data)
            pretraining = dataclasses.replace(pretraining, posterior_weight=calibration.posterior_weight)

    shapes = {**data.shapes, **({COORDINATES: (pretraining.coherent,)} if pretraining.coherent else {})}

    def build(about: About | None = None) -> Any:
        generator = make_generator(seed, "policy/initialisation")
        return kind(
            chosen, shapes, data.dataset.action_dim, config.data.chunk, data.normalization, generator,
            config.data.observation_steps, about,
        )  # fmt: skip

    dice = pretraining.method == "value-dice"
    with torch.device("meta"):
        blank = build()
        check_memory(blank, 5, device, "policy")
    if dice:
        check_policy(blank, data.windows, config.compute)
        require(
            config.epochs is None,
            "ValueDICE counts steps.",
            key="epochs",
            found=config.epochs,
            remedy="give --value-dice.steps",
        )
        pretraining = dataclasses.replace(pretraining, steps=config.value_dice.steps)
    moved = ("compute", "data.demonstrations", "data.language", *(("posterior",) if factor is not None else ()))
    recorded = of_one_seed(config, seed)
    with Run(config.output / f"seed_{seed}", recorded, resume=config.resume, inputs=inputs, revisable=moved) as run:
        if not (run.directory / POLICY_FILE).exists():
            if calibration is not None:
                warn(calibration, seed)
                if calibration.source != "fallback":
                    say(f"seed {seed}: α = {calibration.posterior_weight:.2f} ({calibration.source}: {calibration.reason})")
                write_json(run.directory / CALIBRATION_FILE, plain(calibration))
            policy = build(describe(config, pretraining, data, seed, run, calibration, variant))
            if data.vectors is not None:
                policy.encoder.vectors.copy_(data.vectors)
            if dice:
                trainer = ValueDICE(policy, data.windows, config.value_dice, seed, config.compute)
                train(trainer, f"ValueDICE, seed {seed}", config.value_dice.steps, run)
            else:
                pretrain(policy, data.windows, pretraining, seed, factor, config.compute, run)
            save_policy(run.directory / POLICY_FILE, policy)
        with run.reading():
            policy = load_policy(run.directory, device)
        run.finish()
    return policy


def describe(
    config: Pretrain[Any],
    pretraining: PretrainingConfig,
    data: TrainingSet,
    seed: int,
    run: Run,
    calibration: Calibration | None,
    variant: Sequence[str],
) -> About:
    """What the policy's file says about it."""
    method = pretraining.method
    return About(
        method=method,
        posterior_weight=pretraining.posterior_weight
        if method == "postbc" and pretraining.posterior_weight != "auto"
        else None,
        posterior_weight_source=f"{calibration.source}: {calibration.reason}" if calibration else None,
        variant=", ".join(variant) or None,
        sigma=pretraining.sigma if method == "sigma-bc" else None,
        seed=seed,
        task=data.dataset.environment.get("env_name") or None,
        data=Path(config.data.demonstrations).name,
        data_digest=digest(config.data.demonstrations),
        demonstrations=len(data.dataset),
        trajectories=tuple(data.dataset.names),
        windows=len(data.windows),
        facts=plain(data.facts),
        steps=pretraining.steps,
        compute=plain(config.compute),
        versions={name: value for name, value in run.versions.items() if name != "command"},
    )
