"""Recipes: frozen keyword-only dataclasses, read from TOML, checked before any work starts.

A recipe is one ``Recipe`` of five sections. A field's full name has its section
(``guidance.omega``, on a command line ``--guidance.omega 0.03``); its last word alone is enough
where one section has it (``--omega 0.03``). What a field means and which values it takes
stands at the field (``dpfast.config.option``); a ``check`` says which values contradict each other.
Both raise ``RecipeError`` with the field, its value and what would be right.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpfast.config.generator import Generator
from dpfast.config.guidance import Guidance
from dpfast.config.imported import is_import_path
from dpfast.config.kinds import LEVELS, ImportPath
from dpfast.config.learner import Learner
from dpfast.config.option import option, options
from dpfast.config.pool import Pool
from dpfast.config.practice import READ, Practice, in_running_order
from dpfast.config.section import Section, full_name, printable, require, short_name
from dpfast.errors import InputError, RecipeError
from dpfast.files import is_folder, there
from dpfast.textfiles import read_json, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE_FILE = "recipe.json"  # of a run's folder
ASSETS = Path(__file__).parents[1] / "assets"
# what may have another value in each round, in the field of [practice] with "_rounds" behind it
BY_ROUND = ("omega", "anchor", "cfg_scale", "every", "start", "until", "through", "criterion")
INDEX = "model_index.json"  # of the folder of a diffusers pipeline
# section -> the names that its fields have in the folders of older runs, which are reported,
# exported and sampled from, if not resumed
FORMER = {
    "generator": {"generation_batch": "batch_size", "sampling_batch": "micro_batch"},
    "guidance": {"guide_every": "every", "guide_from": "start", "guide_until": "until"},
    "learner": {"compile_learner": "compile"},
    "practice": {"cfg_rounds": "cfg_scale_rounds"},
}
# field -> the names by which recipes call a folder that only their user has
USER_FOLDERS = {
    "pipeline": (
        "stable-diffusion-1.5",
        "stable-diffusion-2.1",
        "stable-diffusion-xl",
        "dit-xl-2",
        "pixart-sigma",
        "sana-1.6b",
        "flux-dev",
        "flux-schnell",
    ),
    "validation": ("imagenet-val",),
}
SECTIONS: dict[str, Any] = {
    "generator": Generator,
    "guidance": Guidance,
    "learner": Learner,
    "pool": Pool,
    "practice": Practice,
}


def _deeper(value: object, levels: int) -> bool:
    """Returns True if tables and lists lie within each other on more than so many levels."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_deeper(each, levels - 1) for each in inner)


