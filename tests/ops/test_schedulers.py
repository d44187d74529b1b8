"""One step of `guided_step` with omega = 0 is one step of diffusers' own scheduler, for every step
of a grid.
"""

from __future__ import annotations

import pytest
import torch

from dpfast.ops import DynamicThreshold, dispatch, guided_step, normal
from tests.tolerances import SCHEDULER

diffusers = pytest.importorskip("diffusers", reason="the schedulers are diffusers' own")
schedule = pytest.importorskip("dpfast.generate.solver_tables")
pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED, reason="the kernels' variants have tests of their own"
)

SHAPE = (2, 4, 6, 6)
GRIDS = [10, 30, 50]
KINDS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def assert_step(actual, expected, row):
    """Rounding grows with the factors of the step: x0 from epsilon divides by alpha."""
    alpha, _, a = row[:3].tolist()
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=0, atol=SCHEDULER * max(1.0, a / max(alpha, 1e-9))
    )


@pytest.mark.parametrize(
    "clip", [None, 1.0, DynamicThreshold(0.9, 1.5)], ids=["free", "clip", "dynamic"]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", GRIDS)
def test_ddim(steps, kind, eta, clip, device):
    dynamic = isinstance(clip, DynamicThreshold)
    scheduler = diffusers.DDIMScheduler(
        prediction_type=kind,
        beta_schedule="scaled_linear",
        clip_sample=clip == 1.0,
        thresholding=dynamic,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=1.5,
    )
    table = schedule.ddim_table(scheduler, steps, eta=eta).to(torch.device(device))
    ids = torch.tensor([3, 2**36], device=device)
    for step, t in enumerate(scheduler.timesteps):
        x, pred = torch.randn(SHAPE), torch.randn(SHAPE)
        z = normal(ids, SHAPE[1:], seed=5, stream=step + 1)
        expected = scheduler.step(
            pred, t, x, eta=eta, variance_noise=z.cpu() if eta else None
        ).prev_sample
        x, pred = x.to(device), pred.to(device)
        actual = guided_step(
            x,
            pred,
            pred,
            torch.randn_like(x),
            table.rows,
            step,
            cfg_scale=3.0,
            omega=0.0,
            prediction=KINDS[kind],
            clip=table.clip,
            sample_ids=ids if eta else None,
            seed=5,
        )
        assert_step(actual, expected, table.rows[step])


@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_ddim_from_zero_terminal_snr(kind, spacing, alpha_one, device):
    """The first input may be pure noise (alpha = 0), and the last step may stop short of alpha
    = 1.
    """
    scheduler = diffusers.DDIMScheduler(
        prediction_type=kind,
        beta_schedule="scaled_linear",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing=spacing,
        steps_offset=1,
        set_alpha_to_one=alpha_one,
    )
    table = schedule.ddim_table(scheduler, 10).to(torch.device(device))
    assert (float(table.rows[0, 0]) == 0) == (spacing != "leading")
    assert (float(table.rows[-1, 2]) == 1) == alpha_one
    for step, t in enumerate(scheduler.timesteps):
        x, pred = torch.randn(SHAPE), torch.randn(SHAPE)
        expected = scheduler.step(pred, t, x).prev_sample
        actual = guided_step(
            x.to(device),
            pred.to(device),
            None,
            None,
            table.rows,
            step,
            cfg_scale=1.0,
            omega=0.0,
            prediction=KINDS[kind],
        )
        assert_step(actual, expected, x.new_ones(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}]
)
@pytest.mark.parametrize("steps", GRIDS)
def test_dpm_solver(steps, options, kind, device):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=kind,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        **options,
    )
    table = schedule.dpmpp_2m_table(scheduler, steps).to(torch.device(device))
    x0 = torch.zeros(SHAPE, device=device)
    for step, t in enumerate(scheduler.timesteps):
        x, pred, following = (
            torch.randn(SHAPE),
            torch.randn(SHAPE),
            torch.empty(SHAPE, device=device),
        )
        expected = scheduler.step(pred, t, x).prev_sample
        x, pred = x.to(device), pred.to(device)
        options = {"cfg_scale": 1.0, "omega": 0.0, "prediction": KINDS[kind]}
        actual = guided_step(
            x, pred, None, None, table.rows, step, x0_prev=x0, x0_out=following, **options
        )
        assert_step(
            actual,
            expected,
            torch.stack((table.rows[max(step - 1, 0), 0], x.new_zeros(()), x.new_ones(()))),
        )
        x0 = following


@pytest.mark.parametrize(
    "options", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}]
)
@pytest.mark.parametrize("steps", GRIDS)
def test_flow_matching(steps, options, device):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    table = schedule.flow_euler_table(scheduler, steps).to(torch.device(device))
    for step, t in enumerate(scheduler.timesteps):
        x, pred = torch.randn(SHAPE), torch.randn(SHAPE)
        expected = scheduler.step(pred, t, x).prev_sample
        x, pred = x.to(device), pred.to(device)
        actual = guided_step(
            x, pred, None, None, table.rows, step, cfg_scale=1.0, omega=0.0, prediction="flow"
        )
        assert_step(actual, expected, x.new_ones(3))
