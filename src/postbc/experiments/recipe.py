"""Experiments as data: `recipes/*.yaml`, the paper's Robomimic tables among them, and smaller, honest presets that a laptop carries."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
import yaml
from pydantic import Field

from postbc.agents.best_of_n import BestOfNConfig
from postbc.agents.dppo import DPPOConfig
from postbc.agents.dsrl import DSRLConfig
from postbc.agents.iql import IQLConfig
from postbc.agents.residual import ResidualConfig
from postbc.data.training_set import TrainingSetConfig
from postbc.data.transitions import TransitionConfig
from postbc.devices import Compute
from postbc.errors import InputError, require
from postbc.files import read_yaml
from postbc.policies.base import policy_class
from postbc.posterior.closed_form import ClosedFormConfig
from postbc.posterior.ensemble import EnsembleConfig
from postbc.pretraining import Method, PretrainingConfig
from postbc.schemas import Count, CountOrZero, Seed, later, parse, plain, schema
from postbc.training.dppo import DPPOTraining
from postbc.training.online import OnlineConfig
from postbc.training.residual import ResidualTraining
from postbc.value_dice import ValueDICEConfig

P = TypeVar("P")
Finetuner = Literal["dsrl", "dppo", "residual", "best-of-n"]
#: Fields of the finetuners.
FINETUNING = (
    "dsrl", "training", "dppo", "dppo_training", "residual", "residual_training", "residual_demonstrations", "best_of_n", "iql",
    "transitions",
)  # fmt: skip
#: What a method may have of its own.
DIFFERING = ("policy", "pretraining", "pretraining_epochs", "value_dice", *FINETUNING)

#: Fields of the recipe that stand for fields of its stages.
ONCE = {
    name: (*((training, key) for training in ("training", "dppo_training", "residual_training")), ("best_of_n", of_best_of_n))
    for name, key, of_best_of_n in (
        ("episodes", "eval_episodes", "eval_episodes"),
        ("horizon", "horizon", "horizon"),
        ("num_envs", "eval_envs", "num_envs"),
    )
}


def _differences(words: Iterable[str]) -> dict[str, dict[str, Any]]:
    """["sigma-bc.dsrl.utd=10"] -> {"sigma-bc": {"dsrl.utd": 10}}."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        where, equals, value = word.partition("=")
        method, dot, name = where.partition(".")
        require(
            equals and dot,
            "This is not a difference.",
            key="per_method",
            found=word,
            expected="METHOD.FIELD=VALUE: sigma-bc.dsrl.utd=10",
        )
        try:
            found.setdefault(method, {})[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError("This is not a value.", key="per_method", found=word) from None
    return found


_WORDS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*", metavar="[METHOD.FIELD=VALUE [METHOD.FIELD=VALUE ...]]", instance_from_str=_differences,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [f"{m}.{k}={v}" for m, fields in value.items() for k, v in fields.items()],
)  # fmt: skip


@schema
class RecipeData(TrainingSetConfig):
    """Which of the demonstrations a seed is trained on, and how they become windows."""

    demonstrations: Annotated[Path, tyro.conf.Suppress] = Path()  # the recipe says where they are


