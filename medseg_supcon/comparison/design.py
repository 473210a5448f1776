"""What is compared: recipes, seeds, label budgets, a grid of variants, and which scans train, validate and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from medseg_supcon.bundle import read_recipe, read_yaml_file, shared_folder
from medseg_supcon.datasets import VALIDATION, Case, Dataset, Split, split_cases
from medseg_supcon.errors import ConfigError, DataError
from medseg_supcon.text import counted, suggestion

Names = Iterable[str] | None

PUT_ASIDE = 0.25  # share of the cases to test on if no case is left over


def _listed(value: Any) -> list[Any]:
    """The values of a list, of a text with commas, or a single one; digits become numbers."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    parts = value if isinstance(value, list) else [value]
    return [int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts]


def _recipes(value: Any) -> Any:
    if isinstance(value, dict):
        return [{"name": str(name)} | of if isinstance(of, dict) else of for name, of in value.items()]
    return [{"name": Path(part).stem, "recipe": part} if isinstance(part, str) else part for part in _listed(value)]


# a level may be called 0.1
NamedByText = BeforeValidator(lambda value: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value)
Level = Annotated[dict[str, Any], BeforeValidator(lambda settings: {} if settings is None else settings)]
Levels = Annotated[dict[str, Level], NamedByText]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=10**9)]], BeforeValidator(_listed), Field(min_length=1)]
Budgets = Annotated[list[PositiveInt | Literal["all"]], BeforeValidator(_listed), Field(min_length=1)]
RECIPES = "a list of names or .yaml files, or a mapping NAME: {recipe: NAME or file, KEY: VALUE, ...}"
VARIANTS = "a mapping AXIS: {LEVEL: {KEY: VALUE, ...}, ...}"


class Recipe(BaseModel):
    """A recipe's name or file under its name in the comparison, and settings of it alone (``model_extra``)."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    recipe: Annotated[str, Field(min_length=1)]


class ComparisonConfig(BaseModel):
    """What a comparison's file and options say. The description of a field says what is expected."""

    model_config = ConfigDict(strict=True, frozen=True)
    recipes: Annotated[list[Recipe], BeforeValidator(_recipes)] = Field(default=[], description=RECIPES)
    variants: Annotated[dict[str, Levels], NamedByText] = Field(default={}, description=VARIANTS)
    seeds: Seeds = Field(default=[0], description="a list of whole numbers from 0, of at most 9 digits")
    labels: Budgets = Field(default=["all"], description="a list of whole numbers from 1, or 'all'")
    validation: float = Field(default=VALIDATION, ge=0, le=0.9, description="a share from 0 to 0.9")
    epochs: PositiveInt | None = Field(default=None, description="a whole number from 1")
    settings: dict[str, Any] = Field(default={}, description="a mapping KEY: VALUE")
    robustness: bool = Field(default=True, description="true or false")
    training_score: bool = Field(default=False, description="true or false")


def read_comparison(name: str | Path | None = None, **options: Any) -> ComparisonConfig:
    """A comparison's YAML file, or a shipped one, with options that are not None; ``settings`` are added to the file's."""
    path, given, fields = Path(), dict[str, Any](), ComparisonConfig.model_fields
    if name is not None:
        shipped = shared_folder("configs") / "comparisons"
        path = Path(name) if Path(name).suffix in (".yaml", ".yml") else shipped / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
            raise ConfigError(f"--config {name}: the file does not exist. Known by name: {known}.")
        given = read_yaml_file(path, str(path)) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{path} must be a mapping of {', '.join(fields)}; found {given!r:.80}.")
        if unknown := [key for key in given if key not in fields]:
            raise ConfigError(f"{path} has an unknown key {unknown[0]!r}. {suggestion(unknown[0], fields)}")
    added = options.pop("settings", {})
    options = {key: value for key, value in options.items() if value is not None}
    try:
        config = ComparisonConfig.model_validate({k: v for k, v in (given | options).items() if v is not None})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        where, value = (f"--{key}", options[key]) if key in options else (f"{path}: {key}", given[key])
        raise ConfigError(f"{where} must be {fields[key].description}; found {value!r:.200}.") from None
    for recipe in () if "recipes" in options else config.recipes:
        if recipe.recipe.endswith((".yaml", ".yml")):
            recipe.recipe = str(path.parent / recipe.recipe)  # it is relative to the comparison's own folder
    kept = {key: value for key, value in config.settings.items() if key not in added}
    return config.model_copy(update={"settings": kept | added})