@dataclass(frozen=True, kw_only=True)
class Recipe(Section, name=""):
    """Everything a run depends on, in five sections of fields.

    Two runs of one recipe on one machine give the same ``metrics.jsonl``. Each field says what it
    means and takes; ``docs/reference/recipe.md`` lists them.

    Attributes:
        name: Name of the recipe and of its runs' folders.
        seed: Seed of all weights, noise, labels and batches.
        device: "auto", "cpu", "cuda" or "cuda:N".
        validation: Real images that drive the loop: a folder, or the name of an embedded set.
        held_out: Folder of real images for the final test; "": every second one of the validation.
        evaluation: Further sets of the final table.
        callbacks: Import paths of callbacks.
        trackers: Names or import paths of trackers of experiments.
        generator: Section [generator], the making of a sample.
        guidance: Section [guidance], the learner's pull on a sample.
        learner: Section [learner], the classifier and its training.
        pool: Section [pool], the memory of samples.
        practice: Section [practice], the rounds of Algorithm 1 and the sources beside it.

    Raises:
        RecipeError: For a wrong type, a value out of range, and values that contradict each other.

    Examples:
        >>> import dpfast
        >>> recipe = dpfast.Recipe.load("fashion", omega=0.03, learner={"batch_size": 32})
        >>> recipe.guidance.omega, recipe.learner.batch_size
        (0.03, 32)
    """

    name: str = option("", unset="the file's", help="name of the recipe and of its runs' folders")
    seed: int = option(
        0,
        low=0,
        high=2**31 - 1,
        common=True,
        help="seed of all weights, noise, labels and batches",
    )
    device: str = option(
        "auto",
        unit="device",
        common=True,
        help="where models and batches are: cpu, cuda, cuda:1; auto: a GPU where there is one",
    )
    validation: str = option(
        "fashion",
        unit="folder",
        common=True,
        help="real images that drive the loop: a folder with a sub-folder a class, or the name of "
        "an embedded set",
    )
    held_out: str = option(
        "",
        unit="folder",
        unset="every second image of the validation",
        common=True,
        help="real images for the final test, a folder of the same form",
    )
    evaluation: tuple[str, ...] = option(
        (),
        unit="set",
        unset="none",
        help="further sets for the final table: shifts, the name of one shift, or [NAME=]FOLDER",
    )
    callbacks: tuple[ImportPath, ...] = option(
        (),
        unset="none",
        help="who hears of every event of a run: classes or functions of yours that give a "
        "dpfast.Callback, called without arguments on each rank",
    )
    trackers: tuple[TrackerName | ImportPath, ...] = option(
        ("tensorboard",),
        help="what tracks the numbers of a run beside the files in its folder; one of yours: a "
        "kind of accelerate.tracking.GeneralTracker, called as accelerate does",
    )
    generator: Generator = field(default_factory=Generator)
    guidance: Guidance = field(default_factory=Guidance)
    learner: Learner = field(default_factory=Learner)
    pool: Pool = field(default_factory=Pool)
    practice: Practice = field(default_factory=Practice)

    @property
    def learner_seed(self) -> int:
        """The seed of the learner's weights and batches."""
        return self.seed if self.learner.seed is None else self.learner.seed

    def check(self) -> None:
        """Checks values that are right alone and wrong together.

        Raises:
            RecipeError: For the first that contradicts another.
        """
        practice = self.practice
        once = len(set(self.trackers)) == len(self.trackers)
        require(once, "trackers", ",".join(self.trackers), "each once")
        first, last = practice.interval(self.learner.batch_size), practice.iterations
        wanted = f"the first evaluation, now after {first} steps, within iterations ({last})"
        require(first <= last, "evaluate_every", practice.evaluate_every, wanted)
        late = [step for step in practice.add_at if self.learner.cooling_at(step, last)]
        wanted = (
            f"steps before the cool-down, the last {self.learner.cooldown:g} of iterations ({last})"
        )
        require(not late, "add_at", ",".join(map(str, practice.add_at)), wanted)
        existing = [name for name in practice.sources if name in (*READ, "mix")]
        wanted = f"'pixels' or 'jpeg': the source {''.join(existing[:1])!r} has images, no latents"
        require(not existing or self.pool.codec != "latents", "codec", "latents", wanted)
        branches = practice.keep_rounds and self.pool.save_samples == "none"
        wanted = "false with save_samples = 'none': a branch needs the samples"
        require(not branches, "keep_rounds", True, wanted)
        alone = {self.generator.cfg_scale, *practice.cfg_scale_rounds} == {1}
        wanted = "'' with cfg_scale = 1, which has no other prediction to lead away from"
        negative = self.generator.negative_prompt
        require(not (negative and alone), "negative_prompt", negative, wanted)
        for number in range(1, self.scheduled_rounds + 1):
            try:
                self.of_round(number)
            except RecipeError as error:
                raise RecipeError(f"round {number}: {error}") from None
        if not self.scheduled_rounds:
            self._check_guidance()
        compared = {each == "disagreement" for each in practice.criterion_rounds}
        compared |= {self.guidance.criterion == "disagreement"}
        wanted = "'disagreement', which compares two learners, of all rounds and as criterion"
        require(len(compared) == 1, "criterion_rounds", practice.criterion_rounds, wanted)

    def _check_guidance(self) -> None:
        """Raises ``RecipeError`` for a guided round whose values do not go together."""
        guidance, early = self.guidance, self.practice.early_candidates
        wanted = (
            "1 unless omega, and with omega_rounds each of it, is above 0: guidance scores the "
            "candidates, and the highest stay"
        )
        require(early == 1 or guidance.omega > 0, "early_candidates", early, wanted)
        wanted = (
            "0 where guided samples have cfg_scale = 1: it needs the two predictions of "
            "classifier-free guidance"
        )
        anchored = bool(guidance.anchor and guidance.omega) and self.practice.may_guide
        without = anchored and self.generator.cfg_scale == 1
        require(not without, "anchor", guidance.anchor, wanted)
        apart = guidance.criterion != "disagreement" or self.learner.ema_decay > 0
        wanted = "another with ema_decay = 0: both weights are the same"
        require(apart, "criterion", guidance.criterion, wanted)

    @property
    def scheduled_rounds(self) -> int:
        """The rounds for which ``omega_rounds`` and its like have a value of their own."""
        return max(len(getattr(self.practice, f"{name}_rounds")) for name in BY_ROUND)

    def of_round(self, number: int) -> Recipe:
        """Returns the recipe whose [guidance] and cfg_scale are those of one round.

        Where that scale is 1 it has no negative prompt, which is then of no use.

        Args:
            number: Number of the round; 0: the initial samples, for which no round's values hold.
        """
        schedules = {
            f"{name}_rounds": getattr(self.practice, f"{name}_rounds") for name in BY_ROUND
        }
        given = {
            name.removesuffix("_rounds"): values[min(number, len(values)) - 1]
            for name, values in schedules.items()
            if number and values
        }
        if not any(schedules.values()):
            return self
        scale = given.pop("cfg_scale", self.generator.cfg_scale)
        cleared: dict[str, Any] = dict.fromkeys(schedules, ())
        negative = self.generator.negative_prompt if scale != 1 else ""
        generator = {"cfg_scale": scale, "negative_prompt": negative}
        return dataclasses.replace(
            self,
            generator=dataclasses.replace(self.generator, **generator),
            guidance=dataclasses.replace(self.guidance, **given),
            practice=dataclasses.replace(self.practice, **cleared),
        )

    @property
    def tracker_packages(self) -> tuple[str, ...]:
        """The packages of ``dpfast.extras`` that the trackers import."""
        named = (name for name in self.trackers if not is_import_path(name))
        alone = set(self.trackers) <= {"tensorboard"}
        return (*named, *([] if alone else ["accelerate"]))

    def need_folders(self, *names: str) -> None:
        """Checks that the user has named the folders that only the user has.

        Args:
            *names: Short names of fields, such as "pipeline" and "validation".

        Raises:
            RecipeError: With the options of all that are missing.
        """
        missing = self.lacking(*names)
        if missing:
            options = " ".join(f"--{name} FOLDER" for name in missing)
            raise RecipeError(f"recipe = {self.name!r}: needs folders of yours, say {options}")

    def lacking(self, *names: str) -> list[str]:
        """Lists those of some fields whose folder its user has yet to name."""
        given = flat(self.to_dict())
        return [
            name
            for name in names
            if given[name] in USER_FOLDERS[name] and not is_folder(Path(given[name]))
        ]

    def check_ranks(self, count: int) -> None:
        """Checks that a run under torchrun with so many ranks can begin.

        Args:
            count: Number of ranks.

        Raises:
            RecipeError: For a batch size or an overlap that the ranks cannot share.
        """
        practice, initial = self.practice, self.practice.initial_samples
        fewer = practice.overlap < max(count, 1)
        wanted = f"0, or under torchrun fewer than its {count} ranks"
        require(fewer, "overlap", practice.overlap, wanted)
        if count <= 1:
            return
        ranks = count - practice.overlap  # the others only generate
        size = self.learner.batch_size
        wanted = f"a multiple of {2 * ranks}, twice the {ranks} ranks"
        require(size % (2 * ranks) == 0, "learner.batch_size", size, wanted)
        batch = self.generator.batch_size
        wanted = (
            f"at most {initial // ranks}: initial_samples = {initial} "
            f"are fewer batches than the {ranks} ranks"
        )
        require(-(-initial // batch) >= ranks, "generator.batch_size", batch, wanted)
        wanted = "0 with overlap: ranks that only generate hold no samples to begin from"
        require(not (practice.restart and practice.overlap), "restart", practice.restart, wanted)

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Recipe:
        """Reads a recipe by name or path and replaces some of its fields.

        Another ``model`` than the recipe's begins without the recipe's ``options``, and so does a
        ``pretrained`` one of transformers.

        Args:
            source: Name of an embedded recipe, or path of a TOML file.
            **overrides: Values of fields by their short names, ``omega=0.03``, or by section,
                ``learner={"batch_size": 32}``.

        Raises:
            RecipeError: For an unknown recipe, section or field, a wrong type, a value out of
                range, and another patience than the recipe's beside ``add_at``, which leaves it no
                say.
        """
        text = str(source)
        named = not text.endswith(".toml") and os.sep not in text
        path = RECIPES / f"{text}.toml" if named else Path(source)
        try:
            table = tomllib.loads(read_text(path))
        except FileNotFoundError:
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
            if text.endswith(".toml"):
                raise RecipeError(
                    f"recipe = {str(source)!r}: no such file; "
                    "dpfast init FILE writes one to start from"
                ) from None
            raise RecipeError(
                f"recipe = {str(source)!r}: no such recipe; "
                f"known are {known}, or a path that ends in .toml"
            ) from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"recipe = {str(source)!r}: not valid TOML: {error}") from None
        table.setdefault("name", path.stem)
        learner = table.get("learner")
        if isinstance(learner, dict) and _another(learner, overrides):
            learner.pop("options", None)  # those of another architecture
        practice = table.get("practice")
        own = dict(practice) if isinstance(practice, dict) else {}
        for key, value in overrides.items():
            if key in SECTIONS and isinstance(value, dict):
                table.setdefault(key, {}).update(value)
                continue
            section, _, name = full_name(key).rpartition(".")
            (table.setdefault(section, {}) if section else table)[name] = value
        recipe = cls.from_dict(table)
        for name in ("patience", "patience_growth") if recipe.practice.add_at else ():
            said, kept = getattr(recipe.practice, name), own.get(name, getattr(Practice, name))
            wanted = f"{kept!r}, the recipe's, as no patience counts with add_at"
            require(said == kept, name, said, wanted)
        return recipe

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Recipe:
        """Builds a recipe from nested dictionaries, the inverse of ``to_dict``.

        Raises:
            RecipeError: As ``load`` does, and for tables within tables of more than LEVELS.
        """
        for key, value in table.items():
            if _deeper(value, LEVELS):
                raise RecipeError(
                    f"{printable(key)}: tables or lists within each other, over {LEVELS}"
                )
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in SECTIONS:
                require(isinstance(value, dict), key, value, "a table of fields")
                for name, inner in value.items():
                    _check_known(SECTIONS[key], name, inner)
                values[key] = SECTIONS[key](**value)
            else:
                _check_known(cls, key, value)
                values[key] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested dictionaries."""
        return dataclasses.asdict(self)


def _another(learner: dict[str, Any], overrides: dict[str, Any]) -> bool:
    """Returns True if the overrides of a recipe with this learner name another model, or the folder
    of a pretrained one of transformers, which says the options.
    """
    own = learner.get("model", Learner.model)
    model = _said(overrides, "model")
    ready = str(model or own).startswith("transformers:") and _said(overrides, "pretrained")
    return model not in (None, own) or bool(ready)


def _said(overrides: dict[str, Any], name: str) -> Any:
    """Returns a field of the learner in the overrides of a recipe, None where they leave it."""
    learner = overrides.get("learner")
    inner = learner.get(name) if isinstance(learner, dict) else None
    return overrides.get(name, overrides.get(f"learner.{name}", inner))


def pipeline_folder(source: str | Path) -> Path:
    """Returns the folder of a pipeline: ``source`` where it is a folder of one, else the embedded
    one of that name, else ``source``. A text with a separator ("./fashion") is a path and no name.
    """
    path, embedded = Path(source), ASSETS / str(source)
    if os.sep in str(source) or there(path / INDEX) or not there(embedded / INDEX):
        return path
    return embedded


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns a recipe as nested dictionaries from a file in a run's folder (``recipe.json``), by
    the names that fields have today.

    Raises ``RecipeError`` with the path where there is none or where it is no such thing, and
    ``InputError`` as ``read_json`` does.
    """
    try:
        table: Any = read_json(path)
    except FileNotFoundError:
        raise RecipeError(f"recipe = {str(path)!r}: no such file") from None
    sections = [table.get(key, {}) for key in SECTIONS] if isinstance(table, dict) else [None]
    tables = all(isinstance(each, dict) for each in sections)
    require(tables, "recipe", str(path), "a table of fields and sections")
    for section, names in FORMER.items():
        values = table.get(section, {})
        for former, name in names.items():
            if former in values:
                values[name] = values.pop(former)
    generator = table.get("generator", {})
    if {"cfg_from", "cfg_until"} <= generator.keys():
        generator["cfg_interval"] = [generator.pop("cfg_from"), generator.pop("cfg_until")]
    practice = table.get("practice", {})
    sources = practice.get("sources")
    if isinstance(sources, list) and all(isinstance(each, str) for each in sources):
        practice["sources"] = list(in_running_order(sources))
    found: dict[str, Any] = table
    return found


def flat(table: dict[str, Any]) -> dict[str, Any]:
    """Maps each field's short name to its value in a recipe of nested dictionaries
    (``Recipe.to_dict``).
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in SECTIONS:
            found |= {short_name(f"{key}.{name}"): inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _check_known(owner: Any, name: str, value: object) -> None:
    known = options(owner)
    require(
        name in known,
        name,
        value,
        f"a field of {owner.__name__.lower()}; known are {', '.join(sorted(known))}",
    )
