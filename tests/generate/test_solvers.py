"""Solver tables against diffusers' schedulers, step by step with a fixed random prediction."""

from typing import get_args

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import (
    scheduling_euler_ancestral_discrete,
    scheduling_lcm,
    scheduling_tcd,
)

from dpfast.config import STOCHASTIC, SolverName
from dpfast.generate.solver_tables import (
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
from dpfast.generate.solvers import AUTO, FLOW_SOLVERS, SOLVERS
from dpfast.ops import DynamicThreshold, guided_step, normal

SHAPE = (3, 4, 8, 8)
KINDS = {"v_prediction": "v", "flow_prediction": "flow"}


IDS = torch.tensor([3, 0, 8])


def run(table, kind):
    """Our trajectory: the predictions are a function of the step alone, so errors do not feed
    back.
    """
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * table.initial_scale
    x0, states = torch.zeros(SHAPE), []
    for step in range(len(table)):
        x0_prev, x0 = x0, torch.empty(SHAPE)
        arguments = {"cfg_scale": 1.0, "omega": 0.0, "prediction": kind, "clip": table.clip}
        arguments |= {"x0_prev": x0_prev, "x0_out": x0} if table.needs_x0_prev else {}
        arguments |= {"sample_ids": IDS, "seed": 5} if table.needs_noise else {}
        x = guided_step(x, predictions(step), None, None, table.rows, step, **arguments)
        states.append(x)
    return torch.stack(states)


def run_diffusers(scheduler, **options):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    states = []
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predictions(step), t, x, return_dict=False, **options)[0]
        states.append(x)
    return torch.stack(states)


def predictions(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + step))