@schema
class Recipe(Generic[P]):
    """One experiment. The same demonstrations, seeds and budgets for every method."""

    policy: P
    """Architecture and sampling (--policy.kind NAME for another class; fields that it shares keep their values)."""
    about: Annotated[str, tyro.conf.Suppress] = ""
    """One line for the list of recipes."""
    source: Annotated[str, tyro.conf.Suppress] = ""
    """Where its numbers come from."""
    size: Annotated[str, tyro.conf.Suppress] = ""
    """How long it takes."""
    environment: str = "postbc/Lift"
    """Where to evaluate and finetune: postbc/Lift, Can, Square, PushT, libero/kitchen, or gymnasium:ID."""
    finetune_in: tuple[str, ...] = later(())
    """Environments to finetune in instead, each by itself from the same policies: one task of several at a time
    (libero/kitchen/3 libero/kitchen/14)."""
    demonstrations: Path | None = None
    """Demonstrations (robomimic's or LIBERO's HDF5, a folder of such files, or zarr); by default scripted operators record some
    (Lift, Can, Square and LIBERO's kitchens), unless collect_num is none."""
    collect_num: Count | None = 60
    """Scripted demonstrations to record, if no file is given. None: this recipe's numbers are of recorded ones, and it wants a file."""
    collect_operators: Annotated[tuple[str, ...], Field(min_length=1)] = ("all",)
    """Who records them (see `postbc demos collect`)."""
    collect_seed: Seed = 0
    """Seed of that recording."""
    data: RecipeData = field(default_factory=RecipeData)
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("bc", "sigma-bc", "postbc")
    """Ways to pretrain."""
    finetuners: tuple[Finetuner, ...] = ("best-of-n", "dsrl")
    """Ways to finetune."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Each is a pretraining and one RL run of every method."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    posterior_kind: Literal["ensemble", "closed-form"] = later("ensemble")
    """ensemble, or closed-form (its regressors are members of `ensemble`)."""
    closed_form: ClosedFormConfig = later(ClosedFormConfig())
    ensemble_epochs: Count | None = None
    """Epochs of the ensemble instead of ensemble.steps."""
    ensemble_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the ensemble's matrix products, whatever --precision says; auto: bfloat16 where the device multiplies it in hardware."""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    pretraining_epochs: Count | None = None
    """Epochs of pretraining instead of pretraining.steps."""
    value_dice: ValueDICEConfig = field(default_factory=ValueDICEConfig)
    """Of the method value-dice, whose policy is a Gaussian one."""
    dsrl: DSRLConfig = field(default_factory=DSRLConfig)
    training: OnlineConfig = field(default_factory=OnlineConfig)
    """Of DSRL."""
    dppo: DPPOConfig = field(default_factory=DPPOConfig)
    dppo_training: DPPOTraining = field(default_factory=DPPOTraining)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    residual_training: ResidualTraining = field(default_factory=ResidualTraining)
    residual_demonstrations: bool = True
    """Give residual RL the demonstrations (which need rewards)."""
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    per_method: Annotated[dict[Method, dict[str, Any]], _WORDS] = field(default_factory=dict)
    """What differs for a method, any field of the policy, pretraining or a finetuner: sigma-bc.dsrl.utd=10.
    Given on the command line it replaces all of the recipe's differences."""
    episodes: Count = 200
    """Evaluation episodes a seed, before and after finetuning."""
    horizon: Count | None = None
    """Environment steps of an episode; default the environment's."""
    num_envs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Environments for rollouts and evaluation."""
    videos: CountOrZero = 0
    """Videos of successes and of failures of each finetuned policy in the report."""
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1
    """Seeds and methods worked on at the same time, each in a process of its own (2 on 2 cores)."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = field(default_factory=Compute)

    def __post_init__(self) -> None:
        for name in ("methods", "finetuners", "seeds", "finetune_in"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), "Each may be given once.", key=name, found=", ".join(map(str, values)))
        for name, own in ONCE.items():
            for stage, key in own:
                value, default = getattr(getattr(self, stage), key), getattr(type(getattr(self, stage))(), key)
                require(
                    value in (default, getattr(self, name)), "This is said once for all stages.", key=f"{stage}.{key}", found=value,
                    remedy=f"give {name} instead",
                )  # fmt: skip
        for method, fields in self.per_method.items():
            for name in fields:
                require(
                    name.split(".")[0] in DIFFERING and name != "pretraining.method", "This cannot differ between methods.",
                    key=f"per_method: {method}.{name}", expected=f"a field of {', '.join(DIFFERING)}",
                )  # fmt: skip
            self.of_method(method)

    def of_method(self, method: Method) -> Recipe[P]:
        """The recipe as it is for one method: `per_method` applied, and `pretraining.method`."""
        values = plain(replace(self, per_method={}) if self.per_method else self, whole=True)
        if method == "value-dice" and values["policy"]["kind"] != "gaussian":  # at its published size, not the recipe's
            values["policy"] = plain(policy_class("gaussian").Config(), whole=True)
        for name, value in self.per_method.get(method, {}).items():
            *above, last = name.split(".")
            where = values
            for part in above:
                where = where.get(part) if isinstance(where, dict) else None
            require(
                isinstance(where, dict) and last in where, "There is no such field.", key=f"per_method: {method}.{name}",
                expected=", ".join(where) if isinstance(where, dict) else None,
            )  # fmt: skip
            where[last] = value
        values["pretraining"]["method"] = method
        if method != "postbc":  # as α and σ, its coordinates mean nothing to others
            values["pretraining"]["coherent"] = 0
        try:
            return parse_recipe(values)
        except InputError as error:
            raise InputError(f"What differs for {method} cannot be used. {error}", key=f"per_method: {method}") from None


