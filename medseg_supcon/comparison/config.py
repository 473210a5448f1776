"""A comparison as one YAML file: recipes, a grid of variants, seeds, labels, length, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from medseg_supcon.bundle import read_yaml_file, shared_folder
from medseg_supcon.errors import ConfigError
from medseg_supcon.text import suggestion

EXPECTED = {
    "recipes": "a list of names or .yaml files, or a mapping NAME: {recipe: NAME or file, KEY: VALUE, ...}",
    "variants": "a mapping AXIS: {LEVEL: {KEY: VALUE, ...}, ...}",
    "seeds": "a list of whole numbers from 0",
    "labels": "a list of whole numbers from 1, or 'all'",
    "validation": "a share from 0 to 0.9",
    "epochs": "a whole number from 1",
    "settings": "a mapping KEY: VALUE",
    "robustness": "true or false",
    "training_score": "true or false",
}
AsList = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
# a level may be called 0.1
NamedByText = BeforeValidator(lambda value: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value)
Level = Annotated[dict[str, Any], BeforeValidator(lambda settings: {} if settings is None else settings)]
Levels = Annotated[dict[str, Level], NamedByText]


class Recipe(BaseModel):
    """A recipe's name or file, and settings of it alone (``model_extra``)."""

    model_config = ConfigDict(extra="allow", strict=True)
    recipe: str


class ComparisonConfig(BaseModel):
    """What a comparison's file says; None: not said, the command line's default applies."""

    model_config = ConfigDict(strict=True, frozen=True)
    recipes: Annotated[dict[str, Recipe], NamedByText] = {}
    variants: Annotated[dict[str, Levels], NamedByText] = {}
    seeds: Annotated[list[NonNegativeInt], AsList, Field(min_length=1)] | None = None
    labels: Annotated[list[PositiveInt | Literal["all"]], AsList, Field(min_length=1)] | None = None
    validation: Annotated[float, Field(ge=0, le=0.9)] | None = None
    epochs: PositiveInt | None = None
    settings: dict[str, Any] = {}
    robustness: bool | None = None
    training_score: bool = False

    @property
    def named_recipes(self) -> list[tuple[str, str]]:
        """(name, name or file), the baseline first."""
        return [(name, recipe.recipe) for name, recipe in self.recipes.items()]

    @field_validator("recipes", mode="before")
    @classmethod
    def _by_name(cls, recipes: Any) -> Any:
        if not (isinstance(recipes, list) and all(isinstance(recipe, str) for recipe in recipes)):
            return recipes
        by_name = {Path(recipe).stem: {"recipe": recipe} for recipe in recipes}
        if len(by_name) < len(recipes):
            raise ValueError("two recipes of one name")
        return by_name


def read_comparison(name: str | Path) -> ComparisonConfig:
    """A comparison's file, or one that comes with the package (``article``, of ``configs/comparisons``).

    Recipe files in it are relative to its own folder.

    Raises:
        ConfigError: the file does not exist or is not YAML, has an unknown key, or a value of the wrong kind.
    """
    path, shipped = Path(name), shared_folder("configs") / "comparisons"
    if path.suffix not in (".yaml", ".yml"):
        path = shipped / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in shipped.glob("*.yaml"))
        raise ConfigError(f"--config {name}: the file does not exist. Known by name: {', '.join(known)}.")
    given = read_yaml_file(path, str(path)) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must be a mapping of {', '.join(EXPECTED)}; found {given!r:.80}.")
    for key in given:
        if key not in EXPECTED:
            raise ConfigError(f"{path} has an unknown key {key!r}. {suggestion(key, EXPECTED)}")
    try:
        config = ComparisonConfig.model_validate(given)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise ConfigError(f"{path}: {key} must be {EXPECTED[key]}; found {given[key]!r:.200}.") from None
    for recipe in config.recipes.values():
        if recipe.recipe.endswith((".yaml", ".yml")):
            recipe.recipe = str(path.parent / recipe.recipe)
    return config
