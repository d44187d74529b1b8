"""From a folder's scheduler to a solver's table: the one place where a solver's name gets its
meaning.

The folder says how its model was trained and on which grid it samples: betas, prediction, spacing,
offsets, the last alpha, zero terminal SNR, flow shift, bounds of x0. The caller says which solver
runs on it. What a folder's scheduler says about its own algorithm (order, ancestral noise,
Runge-Kutta steps) is therefore not read: a folder with a ``PNDMScheduler`` samples with DDIM as
``DDIMScheduler.from_config`` would set it up. Distilled models are the
exception: they were trained for one solver, "auto" takes it, and any other serves for comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import diffusers

from dpfast.errors import InputError
from dpfast.generate.solvers import (
    SolverTable,
    ddim_table,
    dpmpp_2m_table,
    flow_euler_table,
    lcm_table,
    tcd_table,
)
from dpfast.ops.guided_step import Prediction

Solver = Literal["auto", "ddim", "dpmpp2m", "euler", "lcm", "tcd"]

# Schedulers over betas in diffusers: they differ in their algorithm, and share the options that are
# read here.
VARIANCE_PRESERVING = (
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
)
DISTILLED: dict[str, Solver] = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
FLOW = "FlowMatchEulerDiscreteScheduler"
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def load_scheduler(folder: Path, *, latent: bool, **overrides: Any) -> Any:
    """The scheduler of ``folder/scheduler``, as a ``DDIMScheduler``, or itself where it is a
    ``FlowMatchEulerDiscreteScheduler`` or one of a distilled model.

    A ``DDIMScheduler`` keeps the options of the folder's scheduler that it does not know itself,
    for other solvers.
    ``latent``: x0 is not bounded where the folder's scheduler has no ``clip_sample``, while
    ``DDIMScheduler`` would bound it to [-1, 1]. ``overrides`` replace options of the folder.

    Raises ``InputError`` for a scheduler or an option that no solver here stands for.
    """

    def refuse(what: str) -> InputError:
        return InputError(f"pipeline = {str(folder)!r}: {what}")

    path = folder / "scheduler"
    if not (path / "scheduler_config.json").is_file():
        raise refuse("the part 'scheduler' has no scheduler_config.json")
    try:
        name = diffusers.DDIMScheduler.load_config(path).get("_class_name")
        known = (*VARIANCE_PRESERVING, *DISTILLED)
        if name not in (*known, FLOW):
            raise refuse(f"scheduler {name}: expected {FLOW} or one of {', '.join(known)}")
        own = getattr(diffusers, name).from_pretrained(path)
        if name == FLOW:
            flow_euler_table(own, 2, **({"mu": 0.0} if own.config.use_dynamic_shifting else {}))
            return own
        config = own.config
        if config.get("prediction_type", "epsilon") not in PREDICTIONS:
            raise refuse(
                f"prediction_type = {config['prediction_type']!r}: expected one of "
                f"{', '.join(PREDICTIONS)}"
            )
        for option, wanted in (("use_flow_sigmas", False), ("timestep_type", "discrete")):
            if config.get(option, wanted) != wanted:
                raise refuse(
                    f"scheduler option {option} = {config[option]!r} has no solver here; expected "
                    f"{wanted!r}"
                )
        if latent and "clip_sample" not in config:
            overrides = {"clip_sample": False, **overrides}
        kind = type(own) if name in DISTILLED else diffusers.DDIMScheduler
        return kind.from_config(config, **overrides)
    except InputError:
        raise
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise refuse(f"its scheduler cannot be read: {error}") from error


def prediction_of(scheduler: Any) -> Prediction:
    """What the model of a folder with this scheduler predicts."""
    return (
        "flow"
        if type(scheduler).__name__ == FLOW
        else PREDICTIONS[scheduler.config.prediction_type]
    )


def solver_table(
    scheduler: Any, steps: int, *, solver: Solver = "auto", eta: float = 0.0, image_tokens: int = 0
) -> SolverTable:
    """The table of a solver on the grid of ``load_scheduler``'s scheduler, which stays as it was.

    ``image_tokens``: length of the image sequence, for flow models with ``use_dynamic_shifting``.

    Raises ``InputError`` for an unknown solver, one of the other model kind, an ``eta`` for a
    solver without such a choice, and what the tables of ``dpfast.generate.solvers`` refuse.
    """
    if solver not in get_args(Solver):
        raise InputError(f"solver = {solver!r}: expected one of {', '.join(get_args(Solver))}")
    flow = type(scheduler).__name__ == FLOW
    if solver == "auto":
        solver = "euler" if flow else DISTILLED.get(type(scheduler).__name__, "ddim")
    if flow != (solver == "euler"):
        expected = (
            "'auto' or 'euler', its model matches a flow"
            if flow
            else "'auto', 'ddim', 'dpmpp2m', 'lcm' or 'tcd'"
        )
        raise InputError(f"solver = {solver!r}: the pipeline's scheduler takes {expected}")
    if eta and solver not in ("ddim", "tcd"):
        raise InputError(
            f"eta = {eta}: only 'ddim' and 'tcd' have such a choice, solver = {solver!r} takes eta "
            "= 0"
        )
    if solver == "euler":
        own = type(scheduler).from_config(scheduler.config)
        options = (
            {"mu": _dynamic_shift(own.config, image_tokens)}
            if own.config.use_dynamic_shifting
            else {}
        )
        return flow_euler_table(own, steps, **options)
    if solver == "dpmpp2m":
        algorithm = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
        return dpmpp_2m_table(
            diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, **algorithm), steps
        )
    if solver == "lcm":
        return lcm_table(diffusers.LCMScheduler.from_config(scheduler.config), steps)
    if solver == "tcd":
        return tcd_table(diffusers.TCDScheduler.from_config(scheduler.config), steps, eta=eta)
    for option in GRIDS:
        if scheduler.config.get(option):
            raise InputError(
                f"scheduler option {option} = True: DDIM steps on the trained timesteps only; use "
                "solver = 'dpmpp2m' "
                "or set the option to false"
            )
    return ddim_table(diffusers.DDIMScheduler.from_config(scheduler.config), steps, eta=eta)


def _dynamic_shift(config: Any, image_tokens: int) -> float:
    """mu, linear in the length of the image sequence (Esser et al. 2024, as in diffusers'
    pipelines).
    """
    lengths = (config.base_image_seq_len, config.max_image_seq_len)
    slope = (config.max_shift - config.base_shift) / (lengths[1] - lengths[0])
    return float(config.base_shift + slope * (image_tokens - lengths[0]))
