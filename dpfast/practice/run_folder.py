"""The folder of a run: the recipe as run, metrics as JSON lines and TensorBoard events, pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dpfast.config import SECTIONS, Recipe, RecipeError
from dpfast.generate.pipelines import Pipeline
from dpfast.learn.models import build_learner, load_judge


class RunFolder:
    """``runs/<name>/``.

    recipe.json     the recipe with every default filled in
    metrics.jsonl   one line per evaluation, addition and result; a function of the recipe alone, so without times
    timings.jsonl   seconds and samples/s of every generation and training phase
    events.*        the same numbers for TensorBoard
    learner_*       the EMA weights of every source's classifier, safetensors
    checkpoint_*    the state of every source's loop at its last evaluation
    pool_*/         every source's samples, webdataset shards with a manifest (``dpfast.pool.shards``)
    *.png           plots and contact sheets
    """

    def __init__(self, path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> None:
        check_vacant(path, recipe, overwrite=overwrite, resume=resume)
        if path.exists() and not resume:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        (path / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
        order = [name for name in ("dp", "static") if self.checkpoint(name).is_file()]
        self._resumed = order[-1] if order else None
        mode = "a" if self._resumed else "w"
        self._metrics = (path / "metrics.jsonl").open(mode)
        self._timings = (path / "timings.jsonl").open(mode)
        self._events = SummaryWriter(str(path))

    def checkpoint(self, source: str) -> Path:
        """Where the checkpoint of a source's loop is kept."""
        return self.path / f"checkpoint_{source}.safetensors"

    def pool(self, source: str) -> Path:
        """Where a source's samples are saved."""
        return self.path / f"pool_{source}"

    def resumed(self) -> str | None:
        """The source that an interrupted run was in when this folder was opened; None for a new run."""
        return self._resumed

    def written(self) -> list[int]:
        """The lengths of ``metrics.jsonl`` and ``timings.jsonl``, bytes."""
        return [self._metrics.tell(), self._timings.tell()]

    def rewind(self, written: list[int]) -> None:
        """Drops the lines that came after ``written``."""
        for file, size in zip((self._metrics, self._timings), written, strict=True):
            file.truncate(size)
            file.seek(size)

    def log(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``metrics.jsonl`` and its numbers as TensorBoard scalars "source/event/name"."""
        self._write(self._metrics, event, source, step, values)

    def time(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``timings.jsonl``."""
        self._write(self._timings, event, source, step, values)

    def _write(self, file: Any, event: str, source: str, step: int, values: dict[str, Any]) -> None:
        file.write(json.dumps({"event": event, "source": source, "step": step, **values}) + "\n")
        file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(f"{source}/{event}/{name}", value, step)

    def save_learner(self, source: str, model: nn.Module) -> None:
        """Writes ``learner_<source>.safetensors``, which ``load_learner`` reads."""
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, self.path / f"learner_{source}.safetensors"
        )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._metrics.close()
        self._timings.close()
        self._events.close()


def check_vacant(path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raises ``RecipeError`` when ``path`` may not become, or continue, the folder of a run of ``recipe``.

    Only a run is ever replaced, and a run continues with its own recipe only.
    """
    if resume:
        if not (path / "recipe.json").is_file():
            raise RecipeError(f"resume: {str(path)!r} holds no run")
        before, now = (
            _flat(json.loads((path / "recipe.json").read_text())),
            _flat(json.loads(json.dumps(recipe.to_dict()))),
        )
        changed = [
            f"{k} = {now.get(k)!r} was {before.get(k)!r}" for k in sorted(before | now) if before.get(k) != now.get(k)
        ]
        if changed:
            raise RecipeError(f"resume: the run in {str(path)!r} has another recipe: {'; '.join(changed)}")
        return
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "recipe.json").is_file():
        raise RecipeError(f"out = {str(path)!r}: exists and holds no run; choose another folder")
    if not overwrite:
        raise RecipeError(f"out = {str(path)!r}: holds another run; --resume continues it, --overwrite replaces it")


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields without their sections."""
    leaves = {k: v for k, v in recipe.items() if k not in SECTIONS}
    for section in SECTIONS:
        leaves |= recipe[section]
    return leaves


def load_learner(folder: str | Path | None, pipeline: Pipeline, *, source: str = "dp") -> nn.Module:
    """The finished classifier of a run, in eval mode; without a folder the embedded judge network.

    Raises ``RecipeError`` when the folder holds no learner, or one whose classes are not the pipeline's.
    """
    if folder is None:
        return load_judge()
    weights, recipe_file = Path(folder) / f"learner_{source}.safetensors", Path(folder) / "recipe.json"
    if not weights.is_file() or not recipe_file.is_file():
        raise RecipeError(f"learner = {str(folder)!r}: not the folder of a finished run, it has no {weights.name}")
    recipe = Recipe.from_dict(json.loads(recipe_file.read_text()))
    model = build_learner(
        recipe.learner.model,
        classes=pipeline.denoiser.classes,
        channels=pipeline.image_channels,
        **recipe.learner.options,
    )
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise RecipeError(
            f"learner = {str(folder)!r}: does not fit the pipeline: {str(error).splitlines()[1].strip()}"
        ) from error
    return model.eval().requires_grad_(False)
