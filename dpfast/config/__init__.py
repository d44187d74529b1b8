"""What a run is told: recipes, and the options that their fields are."""

from dpfast.config.option import Option
from dpfast.config.recipe import (
    ASSETS,
    RECIPE_FILE,
    RECIPES,
    SECTIONS,
    SOURCES,
    STOCHASTIC,
    Generator,
    Guidance,
    Learner,
    Pool,
    Practice,
    Recipe,
    SolverName,
    fields,
    flat,
    full_name,
    short_name,
)

__all__ = [
    "ASSETS",
    "RECIPES",
    "RECIPE_FILE",
    "SECTIONS",
    "SOURCES",
    "STOCHASTIC",
    "Generator",
    "Guidance",
    "Learner",
    "Option",
    "Pool",
    "Practice",
    "Recipe",
    "SolverName",
    "fields",
    "flat",
    "full_name",
    "short_name",
]