def assert_same(table, scheduler, kind=None, tolerance=1e-4, **options):
    kind = kind or scheduler.config.prediction_type
    assert torch.equal(table.timesteps, scheduler.timesteps)
    expected = run_diffusers(scheduler, **options)
    scale = expected.flatten(1).abs().amax(1).clamp(min=1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(
        run(table, KINDS.get(kind, kind)) / scale, expected / scale, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("steps", [1, 10, 15, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_betas_and_spacing(steps, kind, schedule, spacing):
    scheduler = DDIMScheduler(
        prediction_type=kind,
        beta_schedule=schedule,
        timestep_spacing=spacing,
        clip_sample=False,
        steps_offset=0,
    )
    assert_same(ddim_table(scheduler, steps), scheduler)


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize(
    ("kind", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", True)],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_ends_of_the_grid(steps, offset, alpha_one, kind, zero_snr, spacing):
    scheduler = DDIMScheduler(
        prediction_type=kind,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=offset,
        set_alpha_to_one=alpha_one,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing=spacing,
    )
    table = ddim_table(scheduler, steps)
    assert_same(table, scheduler)
    assert (float(table.rows[0, 0]) == 0) == (zero_snr and spacing != "leading")


@pytest.mark.parametrize(
    "options", [{"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True}]
)
def test_ddim_bounds_of_x0(options):
    scheduler = DDIMScheduler(
        **{"clip_sample": False, **options}, sample_max_value=1.5, dynamic_thresholding_ratio=0.9
    )
    table = ddim_table(scheduler, 10)
    assert table.clip == (DynamicThreshold(0.9, 1.5) if "thresholding" in options else 0.7)
    assert_same(table, scheduler)


def test_ddim_eta_row_has_the_variance_of_diffusers():
    scheduler = DDIMScheduler(clip_sample=False)
    table = ddim_table(scheduler, 20, eta=0.7)
    for step, t in enumerate(scheduler.timesteps):
        variance = scheduler._get_variance(int(t), int(t) - 50)
        assert float(table.rows[step, 5]) == pytest.approx(0.7 * float(variance) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_lu_lambdas": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("steps", [5, 14, 20])
def test_dpmpp_2m(steps, options):
    scheduler = DPMSolverMultistepScheduler(
        **{"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", **options}
    )
    assert_same(dpmpp_2m_table(scheduler, steps), scheduler, tolerance=2e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_dpmpp_2m_predictions(kind):
    scheduler = DPMSolverMultistepScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    assert_same(dpmpp_2m_table(scheduler, 20), scheduler)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"shift": 1.0}, {}),
        ({"shift": 3.0}, {}),
        ({"shift": 3.0, "shift_terminal": 0.02}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 0.8}),
        ({"shift": 2.0, "use_karras_sigmas": True}, {}),
        ({"shift": 2.0, "use_exponential_sigmas": True}, {}),
    ],
    ids=lambda value: ",".join(value),
)
@pytest.mark.parametrize("steps", [2, 12])
def test_flow_euler(steps, options, arguments):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    assert_same(flow_euler_table(scheduler, steps, **arguments), scheduler, "flow")


@pytest.mark.parametrize("steps", [2, 12, 20])
def test_dpmpp_2m_on_a_flow(steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    assert_same(flow_dpmpp_2m_table(scheduler, steps), scheduler, "flow")


@pytest.mark.parametrize("options", [{"shift": 1.0}, {"use_dynamic_shifting": True}])
def test_the_even_grid_of_flux(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    arguments = {"mu": 0.8} if options.get("use_dynamic_shifting") else {}
    table = flow_euler_table(scheduler, 4, even=True, **arguments)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **arguments)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert torch.equal(table.rows[:, 1], scheduler.sigmas[:-1])
    assert float(table.rows[-1, 1]) >= 0.25


@pytest.fixture
def same_noise(monkeypatch):
    """The schedulers of distilled models draw the noise of our steps."""
    stream = iter(range(1, 100))

    def drawn(shape, **_):
        return normal(IDS, shape[1:], seed=5, stream=next(stream))

    for module in (scheduling_lcm, scheduling_tcd, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", drawn)


def assert_same_in_ratio(table, scheduler):
    """As ``assert_same``, for a scheduler that keeps x / alpha: all states but the last are so."""
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    states = []
    for step, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(predictions(step), t, x, return_dict=False)[0]
        last = step == len(table) - 1
        states.append(x if last else x / (1 + scheduler.sigmas[step + 1] ** 2).sqrt())
    kind = KINDS.get(scheduler.config.prediction_type, scheduler.config.prediction_type)
    scale = torch.stack(states).flatten(1).abs().amax(1).clamp(min=1).view(-1, 1, 1, 1, 1)
    expected = torch.stack(states) / scale
    torch.testing.assert_close(run(table, kind) / scale, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (1, {"timestep_spacing": "trailing"}),
        (4, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        (7, {"timestep_spacing": "leading", "steps_offset": 1}),
        (7, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
        (7, {"timestep_spacing": "linspace", "prediction_type": "sample"}),
        (9, {"use_karras_sigmas": True}),
        (3, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
    ids=str,
)
def test_euler(steps, options):
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", **options)
    table = euler_table(scheduler, steps)
    whole = options.get("timestep_spacing") in ("leading", "trailing")
    assert table.timesteps.dtype == (torch.int64 if whole else torch.float32)
    assert_same_in_ratio(table, scheduler)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_ancestral(steps, spacing, kind, same_noise):
    scheduler = EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing=spacing, prediction_type=kind
    )
    table = euler_ancestral_table(scheduler, steps)
    assert table.needs_noise == (steps > 1)
    assert_same_in_ratio(table, scheduler)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"original_inference_steps": 20},
        {"timestep_scaling": 0.001},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_lcm(steps, kind, options, same_noise):
    """With a timestep_scaling of 0.001 the boundary condition keeps a good part of x."""
    scheduler = LCMScheduler(
        **{"beta_schedule": "scaled_linear", "prediction_type": kind, **options}
    )
    table = lcm_table(scheduler, steps)
    assert table.needs_noise == (steps > 1)
    assert (float(table.rows[0, 3]) > 1e-3) == ("timestep_scaling" in options)
    assert_same(table, scheduler)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_tcd(steps, eta, kind, same_noise):
    scheduler = TCDScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    table = tcd_table(scheduler, steps, eta=eta)
    assert table.needs_noise == (eta > 0 and steps > 1)
    assert_same(table, scheduler, eta=eta)


def test_a_table_says_what_its_steps_need():
    """A solver of one step wants neither x0_prev nor noise; the sampler leaves out what is not
    needed.
    """
    plain, noisy = (ddim_table(DDIMScheduler(), 5, eta=eta) for eta in (0.0, 0.5))
    multistep = dpmpp_2m_table(DPMSolverMultistepScheduler(), 5)
    assert (plain.needs_x0_prev, plain.needs_noise) == (False, False)
    assert (noisy.needs_x0_prev, noisy.needs_noise) == (False, True)
    assert (multistep.needs_x0_prev, multistep.needs_noise) == (True, False)
    assert not dpmpp_2m_table(DPMSolverMultistepScheduler(), 1).needs_x0_prev
    moved = plain.to("meta")
    assert moved.rows.is_meta
    assert moved.timesteps.is_meta
    assert (moved.initial_scale, moved.clip) == (1.0, 1.0)
    assert SolverTable(plain.rows, plain.timesteps, 2.0).clip is None


DPM, FLOW = DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:diffusers")
@pytest.mark.parametrize(
    ("build", "scheduler", "steps", "named"),
    [
        (ddim_table, DDIMScheduler(), 0, "steps = 0: expected between 1 and 1000"),
        (ddim_table, DDIMScheduler(), 2000, "steps = 2000"),
        (lambda s, n: ddim_table(s, n, eta=2.0), DDIMScheduler(), 10, "eta = 2.0"),
        (
            ddim_table,
            DDIMScheduler(steps_offset=1),
            1000,
            "steps_offset = 1 the grid starts at timestep 1000",
        ),
        (
            ddim_table,
            DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            9,
            "zero_snr.*epsilon",
        ),
        (
            ddim_table,
            DDIMScheduler(thresholding=True, sample_max_value=0.5),
            9,
            "sample_max_value = 0.5",
        ),
        (dpmpp_2m_table, DPM(), 1000, "steps = 1000: expected between 1 and 999"),
        (dpmpp_2m_table, DPM(thresholding=True), 9, "thresholding = True"),
        (dpmpp_2m_table, DPM(use_flow_sigmas=True), 9, "use_flow_sigmas = True"),
        (dpmpp_2m_table, DPM(solver_order=3), 9, "solver_order = 3: expected 2"),
        (dpmpp_2m_table, DPM(solver_type="heun"), 9, "solver_type = 'heun'"),
        (
            dpmpp_2m_table,
            DPM(algorithm_type="sde-dpmsolver++"),
            9,
            "algorithm_type = 'sde-dpmsolver",
        ),
        (lcm_table, LCMScheduler(), 51, "steps = 51: expected between 1 and 50"),
        (lcm_table, LCMScheduler(clip_sample=True), 4, "clip_sample = True"),
        (lcm_table, LCMScheduler(thresholding=True), 4, "thresholding = True"),
        (lcm_table, LCMScheduler(rescale_betas_zero_snr=True), 4, "zero_snr.*epsilon"),
        (tcd_table, TCDScheduler(), 0, "steps = 0"),
        (lambda s, n: tcd_table(s, n, eta=2.0), TCDScheduler(), 4, "eta = 2.0"),
        (flow_euler_table, FLOW(), 0, "steps = 0"),
        (
            flow_euler_table,
            FLOW(shift_terminal=0.02),
            1,
            "steps = 1: the scheduler's grid has no finite",
        ),
        (flow_euler_table, FLOW(invert_sigmas=True), 9, "invert_sigmas = True"),
        (flow_euler_table, FLOW(stochastic_sampling=True), 9, "stochastic_sampling = True"),
    ],
)
def test_what_has_no_table_is_refused(build, scheduler, steps, named):
    with pytest.raises(ValueError, match=named):
        build(scheduler, steps)


def test_steps_must_be_an_integer():
    with pytest.raises(TypeError, match="steps must be an integer, got float"):
        ddim_table(DDIMScheduler(), 10.0)


def test_a_recipe_names_the_solvers_that_there_are():
    assert get_args(SolverName) == ("auto", *SOLVERS)
    assert tuple(name for name, about in SOLVERS.items() if "eta" in about.takes) == STOCHASTIC


def test_auto_is_one_solver_for_each_scheduler_of_a_folder():
    known = (*SOLVERS.values(), *FLOW_SOLVERS.values())
    folders = [name for about in known for name in about.folders]
    assert len(folders) == len(set(folders)) == len(AUTO)
    assert all(hasattr(diffusers, about.scheduler) for about in known)
    assert FLOW_SOLVERS.keys() < SOLVERS.keys()
