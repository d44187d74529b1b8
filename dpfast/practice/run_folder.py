"""The folder of a run: the recipe as run, metrics as JSON lines and TensorBoard events, pictures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from dpfast.config import SECTIONS, Recipe, RecipeError
from dpfast.evaluate.measures import Evaluation
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.parts import part_name
from dpfast.pool.saver import unsaved
from dpfast.pool.shards import durable
from dpfast.practice.callbacks import Addition, Callback
from dpfast.practice.checkpoint import save_weights
from dpfast.practice.pace import Pace

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop
    from dpfast.practice.result import Result

RECIPE = "recipe.json"


class Places:
    """Where the parts of a run's folder are; every rank has its own for samples and progress."""

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks

    def checkpoints(self, source: str) -> Path:
        """Where the checkpoints of a source's loop are kept."""
        return self.path / f"checkpoints_{source}"

    def pool(self, source: str) -> Path:
        """Where a source's samples are saved: one saved pool, or a folder of one for each rank."""
        return self.path / f"pool_{source}"

    def _progress(self, source: str) -> str:
        return f"progress_{source}{'' if self.ranks.alone else f'-{part_name(self.ranks)}'}.json"

    def progress(self, source: str) -> dict[str, Any] | None:
        """What ``save_progress`` kept; None where there is nothing, or nothing that can be read."""
        try:
            return json.loads((self.path / self._progress(source)).read_text())
        except (OSError, ValueError):
            return None

    def save_progress(self, source: str, progress: dict[str, Any]) -> None:
        name = self._progress(source)
        with unsaved(f"{name} was not written"), durable(self.path, name) as file:
            file.write(json.dumps(progress).encode())


