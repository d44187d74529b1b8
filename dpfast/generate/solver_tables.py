"""Tables of solvers, each made from a scheduler of diffusers.

A table has one row (alpha, sigma, a, b, c, d) per step, so that every solver runs the same fused
update:

    x_next = a x0 + b eps + c x0_prev + d noise        (``dpfast.ops.guided_step``)

It is computed once, in float64, from a diffusers scheduler, and reproduces that scheduler's
``step``. alpha and sigma are the signal and noise scale of the step's input, x = alpha x0 + sigma
eps. ``dpfast.generate.solvers`` gives the functions here their names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import DynamicThreshold

# options of a scheduler that make another grid
FLOW_GRIDS = ("invert_sigmas", "stochastic_sampling", "shift_terminal")
KARRAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


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
