"""The folder of a run: the recipe as run, metrics as JSON lines and TensorBoard events, pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dpfast.config import Recipe, RecipeError
from dpfast.generate.denoiser import Pipeline
from dpfast.learn.models import build_learner, load_judge


class RunFolder:
    """``runs/<name>/``.

    recipe.json     the recipe with every default filled in
    metrics.jsonl   one line per evaluation, addition and result; a function of the recipe alone, so without times
    timings.jsonl   seconds and samples/s of every generation and training phase
    events.*        the same numbers for TensorBoard
    learner_*       the EMA weights of every source's classifier, safetensors
    *.png           plots and contact sheets
    """

    def __init__(self, path: Path, recipe: Recipe, *, overwrite: bool = False) -> None:
        check_vacant(path, overwrite=overwrite)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        self.path = path
        (path / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
        self._metrics = (path / "metrics.jsonl").open("w")
        self._timings = (path / "timings.jsonl").open("w")
        self._events = SummaryWriter(str(path))

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


def check_vacant(path: Path, *, overwrite: bool = False) -> None:
    """Raises ``RecipeError`` when ``path`` may not become the folder of a new run. Only a run is ever replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "recipe.json").is_file():
        raise RecipeError(f"out = {str(path)!r}: exists and holds no run; choose another folder")
    if not overwrite:
        raise RecipeError(
            f"out = {str(path)!r}: holds another run; add --overwrite to replace it, or choose another --out"
        )


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
