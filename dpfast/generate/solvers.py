"""Solvers: what their names mean, and their tables.

A table has one row (alpha, sigma, a, b, c, d) per step, so that every solver runs the same fused
update:

    x_next = a x0 + b eps + c x0_prev + d noise        (``dpfast.ops.guided_step``)

It is computed once, in float64, from a diffusers scheduler, and reproduces that scheduler's
``step``. alpha and sigma are the signal and noise scale of the step's input, x = alpha x0 + sigma
eps.

A pipeline folder's scheduler says how its model was trained and on which grid it samples: betas,
prediction, spacing, offsets, the last alpha, zero terminal SNR, flow shift, bounds of x0. The
caller says which solver runs on it. What the scheduler says about its own algorithm (order,
ancestral noise, Runge-Kutta steps) is therefore not read: a folder with a ``PNDMScheduler`` samples
with DDIM as ``DDIMScheduler.from_config`` would set it up. Distilled models are the exception: they
were trained for one solver, "auto" takes it, and any other serves for comparison. They are known by
an LCM or TCD scheduler, or by one of Euler's with trailing timesteps, as the folders of SD-Turbo,
SDXL-Turbo and SDXL-Lightning have it.

Adding a solver: write the function that makes its table and enter it in ``SOLVERS``, or in
``FLOW_SOLVERS`` for models that match a flow; a recipe allows the names of
``dpfast.config.SolverName``, which a test holds against ``SOLVERS``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from dpfast.config import SolverName
from dpfast.errors import InputError, first_line
from dpfast.generate import check
from dpfast.ops import DynamicThreshold
from dpfast.ops.guided_step import Prediction

COLUMNS = ("alpha", "sigma", "a", "b", "c", "d")


@dataclass(frozen=True)
class SolverTable:
    """One solver on one grid.

    Attributes:
        rows: (steps, 6) float32, the rows that ``guided_step`` takes.
        timesteps: (steps,) as the denoiser expects them, int64 or float32.
        initial_scale: Factor of unit noise that makes the first input.
        clip: Bound of x0 that ``guided_step`` takes.
    """

    rows: Tensor
    timesteps: Tensor
    initial_scale: float = 1.0
    clip: float | DynamicThreshold | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def needs_x0_prev(self) -> bool:
        """True if a step uses the x0 of the step before (column c). Reads the rows once, on the
        host.
        """
        return bool(self.rows[:, 4].any())

    @cached_property
    def needs_noise(self) -> bool:
        """True if a step adds noise (column d). Reads the rows once, on the host."""
        return bool(self.rows[:, 5].any())

    def to(self, device: torch.device | str) -> SolverTable:
        """Returns the table on ``device``. What is asked about the rows has been read before: there
        nothing is waited for.
        """
        known = {"needs_x0_prev": self.needs_x0_prev, "needs_noise": self.needs_noise}
        moved = replace(self, rows=self.rows.to(device), timesteps=self.timesteps.to(device))
        moved.__dict__.update(known)  # where a cached property keeps its value
        return moved


def _table(
    columns: list[Tensor], timesteps: Tensor, clip: float | DynamicThreshold | None = None
) -> SolverTable:
    rows = torch.stack(columns, dim=1).float()
    if not rows.isfinite().all():
        raise InputError(
            f"steps = {len(rows)}: the scheduler's grid has "
            "no finite coefficients at this number of steps"
        )
    return SolverTable(rows, timesteps.clone(), clip=clip)


def _check_steps(steps: int, most: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an integer, got {type(steps).__name__}")
    if not 1 <= steps <= most:
        raise InputError(
            f"steps = {steps}: expected between 1 and {most}, the grid that the scheduler has"
        )


def _check_start(config: Any, cumulative: Tensor) -> None:
    if config.prediction_type == "epsilon" and float(cumulative[0]) == 0:
        raise InputError(
            "scheduler option rescale_betas_zero_snr = True: an epsilon prediction says nothing "
            "about x0 at the first "
            "step, which is pure noise; expected prediction_type 'v_prediction' or 'sample'"
        )


def _clip(config: Any) -> float | DynamicThreshold | None:
    if config.get("thresholding"):
        if config.sample_max_value < 1:
            raise InputError(
                f"scheduler option sample_max_value = {config.sample_max_value}: "
                "expected at least 1"
            )
        return DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    return float(config.clip_sample_range) if config.get("clip_sample") else None


def ddim_table(scheduler: Any, steps: int, *, eta: float = 0.0) -> SolverTable:
    """Returns the table of DDIM (Song et al. 2021, eq. 12) on the grid of a
    ``diffusers.DDIMScheduler``.

    s = eta sqrt((sigma'^2/sigma^2) (1 - alpha^2/alpha'^2));  a = alpha', b = sqrt(sigma'^2 - s^2),
                                                              c = 0, d = s.

    The scheduler's ``clip_sample`` or ``thresholding`` becomes the table's ``clip``.

    Raises ``InputError`` when ``steps`` is outside [1, num_train_timesteps], eta outside [0, 1],
    ``steps_offset`` moves the grid beyond the trained timesteps, or the grid starts at pure noise
    (zero terminal SNR), from which an epsilon prediction determines no x0.
    """
    config = scheduler.config
    trained = config.num_train_timesteps
    _check_steps(steps, trained)
    if not 0 <= eta <= 1:
        raise InputError(f"eta = {eta}: expected between 0 and 1")
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.long().cpu()
    if int(t.max()) >= trained:
        raise InputError(
            f"steps = {steps}: with steps_offset = {config.steps_offset} the grid starts at "
            f"timestep {int(t.max())}, "
            f"beyond the {trained} trained ones; use fewer steps"
        )
    previous = t - trained // steps
    cumulative = scheduler.alphas_cumprod.double().cpu()
    now = cumulative[t]
    _check_start(config, now)
    then = torch.where(
        previous >= 0, cumulative[previous.clamp(min=0)], float(scheduler.final_alpha_cumprod)
    )
    # at zero terminal SNR the input is pure noise and now is 0; the ratio stays finite
    variance = ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0)
    d = eta * variance.sqrt()
    b = (1 - then - d.square()).clamp(min=0).sqrt()
    return _table(
        [now.sqrt(), (1 - now).sqrt(), then.sqrt(), b, torch.zeros_like(b), d], t, _clip(config)
    )


def dpmpp_2m_table(scheduler: Any, steps: int) -> SolverTable:
    """Returns the table of DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) on the grid of a
    ``diffusers.DPMSolverMultistepScheduler``.

    With h = lambda' - lambda, lambda = log(alpha/sigma), r = h_prev/h and E = exp(-h) - 1 the
    update x' = (sigma'/sigma) x - alpha' E ((1 + 1/2r) x0 - (1/2r) x0_prev) has a = alpha
    sigma'/sigma - alpha' E (1 + 1/2r), b = sigma', c = alpha' E/2r, d = 0. The first step is of
    first order, and so is the last one where it ends at sigma' = 0 or the scheduler asks for it.

    Karras, exponential, beta and Lu grids are read from the scheduler like any other.

    Raises ``InputError`` for another algorithm than midpoint "dpmsolver++" of order 2, for
    ``use_flow_sigmas``, and for ``thresholding``: diffusers bounds x0 there before x is split into
    x0 and eps, the fused update after it, and the two differ wherever the bound is active.
    """
    config = scheduler.config
    for option, wanted in (
        ("algorithm_type", "dpmsolver++"),
        ("solver_order", 2),
        ("solver_type", "midpoint"),
    ):
        if config[option] != wanted:
            raise InputError(f"scheduler option {option} = {config[option]!r}: expected {wanted!r}")
    for option in ("thresholding", "use_flow_sigmas"):
        if config.get(option):
            raise InputError(
                f"scheduler option {option} = True: DPM-Solver++ 2M has no table for it; use 'ddim'"
            )
    _check_steps(steps, config.num_train_timesteps - 1)
    scheduler.set_timesteps(steps)
    ratio = scheduler.sigmas.double().cpu()
    alpha = (1 + ratio.square()).rsqrt()
    return _dpmpp_2m(scheduler, alpha, ratio * alpha, ratio)


def flow_dpmpp_2m_table(scheduler: Any, steps: int) -> SolverTable:
    """Returns the table of DPM-Solver++ 2M as in ``dpmpp_2m_table`` on the grid of a flow, alpha =
    1 - sigma, as a ``diffusers.DPMSolverMultistepScheduler`` with ``use_flow_sigmas`` has it.

    Raises ``InputError`` for options of a grid that this scheduler does not apply to a flow, and
    for ``thresholding``.
    """
    config = scheduler.config
    for option in (*KARRAS, *FLOW_GRIDS, "use_lu_lambdas", "use_dynamic_shifting", "thresholding"):
        if config.get(option):
            raise InputError(
                f"scheduler option {option} = {config[option]}: DPM-Solver++ 2M has no table for "
                "it on a flow"
            )
    _check_steps(steps, config.num_train_timesteps - 1)
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double().cpu()
    return _dpmpp_2m(scheduler, 1 - sigma, sigma, sigma / (1 - sigma))


def _dpmpp_2m(scheduler: Any, alpha: Tensor, sigma: Tensor, ratio: Tensor) -> SolverTable:
    """Returns the table on a grid of steps + 1 levels; ratio: sigma / alpha."""
    config, steps = scheduler.config, len(ratio) - 1
    now, then = slice(0, steps), slice(1, steps + 1)
    shrink = ratio[then] / ratio[now] - 1  # exp(-h) - 1
    log_ratio = -ratio.log()
    h = log_ratio[then] - log_ratio[now]
    slope = torch.zeros(steps, dtype=torch.float64)
    slope[1:] = 0.5 * h[1:] / h[:-1]
    if (
        float(ratio[-1]) == 0
        or config.get("euler_at_final")
        or (config.lower_order_final and steps < 15)
    ):
        slope[-1] = 0.0
    a = alpha[now] * sigma[then] / sigma[now] - alpha[then] * shrink * (1 + slope)
    c = alpha[then] * shrink * slope
    return _table(
        [alpha[now], sigma[now], a, sigma[then], c, torch.zeros_like(a)], scheduler.timesteps.cpu()
    )


def euler_table(scheduler: Any, steps: int) -> SolverTable:
    """Returns the table of Euler steps in sigma / alpha (Karras et al. 2022, arXiv 2206.00364,
    algorithm 1 without its correction) on the grid of a ``diffusers.EulerDiscreteScheduler``.

    diffusers keeps x / alpha, here it is x: a = alpha', b = sigma', c = d = 0, DDIM's update on
    another grid. Behind the last step diffusers leaves x / alpha as it is: a = 1, b = sigma' /
    alpha'. The first input is the scheduler's ``init_noise_sigma`` times the noise.

    Karras, exponential and beta grids have timesteps between those of the training, and so has the
    spacing "linspace"; they are float32 then, and int64 otherwise.

    Raises ``InputError`` when ``steps`` is outside [1, num_train_timesteps], or no number of steps
    that the spacing can make.
    """
    return _euler_table(scheduler, steps, ancestral=False)


def euler_ancestral_table(scheduler: Any, steps: int) -> SolverTable:
    """Returns the table of Euler steps with ancestral noise on the grid of a
    ``diffusers.EulerAncestralDiscreteScheduler``.

    With s = sigma / alpha, up^2 = s'^2 (s^2 - s'^2) / s^2 and down^2 = s'^2 - up^2 a step goes down
    to the level ``down`` and adds noise: a = alpha', b = alpha' down, c = 0, d = alpha' up.

    Raises ``InputError`` as ``euler_table`` does.
    """
    return _euler_table(scheduler, steps, ancestral=True)


def _euler_table(scheduler: Any, steps: int, *, ancestral: bool) -> SolverTable:
    _check_steps(steps, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(steps)
    t, ratio = scheduler.timesteps.double().cpu(), scheduler.sigmas.double().cpu()
    if len(t) != steps:
        raise InputError(
            f"steps = {steps}: the spacing of the scheduler makes {len(t)} timesteps of it; use "
            "another number"
        )
    now, then = ratio[:steps], ratio[1 : steps + 1]
    alpha, a = (1 + now.square()).rsqrt(), (1 + then.square()).rsqrt()
    a[-1] = 1.0
    up = (then.square() * (1 - (then / now).square())).clamp(min=0).sqrt() * ancestral
    down = (then.square() - up.square()).clamp(min=0).sqrt()
    whole = bool((t == t.round()).all())
    table = _table(
        [alpha, now * alpha, a, a * down, torch.zeros_like(a), a * up],
        t.long() if whole else t.float(),
    )
    return replace(table, initial_scale=float(scheduler.init_noise_sigma * alpha[0]))


def flow_euler_table(
    scheduler: Any, steps: int, *, image_tokens: int = 0, even: bool = False, **options: Any
) -> SolverTable:
    """Returns the table of flow-matching Euler (Lipman et al. 2023) on the grid of a
    ``diffusers.FlowMatchEulerDiscreteScheduler``.

    alpha = 1 - sigma, a = 1 - sigma', b = sigma', c = d = 0. ``image_tokens``: length of the image
    sequence, which shifts the grid of a scheduler with ``use_dynamic_shifting``. ``even``: whether
    the grid goes in even steps from 1 down to 0, before any shift, as diffusers' pipelines of FLUX
    ask for it, and not to the lowest trained sigma. ``options`` go to the scheduler's
    ``set_timesteps``.

    Raises ``InputError`` for ``steps`` below 1, ``invert_sigmas`` and ``stochastic_sampling``.
    """
    for option in ("invert_sigmas", "stochastic_sampling"):
        if scheduler.config.get(option):
            raise InputError(
                f"scheduler option {option} = True: flow-matching Euler has no table for it"
            )
    _check_steps(steps, scheduler.config.num_train_timesteps)
    if scheduler.config.use_dynamic_shifting and "mu" not in options:
        options["mu"] = _dynamic_shift(scheduler.config, image_tokens)
    if even:
        options["sigmas"] = [1 - step / steps for step in range(steps)]
    scheduler.set_timesteps(steps, **options)
    sigmas = scheduler.sigmas.double().cpu()
    now, then = sigmas[:-1], sigmas[1:]
    zero = torch.zeros_like(now)
    return _table([1 - now, now, 1 - then, then, zero, zero], scheduler.timesteps.cpu())


def _dynamic_shift(config: Any, image_tokens: int) -> float:
    """Returns mu, linear in the length of the image sequence (Esser et al. 2024, as in diffusers'
    pipelines).
    """
    lengths = (config.base_image_seq_len, config.max_image_seq_len)
    if lengths[0] >= lengths[1]:
        raise InputError(
            f"scheduler option max_image_seq_len = {lengths[1]}: expected more than "
            f"base_image_seq_len, {lengths[0]}"
        )
    slope = (config.max_shift - config.base_shift) / (lengths[1] - lengths[0])
    mu = float(config.base_shift + slope * (image_tokens - lengths[0]))
    if config.time_shift_type == "linear" and mu <= 0:
        raise InputError(
            "scheduler option time_shift_type = 'linear': base_shift and max_shift make a shift of "
            f"{mu:g} for images of {image_tokens} tokens, expected one above 0"
        )
    return mu


def lcm_table(scheduler: Any, steps: int) -> SolverTable:
    """Returns the table of multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378) on
    the grid of a ``diffusers.LCMScheduler``.

    The denoised image is c_out x0 + c_skip x with the boundary condition's scalings, and x = alpha
    x0 + sigma eps. Each step but the last adds new noise to it: a = alpha' (c_out + c_skip alpha),
    b = alpha' c_skip sigma, c = 0, d = sigma'. The last step ends there: alpha' = 1, d = 0.

    Raises ``InputError`` when ``steps`` is outside [1, original_inference_steps], for pure noise as
    in ``ddim_table``, and for ``clip_sample`` and ``thresholding``: they bound x0 but not x, and
    the fused update has x only through x0.
    """
    config = scheduler.config
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise InputError(f"scheduler option {option} = True: LCM has no table for it")
    t, now, then = _distilled_grid(scheduler, steps)
    scaled = t.double() * config.timestep_scaling
    variance = 0.5**2  # of the data, as diffusers fixes it
    skip, out = (
        variance / (scaled.square() + variance),
        scaled / (scaled.square() + variance).sqrt(),
    )
    last = torch.arange(steps) == steps - 1
    signal = torch.where(last, 1.0, then.sqrt())
    d = torch.where(last, 0.0, (1 - then).sqrt())
    a, b = signal * (out + skip * now.sqrt()), signal * skip * (1 - now).sqrt()
    return _table([now.sqrt(), (1 - now).sqrt(), a, b, torch.zeros_like(a), d], t)


def tcd_table(scheduler: Any, steps: int, *, eta: float = 0.0) -> SolverTable:
    """Returns the table of strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159) on
    the grid of a ``diffusers.TCDScheduler``.

    A step goes to s = floor((1 - eta) t') without noise and from there to t' with it; eta is the
    paper's gamma. With r = alpha'/alpha_s: a = r alpha_s, b = r sigma_s, c = 0, d = sqrt(1 - r^2);
    r = 1 in the last step, where t' = 0.

    Raises ``InputError`` as ``lcm_table`` does, but for bounds of x0, which the scheduler never
    applies; eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta = {eta}: expected between 0 and 1")
    t, now, then = _distilled_grid(scheduler, steps)
    cumulative = scheduler.alphas_cumprod.double().cpu()
    following = torch.cat([t[1:], t.new_zeros(1)])
    middle = cumulative[
        ((1 - eta) * following.float()).floor().long()
    ]  # float32, as diffusers rounds
    ratio = (
        torch.where(torch.arange(steps) == steps - 1, 1.0, then / middle)
        if eta
        else torch.ones_like(middle)
    )
    a, b = (ratio * middle).sqrt(), (ratio * (1 - middle)).sqrt()
    return _table(
        [now.sqrt(), (1 - now).sqrt(), a, b, torch.zeros_like(a), (1 - ratio).clamp(min=0).sqrt()],
        t,
    )


def _distilled_grid(scheduler: Any, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns timesteps, and alpha^2 of each step and of the next one; behind the last step that of
    the last.
    """
    config = scheduler.config
    trained, original = config.num_train_timesteps, config.original_inference_steps
    if original > trained:
        raise InputError(
            f"scheduler option original_inference_steps = {original}: expected at most "
            f"num_train_timesteps, {trained}"
        )
    _check_steps(steps, original)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.long().cpu()
    now = scheduler.alphas_cumprod.double().cpu()[t]
    _check_start(config, now)
    return t, now, torch.cat([now[1:], now[-1:]])


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


FLOW_GRIDS = ("invert_sigmas", "stochastic_sampling", "shift_terminal")
KARRAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
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
