"""Solvers as tables: one row (alpha, sigma, a, b, c, d) per step, so that every solver runs the same fused update.

    x_next = a x0 + b eps + c x0_prev + d noise        (``dpfast.ops.guided_step``)

A table is computed once, in float64, from a diffusers scheduler, and reproduces that scheduler's ``step``. alpha and
sigma are the signal and noise scale of the step's input, x = alpha x0 + sigma eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("alpha", "sigma", "a", "b", "c", "d")


@dataclass(frozen=True)
class SolverTable:
    """``rows`` (steps, 6) float32 and ``timesteps`` (steps,) as the denoiser expects them."""

    rows: Tensor
    timesteps: Tensor
    initial_scale: float = 1.0  # the first input is this times unit noise

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> SolverTable:
        return SolverTable(self.rows.to(device), self.timesteps.to(device), self.initial_scale)


def _table(columns: list[Tensor], timesteps: Tensor) -> SolverTable:
    return SolverTable(torch.stack(columns, dim=1).float(), timesteps.clone())


def _no_thresholding(scheduler: Any) -> None:
    for option in ("thresholding", "use_karras_sigmas", "rescale_betas_zero_snr"):
        if scheduler.config.get(option):
            raise ValueError(f"scheduler option {option}=True has no table; set it to False")


def ddim_table(scheduler: Any, steps: int, *, eta: float = 0.0) -> SolverTable:
    """DDIM (Song et al. 2021, eq. 12) on the grid of a ``diffusers.DDIMScheduler``.

    s = eta sqrt((sigma'^2/sigma^2) (1 - alpha^2/alpha'^2));  a = alpha', b = sqrt(sigma'^2 - s^2), c = 0, d = s.

    Raises ``ValueError`` when ``steps`` is outside [1, num_train_timesteps] or eta outside [0, 1].
    """
    trained = scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise ValueError(f"steps = {steps}: expected between 1 and num_train_timesteps ({trained})")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: expected between 0 and 1")
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.long().cpu()
    previous = t - trained // steps
    cumulative = scheduler.alphas_cumprod.double()
    now = cumulative[t]
    then = torch.where(previous >= 0, cumulative[previous.clamp(min=0)], float(scheduler.final_alpha_cumprod))
    # at zero terminal SNR the input is pure noise and now is 0; the ratio stays finite
    variance = ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0)
    d = eta * variance.sqrt()
    b = (1 - then - d.square()).clamp(min=0).sqrt()
    return _table([now.sqrt(), (1 - now).sqrt(), then.sqrt(), b, torch.zeros_like(b), d], t)


def dpmpp_2m_table(scheduler: Any, steps: int) -> SolverTable:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) on the grid of a ``diffusers.DPMSolverMultistepScheduler``.

    With h = lambda' - lambda, lambda = log(alpha/sigma), r = h_prev/h and E = exp(-h) - 1 the update
    x' = (sigma'/sigma) x - alpha' E ((1 + 1/2r) x0 - (1/2r) x0_prev) has
    a = alpha sigma'/sigma - alpha' E (1 + 1/2r), b = sigma', c = alpha' E/2r, d = 0. The first step is of first order,
    and the last one where it ends at sigma' = 0.
    """
    _no_thresholding(scheduler)
    if scheduler.config.algorithm_type != "dpmsolver++" or scheduler.config.solver_order != 2:
        raise ValueError("expected algorithm_type='dpmsolver++' and solver_order=2")
    scheduler.set_timesteps(steps)
    ratio = scheduler.sigmas.double().cpu()
    alpha = (1 + ratio.square()).rsqrt()
    sigma = ratio * alpha
    now, then = slice(0, steps), slice(1, steps + 1)
    shrink = ratio[then] / ratio[now] - 1  # exp(-h) - 1
    log_ratio = -ratio.log()
    h = log_ratio[then] - log_ratio[now]
    slope = torch.zeros(steps, dtype=torch.float64)
    slope[1:] = 0.5 * h[1:] / h[:-1]
    slope[0] = 0.0
    if float(ratio[-1]) == 0 or (scheduler.config.lower_order_final and steps < 15):
        slope[-1] = 0.0
    a = alpha[now] * sigma[then] / sigma[now] - alpha[then] * shrink * (1 + slope)
    c = alpha[then] * shrink * slope
    return _table([alpha[now], sigma[now], a, sigma[then], c, torch.zeros_like(a)], scheduler.timesteps.cpu())


def flow_euler_table(scheduler: Any, steps: int, **options: Any) -> SolverTable:
    """Flow-matching Euler on the grid of a ``diffusers.FlowMatchEulerDiscreteScheduler``.

    alpha = 1 - sigma, a = 1 - sigma', b = sigma', c = d = 0. ``options`` go to the scheduler's ``set_timesteps``.
    """
    scheduler.set_timesteps(steps, **options)
    sigmas = scheduler.sigmas.double().cpu()
    now, then = sigmas[:-1], sigmas[1:]
    zero = torch.zeros_like(now)
    return _table([1 - now, now, 1 - then, then, zero, zero], scheduler.timesteps.cpu())