@dataclass(frozen=True)
class Variant:
    """One point of a grid: axis -> level (empty without a grid), and the settings laid over the recipe."""

    levels: Mapping[str, str]
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return ", ".join(self.levels.values())  # such as "SGD, fixed, with"

    @property
    def folder(self) -> str:
        return "-".join(re.sub(r"[^\w.]+", "_", level) for level in self.levels.values())


def make_variants(axes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[Variant, ...]:
    """Every combination of one level from each axis, the last axis changing fastest; without axes one variant."""
    for axis, of_axis in axes.items():
        if not of_axis:
            raise ConfigError(f"variants: the axis {axis!r} has no levels. Add some, or remove the axis.")
    variants: dict[str, Variant] = {}
    for chosen in product(*(of_axis.items() for of_axis in axes.values())):
        levels = dict(zip(axes, (level for level, _ in chosen), strict=True))
        variant = Variant(levels, tuple(setting for _, settings in chosen for setting in settings.items()))
        if variants.setdefault(variant.folder.lower(), variant) is not variant:
            raise ConfigError(
                f"variants: {variant.name!r} and another variant would use the same folder. Rename a level."
            )
    return tuple(variants.values())


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison."""

    recipe: Recipe
    labels: int
    seed: int
    variant: Variant

    @property
    def name(self) -> str:  # of the run's folder
        under = f"_{self.variant.folder}" if self.variant.folder else ""
        return f"{self.recipe.name}{under}_labels{self.labels}_seed{self.seed}"

    @property
    def key(self) -> dict[str, Any]:
        """What identifies its rows in tables; ``variant`` only if the comparison has variants."""
        under = {"variant": self.variant.name} if self.variant.levels else {}
        return under | {"recipe": self.recipe.name, "labels": self.labels, "seed": self.seed}

    @property
    def own(self) -> list[tuple[str, Any]]:
        """Its settings beyond those of all runs: its recipe's, and over them its variant's."""
        return [*(self.recipe.model_extra or {}).items(), *self.variant.settings]


@dataclass(frozen=True)
class Design:
    """A comparison before it is run."""

    dataset: Dataset
    config: ComparisonConfig
    recipes: dict[str, Recipe]  # by name, the baseline first
    splits: dict[int, Split]  # by the number of labelled cases, the same for all recipes and seeds
    test: tuple[Case, ...]  # labelled cases that no run trains or validates on
    tested_on: str  # how they were chosen, in words
    variants: tuple[Variant, ...]  # every recipe is trained under each

    @property
    def cells(self) -> list[Cell]:
        """Every run, small budgets first and the recipes side by side, so that early results can be compared."""
        runs = product(self.splits, self.config.seeds, self.variants, self.recipes.values())
        return [Cell(recipe, labels, seed, variant) for labels, seed, variant, recipe in runs]


def case_names(split: Split) -> dict[str, list[str]]:
    """``training``, ``validation``, ``unlabelled`` -> the names of the cases."""
    return {part: [c.name for c in getattr(split, part)] for part in ("training", "validation", "unlabelled")}


def design_comparison(
    dataset: Dataset, config: ComparisonConfig, *, cases: Names = None, test_cases: Names = None, split_seed: int = 0
) -> Design:
    """Decide which cases train, validate and test, by the rules in docs/compare.md; a `MedsegError` if that is impossible."""
    recipes: dict[str, Recipe] = {}
    for recipe in config.recipes:
        if Path(recipe.name).name != recipe.name or "\\" in recipe.name:
            raise ConfigError(f"recipes: {recipe.name!r} cannot be used in the name of a folder. Remove the slashes.")
        earlier = recipes.setdefault(recipe.name, recipe)
        if (read_recipe(recipe.recipe), recipe.model_extra) != (read_recipe(earlier.recipe), earlier.model_extra):
            both = f"{earlier.recipe} and {recipe.recipe}"
            raise ConfigError(f"--recipes: {both} are different recipes with the same name. Rename a file.")
    if len(config.recipes) < 2:
        raise ConfigError(
            "--recipes: a comparison needs at least two recipes, the baseline first, such as dice_ce,joint."
        )
    names = [recipe.name for recipe in config.recipes[1:]]  # the baseline may be compared with itself
    for option, values in (("recipes", names), ("seeds", config.seeds), ("labels", config.labels)):
        if repeated := [value for number, value in enumerate(values) if value in values[:number]]:
            raise ConfigError(f"--{option}: {repeated[0]} is given twice. Give each value once.")
    labels = [None if budget == "all" else budget for budget in config.labels]
    pool, test, tested_on = _test_cases(dataset, cases, test_cases, labels, split_seed)
    if (most := max((budget for budget in labels if budget is not None), default=0)) > len(pool.labelled):
        labelled = f"{dataset.root} has {counted(len(pool.labelled), 'labelled case')}"
        cure = "Ask for at most that many, or name fewer cases to test on with --test-cases FILE."
        raise DataError(f"--labels {most}: in addition to {counted(len(test), 'test case')}, {labelled}. {cure}")
    splits: dict[int, Split] = {}
    for budget in labels:
        split = split_cases(pool, labels=budget, seed=split_seed, validation_fraction=config.validation)
        splits[len(_names((*split.training, *split.validation)))] = split
    if not test:
        used = [case for split in splits.values() for case in (*split.training, *split.validation)]
        taken, patients = _names(used), {case.patient for case in used} - {None}
        test = tuple(c for c in pool.labelled if c.name not in taken and c.patient not in patients)
        tested = _names(test)
        for n, split in splits.items():
            splits[n] = replace(split, unlabelled=tuple(c for c in split.unlabelled if c.name not in tested))
        tested_on = "the labelled cases that no run uses, not even as unlabelled scans (--test-cases chooses others)"
    if not test:
        cure = "Name some with --test-cases FILE, or choose smaller budgets with --labels."
        raise DataError(f"{dataset.root}: no labelled case is left to test on. {cure}")
    # A recipe that needs unlabelled scans would otherwise fail hours later.
    bare = next((n for n, split in splits.items() if not split.unlabelled), None)
    needing = [name for name, recipe in recipes.items() if read_recipe(recipe.recipe).get("train::sampler::required")]
    if bare is not None and needing:
        raise ConfigError(
            f"The recipe {needing[0]} also needs scans without labels, but with {counted(bare, 'labelled scan')} "
            "none are left for it. Choose smaller budgets with --labels, or name fewer scans to test on with --test-cases "
            "FILE."
        )
    splits = dict(sorted(splits.items()))
    return Design(dataset, config, recipes, splits, test, tested_on, make_variants(config.variants))


def _names(cases: Iterable[Case]) -> set[str]:
    return {case.name for case in cases}


def _test_cases(
    dataset: Dataset, cases: Names, test_cases: Names, labels: Sequence[int | None], split_seed: int
) -> tuple[Dataset, tuple[Case, ...], str]:
    """The pool, the test cases (none: what the budgets leave), and how they were chosen."""
    pool = dataset if cases is None else dataset.select(cases)
    in_pool, tested_on = _names(pool.cases), "the labelled cases that --cases leaves out"
    test = tuple(case for case in dataset.labelled if case.name not in in_pool)
    if test_cases is not None:
        test, tested_on = dataset.select(test_cases).cases, "the cases that --test-cases names"
        for case in test:
            if case.label is None:
                raise DataError(f"--test-cases: {case.name!r} has no label map to test against. Leave it out.")
            if case.name in in_pool and cases is not None:
                raise DataError(f"{case.name!r} is in --cases and in --test-cases. Remove it from one of them.")
    elif not test and all(budget is not None and budget < len(pool.labelled) for budget in labels):
        return pool, (), ""
    elif not test:
        split = split_cases(pool, seed=split_seed, validation_fraction=PUT_ASIDE)
        if split.warnings:
            needed = "comparing recipes needs at least two labelled patients, one of them for testing"
            raise DataError(f"{dataset.root}: {needed}; found {counted(len(dataset.labelled), 'labelled case')}.")
        test = split.validation
        tested_on = f"{counted(len(test), 'case')} chosen at random before training (choose others with --test-cases)"
    patients, tested = {case.patient for case in test} - {None}, _names(test)
    rest = [case for case in pool.cases if case.name not in tested]
    if both := [case for case in rest if case.patient in patients]:
        who = f"case {both[0].name!r} would be trained on, and another scan of patient {both[0].patient!r} tested on"
        raise DataError(f"{who}. Keep a patient's scans on one side: name the cases with --cases and --test-cases.")
    if not rest:
        raise DataError(f"{pool.root}: every case is a test case, so none is left to train on.")
    return pool.select(case.name for case in rest), test, tested_on
