"""Solver tables against diffusers' schedulers, step by step with a fixed random prediction."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dpfast.generate.schedule import ddim_table, dpmpp_2m_table, flow_euler_table
from dpfast.ops import guided_step

SHAPE = (3, 4, 8, 8)


def run(table, prediction_of, kind):
    """Our trajectory: the predictions are a function of the step alone, so errors do not feed back."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * table.initial_scale
    x0, states = torch.zeros(SHAPE), []
    for step in range(len(table)):
        x0_prev, x0 = x0, torch.empty(SHAPE)
        prediction = prediction_of(step)
        arguments = {"cfg_scale": 1.0, "omega": 0.0, "prediction": kind, "x0_prev": x0_prev, "x0_out": x0}
        x = guided_step(x, prediction, None, None, table.rows, step, **arguments)
        states.append(x)
    return torch.stack(states)


def run_diffusers(scheduler, steps, prediction_of):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * float(
        getattr(scheduler, "init_noise_sigma", 1.0)
    )
    states = []
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(prediction_of(step), t, x, return_dict=False)[0]
        states.append(x)
    return torch.stack(states)


def predictions(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("steps", [1, 10, 15, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_matches_diffusers(steps, kind, schedule, spacing):
    scheduler = DDIMScheduler(
        prediction_type=kind, beta_schedule=schedule, timestep_spacing=spacing, clip_sample=False, steps_offset=0
    )
    table = ddim_table(scheduler, steps)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    got = run(table, predictions, "v" if kind == "v_prediction" else kind)
    # x0 from epsilon divides by alpha, down to 5e-5 at the cosine schedule's end
    torch.testing.assert_close(got, run_diffusers(scheduler, steps, predictions), rtol=1e-4, atol=1e-4)


def test_ddim_eta_row_has_the_variance_of_diffusers():
    scheduler = DDIMScheduler(clip_sample=False)
    table = ddim_table(scheduler, 20, eta=0.7)
    for step, t in enumerate(scheduler.timesteps):
        variance = scheduler._get_variance(int(t), int(t) - 50)
        assert float(table.rows[step, 5]) == pytest.approx(0.7 * float(variance) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpmpp_2m_matches_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    table = dpmpp_2m_table(scheduler, steps)
    got = run(table, predictions, "v")
    torch.testing.assert_close(got, run_diffusers(scheduler, steps, predictions), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_matches_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    table = flow_euler_table(scheduler, 12)
    got = run(table, predictions, "flow")
    torch.testing.assert_close(got, run_diffusers(scheduler, 12, predictions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "eta", "named"), [(0, 0.0, "steps = 0"), (2000, 0.0, "steps = 2000"), (10, 2.0, "eta = 2.0")]
)
def test_ddim_refuses_what_has_no_grid(steps, eta, named):
    with pytest.raises(ValueError, match=named):
        ddim_table(DDIMScheduler(), steps, eta=eta)