class RunFolder(Places, Callback):
    """``runs/<name>/``. As a callback it writes down what a loop tells. Of several ranks the first one has it.

    recipe.json     the recipe with every default filled in
    metrics.jsonl   one line per evaluation, addition and result; a function of the recipe alone, so without times
    timings.jsonl   what was done how fast: a line per round, per interval between evaluations and per training
    events.*        the numbers of both for TensorBoard
    logs/           the log of every rank (``dpfast.logs``)
    learner_*       the evaluated weights of every source's classifier, safetensors
    checkpoints_*/  the states of every source's loop (``dpfast.practice.checkpoint``)
    pool_*/         every source's samples, webdataset shards with a manifest (``dpfast.pool.shards``), or a sub-folder
                    of them for each rank
    progress_*      what is saved of a round that is being made
    branch.json     where a branch began: run, round and iteration
    .launch         which call of torchrun made it
    index.html      the report of a finished run, with its plots and contact sheets as *.png
    """

    def __init__(
        self, path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(path, ranks)
        check_vacant(path, recipe, overwrite=overwrite, resume=resume)
        if path.exists() and not resume:
            _remove(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"out = {str(path)!r}: cannot be made: {error.strerror}") from error
        if not resume:
            with durable(path, RECIPE) as file:
                file.write(json.dumps(recipe.to_dict(), indent=2).encode() + b"\n")
        self._metrics = (path / "metrics.jsonl").open("a")
        self._timings = (path / "timings.jsonl").open("a")
        self._events = SummaryWriter(str(path))

    def written(self) -> list[int]:
        """The lengths of ``metrics.jsonl`` and ``timings.jsonl``, bytes."""
        return [self._metrics.tell(), self._timings.tell()]

    def sync(self) -> None:
        """Makes the lines last that a checkpoint is to speak of; from any thread."""
        for file in (self._metrics, self._timings):
            os.fsync(file.fileno())

    def rewind(self, written: list[int]) -> None:
        """Drops the lines that came after ``written``."""
        for file, size in zip((self._metrics, self._timings), written, strict=True):
            file.truncate(size)
            file.seek(size)

    def on_start(self, loop: Loop) -> None:
        self._pace = Pace(loop)

    def on_round(self, loop: Loop, addition: Addition) -> None:
        cost, step = addition.cost, loop.trainer.step_count
        rate = addition.added / max(cost.seconds, 1e-9)
        self.time("generation", loop.name, step, round=addition.number, made=cost.samples, samples=addition.added,
                  seconds=cost.seconds, samples_per_second=rate, forwards=cost.forwards, flops=cost.flops,
                  **self._pace.generation(cost))  # fmt: skip
        if addition.number:
            self.log(
                "addition",
                loop.name,
                step,
                round=addition.number,
                samples=addition.total,
                entropy=addition.entropy,
                unguided_entropy=addition.unguided_entropy,
                pruning_ratio=addition.pruning_ratio,
            )

    def on_evaluation(self, loop: Loop, evaluation: Evaluation, loss: float) -> None:
        self.time("interval", loop.name, loop.trainer.step_count, **self._pace.interval())
        self.log(
            "evaluation",
            loop.name,
            loop.trainer.step_count,
            accuracy=evaluation.top1,
            loss=loss,
            validation_loss=evaluation.loss,
            entropy=evaluation.entropy,
            samples=len(loop.pool),
        )

    def on_result(self, loop: Loop, result: Result) -> None:
        step, seconds = loop.trainer.step_count, result.training_seconds
        self.time("training", loop.name, step, seconds=seconds, evaluation_seconds=result.evaluation_seconds,
                  steps_per_second=result.iterations / max(seconds, 1e-9), loader_wait=result.loader_wait)  # fmt: skip
        self.log(
            "result",
            loop.name,
            step,
            samples=len(loop.pool),
            additions=result.additions,
            validation_accuracy=result.validation.top1,
            test_accuracy=result.test.top1,
            test_per_class=[round(float(v), 6) for v in result.test.per_class],
        )
        for row in result.sets:
            self.log("set", loop.name, step, **row.to_dict())
        name = f"learner_{loop.name}.safetensors"
        with unsaved(f"{name} was not written"):
            save_weights(result.learner.state_dict(), self.path / name)

    def log(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``metrics.jsonl`` and its numbers as TensorBoard scalars "source/event/name"."""
        self._write(self._metrics, event, source, step, values)

    def time(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``timings.jsonl``."""
        self._write(self._timings, event, source, step, values)

    def _write(self, file: Any, event: str, source: str, step: int, values: dict[str, Any]) -> None:
        with unsaved(f"{Path(file.name).name} lags behind"):  # the line stays in its buffer until there is room
            file.write(json.dumps({"event": event, "source": source, "step": step, **values}) + "\n")
            file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(f"{source}/{event}/{name}", value, step)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for file in (self._metrics, self._timings, self._events):
            with unsaved("the folder of the run is not complete"):
                file.close()


def check_vacant(path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raises ``RecipeError`` when ``path`` may not become, or continue, the folder of a run of ``recipe``.

    Only a run is ever replaced, and a run continues with its own recipe only.
    """
    if resume:
        if not (path / RECIPE).is_file():
            raise RecipeError(f"resume: {str(path)!r} holds no run")
        changed = differences(path, recipe)
        if changed:
            raise RecipeError(f"resume: the run in {str(path)!r} has another recipe: {'; '.join(changed)}")
        return
    if not path.exists() or (path.is_dir() and all(p.name == f".{RECIPE}.tmp" for p in path.iterdir())):
        return  # a temporary file alone: a run that was killed before it began
    if not (path / RECIPE).is_file():
        raise RecipeError(f"out = {str(path)!r}: exists and holds no run; choose another folder")
    if not overwrite:
        raise RecipeError(f"out = {str(path)!r}: holds another run; --resume continues it, --overwrite replaces it")


def _remove(path: Path) -> None:
    """Removes a run. Its recipe goes last: killed on the way, the rest is still a run that may be replaced."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != RECIPE:
            entry.unlink()
    shutil.rmtree(path)


def differences(path: Path, recipe: Recipe) -> list[str]:
    """The fields in which ``recipe`` differs from that of the run in ``path``, in words."""
    before, now = _flat(json.loads((path / RECIPE).read_text())), _flat(json.loads(json.dumps(recipe.to_dict())))
    return [f"{k} = {now.get(k)!r} was {before.get(k)!r}" for k in sorted(before | now) if before.get(k) != now.get(k)]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields without their sections."""
    leaves = {k: v for k, v in recipe.items() if k not in SECTIONS}
    for section in SECTIONS:
        leaves |= recipe.get(section, {})
    return leaves
