"""Solvers: what their names mean, and which schedulers of pipeline folders they stand for.

A pipeline folder's scheduler says how its model was trained and on which grid it samples: betas,
prediction, spacing, offsets, the last alpha, zero terminal SNR, flow shift, bounds of x0. The
caller says which solver runs on it. What the scheduler says about its own algorithm (order,
ancestral noise, Runge-Kutta steps) is therefore not read: a folder with a ``PNDMScheduler`` samples
with DDIM as ``DDIMScheduler.from_config`` would set it up. Distilled models are the exception: they
were trained for one solver, "auto" takes it, and any other serves for comparison. They are known by
an LCM or TCD scheduler, or by one of Euler's with trailing timesteps, as the folders of SD-Turbo,
SDXL-Turbo and SDXL-Lightning have it.

Adding a solver: write the function that makes its table in ``solver_tables`` and enter it in
``SOLVERS``, or in ``FLOW_SOLVERS`` for models that match a flow; a recipe allows the names of
``dpfast.config.SolverName``, which a test holds against ``SOLVERS``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from dpfast.config import SolverName
from dpfast.errors import InputError, first_line
from dpfast.generate import check
from dpfast.generate.solver_tables import (
    KARRAS,
    SolverTable,
    ddim_table,
    dpmpp_2m_table,
    euler_ancestral_table,
    euler_table,
    flow_dpmpp_2m_table,
    flow_euler_table,
    lcm_table,
    tcd_table,
)
from dpfast.ops.guided_step import Prediction


@dataclass(frozen=True, kw_only=True)
class Solver:
    """The meaning of a solver's name.

    table: makes the table from a scheduler and a number of steps. scheduler: the class in diffusers
    whose grid and options ``table`` reads. settings: options that the scheduler gets in place of
    the folder's. takes: the arguments that ``table`` has besides. refuses: options of a folder's
    scheduler that the table would ignore, and that must therefore be off. folders: the schedulers
    of the folders that "auto" samples with this solver. trailing: those of which it does so where
    their ``timestep_spacing`` is "trailing".
    """

    table: Callable[..., SolverTable]
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    trailing: tuple[str, ...] = ()


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(
        table=ddim_table,
        scheduler="DDIMScheduler",
        takes=("eta",),
        refuses=(*KARRAS, "use_lu_lambdas"),
        folders=(  # all schedulers over betas: they differ in their algorithm, not in their options
            "DDIMScheduler",
            "DDPMScheduler",
            "PNDMScheduler",
            "LMSDiscreteScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "UniPCMultistepScheduler",
        ),
    ),
    "dpmpp2m": Solver(
        table=dpmpp_2m_table,
        scheduler="DPMSolverMultistepScheduler",
        settings={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
        },
    ),
    "euler": Solver(
        table=euler_table,
        scheduler="EulerDiscreteScheduler",
        refuses=("use_lu_lambdas",),
        trailing=("EulerDiscreteScheduler",),
    ),
    "euler_ancestral": Solver(
        table=euler_ancestral_table,
        scheduler="EulerAncestralDiscreteScheduler",
        refuses=(*KARRAS, "use_lu_lambdas"),
        trailing=("EulerAncestralDiscreteScheduler",),
    ),
    "lcm": Solver(table=lcm_table, scheduler="LCMScheduler", folders=("LCMScheduler",)),
    "tcd": Solver(
        table=tcd_table, scheduler="TCDScheduler", takes=("eta",), folders=("TCDScheduler",)
    ),
}
FLOW_SOLVERS: dict[str, Solver] = {
    "euler": Solver(
        table=flow_euler_table,
        scheduler="FlowMatchEulerDiscreteScheduler",
        takes=("image_tokens", "even"),
        folders=("FlowMatchEulerDiscreteScheduler",),
    ),
    "dpmpp2m": Solver(
        table=flow_dpmpp_2m_table,
        scheduler="DPMSolverMultistepScheduler",
        settings=SOLVERS["dpmpp2m"].settings,
    ),
}
AUTO = {
    name: solver
    for solver, about in (*SOLVERS.items(), *FLOW_SOLVERS.items())
    for name in about.folders
}
TRAILING = {name: solver for solver, about in SOLVERS.items() for name in about.trailing}
SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS = ("zero", "sigma_min")


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


# Options of a scheduler, where a folder gives them -> whether a value can be right, in words too:
# diffusers takes others, and fails later or makes a grid outside of what its model was trained on.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (lambda x: type(x) is int and x > 0, "a whole number above 0"),
    "steps_offset": (lambda x: type(x) is int and x >= 0, "a whole number of at least 0"),
    "timestep_spacing": (lambda x: x in SPACINGS, f"one of {', '.join(SPACINGS)}"),
    "trained_betas": (
        lambda x: x is None or (isinstance(x, list) and bool(x) and all(map(_number, x))),
        "a list of numbers",
    ),
    "original_inference_steps": (lambda x: type(x) is int and x > 0, "a whole number above 0"),
    "timestep_scaling": (lambda x: _number(x) and x > 0, "a number above 0"),
    "final_sigmas_type": (lambda x: x in FINAL_SIGMAS, f"one of {', '.join(FINAL_SIGMAS)}"),
    "sample_max_value": (_number, "a number"),
    "clip_sample_range": (lambda x: _number(x) and x > 0, "a number above 0"),
    "dynamic_thresholding_ratio": (lambda x: _number(x) and 0 <= x <= 1, "between 0 and 1"),
    "shift": (lambda x: _number(x) and x > 0, "a number above 0"),
    "flow_shift": (lambda x: _number(x) and x > 0, "a number above 0"),
    "shift_terminal": (lambda x: x is None or (_number(x) and 0 <= x < 1), "at least 0, below 1"),
}
FLOW = "flow_prediction"  # as a scheduler calls it that knows other predictions, too
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Keeps back what NumPy has to say about diffusers' schedulers: that they hand it tensors, and
    that they divide by zero. A grid that is not finite is refused in words.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"diffusers\.")
        yield


def _as(kind: str, config: Mapping[str, Any], **options: Any) -> Any:
    """Returns a scheduler of diffusers' class ``kind`` with the options of another's ``config``.
    That it does not know all of them is no news for its log.
    """
    log = logging.getLogger("diffusers.configuration_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return getattr(diffusers, kind).from_config(config, **options)
    finally:
        log.setLevel(level)


@_without_notices()
def load_scheduler(folder: Path, *, latent: bool, **overrides: Any) -> Any:
    """Returns the scheduler of a pipeline folder, as the one that its solver in ``AUTO`` reads.

    It keeps the options of the folder's scheduler that it does not know itself, for other solvers.

    Args:
        folder: of the pipeline; the scheduler's configuration is its ``scheduler``.
        latent: x0 is not bounded where the folder's scheduler has no ``clip_sample``, while
            ``DDIMScheduler`` would bound it to [-1, 1].
        overrides: options in place of the folder's.

    Raises ``InputError`` for a scheduler or an option that no solver here stands for.
    """

    def refuse(what: str) -> InputError:
        return InputError(f"pipeline = {str(folder)!r}: {what}")

    def read(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # whatever diffusers meets in options that it does not check
            raise refuse(f"its scheduler cannot be read: {first_line(error)}") from error

    path = folder / "scheduler"
    if not (path / "scheduler_config.json").is_file():
        raise refuse("the part 'scheduler' has no scheduler_config.json")
    saved = read(lambda: diffusers.DDIMScheduler.load_config(path))
    name = saved.get("_class_name") if isinstance(saved, dict) else None
    if not isinstance(name, str) or name not in AUTO:
        raise refuse(f"scheduler {name}: expected one of {', '.join(AUTO)}")
    for key, (fits, words) in OPTIONS.items():
        if key in saved and not fits(saved[key]):
            raise refuse(f"scheduler option {key} = {saved[key]!r}: expected {words}")
    own = read(lambda: getattr(diffusers, name).from_pretrained(path))
    if is_flow(own):
        kind = own.config.get("prediction_type", FLOW)
        if kind != FLOW:
            raise refuse(f"prediction_type = {kind!r}: expected {FLOW!r} on a flow")
        # at the length for which base_shift is meant: others are the model's to know
        tokens = own.config.get("base_image_seq_len", 0)
        read(lambda: solver_table(own, 2, image_tokens=tokens))
        return own
    config = own.config
    kind = config.get("prediction_type", "epsilon")
    if kind == FLOW:
        raise refuse(
            f"scheduler {name} with prediction_type = {FLOW!r} has no solver here; expected "
            "FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler with use_flow_sigmas"
        )
    if not isinstance(kind, str) or kind not in PREDICTIONS:
        raise refuse(f"prediction_type = {kind!r}: expected one of {', '.join(PREDICTIONS)}")
    for option, wanted in (("use_flow_sigmas", False), ("timestep_type", "discrete")):
        if config.get(option, wanted) != wanted:
            raise refuse(
                f"scheduler option {option} = {config[option]!r} "
                f"has no solver here; expected {wanted!r}"
            )
    if latent and "clip_sample" not in config:
        overrides = {"clip_sample": False, **overrides}
    made = read(lambda: _as(SOLVERS[_auto(own)].scheduler, config, **overrides))
    betas, count = made.betas, config.num_train_timesteps
    if len(betas) != count or not bool(((betas >= 0) & (betas <= 1)).all()):
        raise refuse(
            f"its scheduler has {len(betas)} betas between {float(betas.min()):g} and "
            f"{float(betas.max()):g}, expected {count} between 0 and 1"
        )
    return made


def is_flow(scheduler: Any) -> bool:
    """Returns True if the model of a folder with this scheduler matches a flow."""
    name = type(scheduler).__name__
    own = any(name in about.folders for about in FLOW_SOLVERS.values())
    return own or _is_flow_of(name, scheduler.config)


def _is_flow_of(name: str, config: Mapping[str, Any]) -> bool:
    """Returns True if it is a scheduler over betas by its class that an option makes one over a
    flow.
    """
    return name == FLOW_SOLVERS["dpmpp2m"].scheduler and bool(config.get("use_flow_sigmas"))


def _of_flow(scheduler: Any) -> dict[str, Any]:
    """Returns the shift of a flow's grid by the names that either class of scheduler gives it."""
    config = scheduler.config
    shift = config["flow_shift" if _is_flow_of(type(scheduler).__name__, config) else "shift"]
    named = {"use_flow_sigmas": True, "prediction_type": FLOW}
    return {"shift": shift, "flow_shift": shift, **named}