# -- files ---------------------------------------------------------------------------------------------------------------------
def parse_recipe(values: Mapping[str, Any], file: str | Path | None = None) -> Recipe[Any]:
    """Plain values as a recipe, whose policy is of the kind that they name.

    Raises:
        InputError: a field that recipes do not have, or a value out of its range.
    """
    policy = values.get("policy")
    kind = policy.get("kind", "diffusion") if isinstance(policy, dict) else "diffusion"
    require(isinstance(kind, str), "A kind of policy is a name.", file=file, key="policy.kind", found=kind)
    generic: Any = Recipe
    parsed: Recipe[Any] = parse(generic[policy_class(kind).Config], {"policy": {}, **values}, file)
    return parsed


def names() -> list[str]:
    """The recipes that come with the package."""
    files = importlib.resources.files("postbc.experiments").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml") and not f.name.startswith("_"))


def load_recipe(name: str | Path) -> Recipe[Any]:
    """A recipe by name, or a YAML file of your own (a path that ends in .yaml).

    Raises:
        InputError: there is none, it cannot be used (the message names file and field), or it holds several variants.
    """
    recipes = load_recipes(name)
    require(len(recipes) == 1, "This is a recipe of several variants.", key="recipe", found=", ".join(recipes), expected="a single one",
            remedy=f"postbc sweep {name}")  # fmt: skip
    return next(iter(recipes.values()))


def load_recipes(name: str | Path) -> dict[str, Recipe[Any]]:
    """Those of a name or file by title: the one, or its `variants`, each with its values over the common ones.

    Raises:
        InputError: as :func:`load_recipe`.
    """
    values, title = _values(str(name), ()), Path(name).stem
    variants = values.pop("variants", None)
    if variants is None:
        return {title: parse_recipe(values, name)}
    require(isinstance(variants, dict) and variants and all(isinstance(v, dict) for v in variants.values()),
            "Variants are named differences.", file=name, key="variants", found=variants,
            expected="NAME: {FIELD: VALUE} for each")  # fmt: skip
    return {f"{title}-{variant}": parse_recipe(_over(values, own), f"{name}: {variant}") for variant, own in variants.items()}


def _values(name: str, below: tuple[str, ...]) -> dict[str, Any]:
    """The values of a recipe over those of its bases, of which the later are over the earlier."""
    require(name not in below, "A recipe is its own base.", key="base", found=" → ".join((*below, name)))
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name))
    else:
        packaged = importlib.resources.files("postbc.experiments").joinpath("recipes").joinpath(f"{name}.yaml")
        known = name.replace("-", "").replace("_", "").isalnum() and packaged.is_file()
        require(known, "There is no such recipe.", key="recipe", found=name, expected=", ".join(names()) + ", or a .yaml file")
        with importlib.resources.as_file(packaged) as path:
            values = read_yaml(path)
    bases = values.pop("base", ())
    bases = [bases] if isinstance(bases, str) else bases
    require(isinstance(bases, (list, tuple)) and all(isinstance(base, str) for base in bases), "A recipe's base is a name, or several.",
            file=name, key="base", found=bases)  # fmt: skip
    under: dict[str, Any] = {}
    for base in bases:
        beside = Path(name).parent / base if name.endswith((".yaml", ".yml")) and base.endswith((".yaml", ".yml")) else base
        of_base = _values(str(beside), (*below, name))
        require("variants" not in of_base, "A base is one recipe.", file=name, key="base", found=f"{base}, which has variants")
        under = _over(under, of_base)
    return _over(under, values)


def _over(under: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `under`, mapping by mapping. Another kind of policy keeps the fields that it shares."""
    merged = dict(under)
    for key, value in values.items():
        merged[key] = _over(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def with_policy(recipe: Recipe[Any], kind: str) -> Recipe[Any]:
    """The recipe with another class of policy, whose fields of the same name keep their values where it allows them."""
    config, values = policy_class(kind).Config, plain(recipe)
    if recipe.policy.kind == kind:
        return recipe
    chosen: dict[str, Any] = {"kind": kind}
    for name in (f for f in config.__dataclass_fields__ if f in values["policy"] and f != "kind"):
        try:
            parse(config, {**chosen, name: values["policy"][name]})
        except InputError:
            continue
        chosen[name] = values["policy"][name]
    return parse_recipe({**values, "policy": chosen})
