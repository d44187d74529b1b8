"""The words that a run is told: recipes, and the options that their fields are."""

from dpfast.config.generator import STOCHASTIC, Generator, SolverName
from dpfast.config.guidance import Guidance
from dpfast.config.imported import imported, imported_module, is_import_path, made
from dpfast.config.learner import Learner
from dpfast.config.objects import OBJECTS_FILE, check_objects, kind_of, objects_of
from dpfast.config.option import Option
from dpfast.config.pool import Pool
from dpfast.config.practice import AT_ONCE, READ, SOURCES, Practice, SourceName
from dpfast.config.recipe import (
    ASSETS,
    RECIPE_FILE,
    RECIPES,
    SECTIONS,
    USER_FOLDERS,
    Recipe,
    flat,
    pipeline_folder,
    read_recipe,
)
from dpfast.config.section import fields, full_name, short_name

__all__ = [
    "ASSETS",
    "AT_ONCE",
    "OBJECTS_FILE",
    "READ",
    "RECIPES",
    "RECIPE_FILE",
    "SECTIONS",
    "SOURCES",
    "STOCHASTIC",
    "USER_FOLDERS",
    "Generator",
    "Guidance",
    "Learner",
    "Option",
    "Pool",
    "Practice",
    "Recipe",
    "SolverName",
    "SourceName",
    "check_objects",
    "fields",
    "flat",
    "full_name",
    "imported",
    "imported_module",
    "is_import_path",
    "kind_of",
    "made",
    "objects_of",
    "pipeline_folder",
    "read_recipe",
    "short_name",
]