def _auto(scheduler: Any) -> str:
    """Returns the solver that "auto" is for a scheduler of this class and options."""
    name = type(scheduler).__name__
    if _is_flow_of(name, scheduler.config):
        return "dpmpp2m"
    if scheduler.config.get("timestep_spacing") == "trailing" and name in TRAILING:
        return TRAILING[name]
    return AUTO.get(name, "ddim")


def prediction_of(scheduler: Any) -> Prediction:
    """Returns the kind of prediction of the model of a folder with this scheduler."""
    return "flow" if is_flow(scheduler) else PREDICTIONS[scheduler.config.prediction_type]


@_without_notices()
def solver_table(
    scheduler: Any,
    steps: int,
    *,
    solver: SolverName = "auto",
    eta: float = 0.0,
    image_tokens: int = 0,
    even: bool = False,
) -> SolverTable:
    """Returns the table of a solver on the grid of ``load_scheduler``'s scheduler, which stays as
    it was.

    Raises ``InputError`` for an unknown solver, one of the other model kind, an ``eta`` for a
    solver without such a choice, and what the solver's function refuses; ``TypeError`` for an
    ``eta`` that is no number.
    """
    check.number("eta", eta)
    if solver != "auto" and solver not in SOLVERS:
        raise InputError(f"solver = {solver!r}: expected one of {', '.join(('auto', *SOLVERS))}")
    name = _auto(scheduler) if solver == "auto" else solver
    known = FLOW_SOLVERS if is_flow(scheduler) else SOLVERS
    if name not in known:
        others = " or ".join(map(repr, known))
        raise InputError(f"solver = {name!r}: the pipeline's scheduler takes 'auto' or {others}")
    about = known[name]
    if eta and "eta" not in about.takes:
        stochastic = [repr(other) for other in SOLVERS if "eta" in SOLVERS[other].takes]
        raise InputError(
            f"eta = {eta}: only {' and '.join(stochastic)} have such a choice, "
            f"solver = {name!r} takes eta = 0"
        )
    for option in about.refuses:
        if scheduler.config.get(option):
            raise InputError(
                f"scheduler option {option} = True: {name!r} steps on the trained timesteps only; "
                "use solver = 'dpmpp2m' or set the option to false"
            )
    options = {**about.settings, **(_of_flow(scheduler) if is_flow(scheduler) else {})}
    own = _as(about.scheduler, scheduler.config, **options)
    given = {"eta": eta, "image_tokens": image_tokens, "even": even}
    return about.table(own, steps, **{argument: given[argument] for argument in about.takes})
