"""``compile="auto"``: does compiling pay for itself within the samples that are asked for?

Compiling costs seconds once, and saves a share of every sample after it. Both are measured when a
machine compiles, and kept in ``compile.json`` under ``$DPFAST_CACHE`` (default:
``$XDG_CACHE_HOME/dpfast`` or ``~/.cache/dpfast``; where that cannot be written, a folder among the
temporary files). A model that was never compiled here takes the
figures of those that were, and a new machine the assumption below. What Inductor generates is kept
beside it, so that a second process compiles nothing; the figure is the last one measured, so it
follows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from dpfast.errors import UnreadableError
from dpfast.hardware.cpus import cpus
from dpfast.textfiles import read_whole_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileCost:
    seconds: float  # of compiling all variants of a sampler
    speedup: float  # eager seconds of a sample over compiled ones


# Before anything is measured. CPU: two cores, the embedded generator at batch 64, the best of four
# interleaved batches. GPU: an H200 gained 1.08 from the blocks of DiT-XL/2; its whole step had not
# compiled after 190 s.
ASSUMED = {"cpu": CompileCost(75.0, 1.15), "cuda": CompileCost(300.0, 1.1)}


@dataclass(frozen=True)
class Decision:
    """A decision whether to compile, and the reason in words and numbers."""

    compile: bool
    reason: str


def cache_folder() -> Path | None:
    """Returns the folder in which measured costs are kept: the one that the environment names, else
    one for this user among the temporary files, which is logged once; None where there is neither.
    """
    lasting = _lasting()
    return lasting if isinstance(lasting, Path) else _temporary(lasting)


def _lasting() -> Path | str:
    """Returns the folder that the environment names, or why there is none."""
    given, home = os.environ.get("DPFAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            wanted = Path(given)
        else:
            wanted = (Path(home) if home else Path.home() / ".cache") / "dpfast"
    except RuntimeError:  # no HOME and no entry in passwd, as containers have it
        return "this user has no home folder"
    there = wanted
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        return f"{wanted} cannot be written"
    return wanted


def keep_compiled() -> None:
    """Lets Inductor keep what it generates under the folder of the costs from here on.

    Its own folder is among the temporary files, which a new container lacks. A user's
    ``TORCHINDUCTOR_CACHE_DIR`` stays, and so does Inductor's folder where no lasting one can be
    written.
    """
    folder, given = _lasting(), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not isinstance(folder, Path):
        return
    # torch names its own folder there as soon as some of its modules are imported
    if given is not None and not (
        Path(given).parent == Path(tempfile.gettempdir())
        and Path(given).name.startswith("torchinductor_")
    ):
        return
    try:
        (folder / "inductor").mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((folder / "inductor").absolute())


@cache
def _temporary(reason: str) -> Path | None:
    """Returns a folder for this user among the temporary files; None where no such files can be
    made.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"dpfast-{os.getuid()}"
    except FileNotFoundError:  # nowhere, as on a machine that is read-only
        folder = None
    log.info("measured costs of compiling are kept in %s: %s", folder or "memory alone", reason)
    return folder


def machine(device: torch.device) -> str:
    """Returns the key for which a measured cost holds: the device, its threads and torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (
        f"{platform.machine()} {cpus()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )


class CompileCosts:
    """The measured costs of one machine, by model."""

    def __init__(self, device: torch.device, model: str) -> None:
        self.device = device
        self.model = model
        self.machine = machine(device)
        folder = cache_folder()
        self.path = None if folder is None else folder / "compile.json"
        self._table: dict[str, dict[str, dict[str, float]]] = {}  # where there is no file

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        if self.path is None:
            return self._table
        try:
            table = read_whole_json(self.path)
        except UnreadableError:  # another user's: the cost is measured again
            return {}
        return table if isinstance(table, dict) else {}

    def known(self) -> tuple[CompileCost, str]:
        """Returns the best known cost, and where it comes from."""
        try:
            here = {
                name: CompileCost(**{key: float(value) for key, value in cost.items()})
                for name, cost in self._read().get(self.machine, {}).items()
            }
        except (AttributeError, TypeError, ValueError):
            here = {}
        if self.model in here:
            return here[self.model], "measured"
        if here:
            costs = here.values()
            return CompileCost(
                statistics.median(c.seconds for c in costs),
                statistics.median(c.speedup for c in costs),
            ), "measured on other models"
        return ASSUMED.get(self.device.type, ASSUMED["cpu"]), "assumed"

    def decide(self, samples: int, seconds_per_sample: float) -> Decision:
        """Weighs compiling against ``samples`` more at ``seconds_per_sample`` eagerly."""
        cost, source = self.known()
        saved = samples * seconds_per_sample * (1 - 1 / max(cost.speedup, 1e-9))
        reason = (
            f"{samples} samples at {seconds_per_sample * 1e3:.1f} ms; compiling takes "
            f"{cost.seconds:.0f} s and makes a "
            f"sample {cost.speedup:.2f}x as fast ({source}), saving {max(saved, 0.0):.0f} s"
        )
        return Decision(saved > cost.seconds, reason)

    def record(self, cost: CompileCost) -> None:
        """Keeps a measured cost. A folder that cannot be written is no error: the next process
        measures again.
        """
        table = self._read()
        table.setdefault(self.machine, {})[self.model] = asdict(cost)
        if self.path is None:
            self._table = table
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.path)


class Tuner:
    """Decides for each batch of a stream whether its steps run compiled, and measures what
    compiling cost and brought.

    mode: True, False or "auto"; decision: the last one, and why; costs: what is known about this
    machine.
    """

    def __init__(self, costs: CompileCosts, mode: bool | Literal["auto"]) -> None:
        self.costs, self.mode = costs, mode
        self.decision = Decision(mode is True, f"compile = {mode!r}")
        self._eager: float | None = None  # seconds of a sample
        self._first: float | None = None  # seconds of the first compiled batch
        self._recorded = False

    def decide(self, samples: int, *, compiled: bool) -> bool:
        """Returns True if the next batch runs compiled, with ``samples`` to go. The first eager
        batch measures.

        compiled: whether there are compiled steps for it already.
        """
        if compiled and self.decision.compile:
            return True
        if self.mode == "auto" and self._eager is not None:
            self.decision = self.costs.decide(samples, self._eager)
            log.info(
                "compile: %s; %s", "yes" if self.decision.compile else "no", self.decision.reason
            )
        if self.decision.compile:
            self._first, self._recorded = None, False
        return self.decision.compile

    def report(self, size: int, seconds: float, *, compiled: bool) -> None:
        """Notes how long a whole batch took. The second compiled one shows what the first one spent
        on compiling.
        """
        if not compiled:
            self._eager = seconds / size
        elif self._first is None:
            self._first = seconds
        elif self._eager is not None and not self._recorded:
            cost = CompileCost(max(0.0, self._first - seconds), self._eager * size / seconds)
            self.costs.record(cost)
            self._recorded = True
            log.info(
                "compiling took %.0f s and makes a sample %.2fx as fast", cost.seconds, cost.speedup
            )
            if self.mode == "auto" and cost.speedup < 1:
                self.decision = Decision(
                    False, f"compiled samples are {cost.speedup:.2f}x as fast (measured)"
                )
