"""A folder's scheduler to a table: what every scheduler class of diffusers becomes, and what is
refused.
"""

import inspect
import json
import logging
import subprocess
import sys

import diffusers
import pytest
import torch

from dpfast.errors import InputError
from dpfast.generate.solvers import (
    AUTO,
    SOLVERS,
    TRAILING,
    load_scheduler,
    prediction_of,
    solver_table,
)
from tests.generate.test_solvers import assert_same

DISTILLED = {name: AUTO[name] for name in ("LCMScheduler", "TCDScheduler")}
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


@pytest.fixture
def save(tmp_path):
    """Writes a scheduler of a class and options as a part of a pipeline folder, and returns the
    folder.
    """

    def write(name, **options):
        scheduler = getattr(diffusers, name)(**options)
        scheduler.save_pretrained(tmp_path / "scheduler")
        return tmp_path

    return write


@pytest.mark.parametrize("name", SOLVERS["ddim"].folders)
def test_every_scheduler_over_betas(name, save):
    """Loaded from disk, each gives the DDIM and the DPM-Solver++ that diffusers' ``from_config``
    gives.
    """
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    folder = save(name, **{option: value for option, value in SETTINGS.items() if option in known})
    loaded = load_scheduler(folder, latent=False)
    own = getattr(diffusers, name).from_pretrained(folder / "scheduler")
    assert prediction_of(loaded) == "v"
    for solver, kind in (
        ("ddim", diffusers.DDIMScheduler),
        ("dpmpp2m", diffusers.DPMSolverMultistepScheduler),
    ):
        options = (
            {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
            if solver == "dpmpp2m"
            else {}
        )
        reference = kind.from_config(own.config, **options)
        reference.set_timesteps(10)
        table = solver_table(loaded, 10, solver=solver)
        assert_same(table, reference)
        # alpha grows towards the image
        assert torch.equal(table.rows[:, 0], table.rows[:, 0].sort().values)
    own_solver = TRAILING.get(name, "ddim")
    assert (own_solver == "ddim") != name.startswith("Euler")
    of_own = solver_table(loaded, 10, solver=own_solver)
    assert torch.equal(solver_table(loaded, 10).rows, of_own.rows)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_eulers_schedulers_are_ddim_unless_their_timesteps_trail(name, save):
    loaded = load_scheduler(save(name, timestep_spacing="leading"), latent=True)
    assert torch.equal(solver_table(loaded, 4).rows, solver_table(loaded, 4, solver="ddim").rows)
    trailing = load_scheduler(save(name, timestep_spacing="trailing"), latent=True)
    assert solver_table(trailing, 4).needs_noise == ("Ancestral" in name)
    assert type(trailing).__name__ == name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNDMScheduler", {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        (
            "DDPMScheduler",
            {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.0},
        ),
        (
            "DDIMScheduler",
            {"trained_betas": [0.001 + 0.0005 * i for i in range(40)], "num_train_timesteps": 40},
        ),
    ],
    ids=["offset-alpha", "zero-snr", "thresholding", "trained-betas"],
)
def test_options_reach_the_table(name, options, save):
    folder = save(name, **options)
    reference = diffusers.DDIMScheduler.from_config(
        getattr(diffusers, name).from_pretrained(folder / "scheduler").config
    )
    reference.set_timesteps(8)
    assert_same(solver_table(load_scheduler(folder, latent=False), 8), reference)


def test_latents_are_bounded_only_where_the_folder_says_so(save):
    """DDIMScheduler bounds x0 by default; the PNDM scheduler of a latent model knows no such
    option.
    """
    assert solver_table(load_scheduler(save("PNDMScheduler"), latent=True), 5).clip is None
    assert solver_table(load_scheduler(save("PNDMScheduler"), latent=False), 5).clip == 1.0
    bounded = load_scheduler(
        save("DDIMScheduler", clip_sample=True, clip_sample_range=3.0), latent=True
    )
    assert solver_table(bounded, 5).clip == 3.0
    # as in diffusers, whose solver has no such option
    assert solver_table(bounded, 5, solver="dpmpp2m").clip is None
    off = load_scheduler(save("DDIMScheduler", clip_sample=True), latent=True, clip_sample=False)
    assert solver_table(off, 5).clip is None


def test_a_table_leaves_the_scheduler_alone(save):
    scheduler = load_scheduler(save("DDIMScheduler"), latent=False)
    before = scheduler.timesteps.clone()
    first = solver_table(scheduler, 7, eta=0.3)
    solver_table(scheduler, 11, solver="dpmpp2m")
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(solver_table(scheduler, 7, eta=0.3).rows, first.rows)


def _set(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler


def test_the_dynamic_shift_follows_the_length_of_the_image_sequence(save):
    folder = save(
        "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    scheduler = load_scheduler(folder, latent=True)
    assert prediction_of(scheduler) == "flow"
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        reference = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        reference.set_timesteps(6, mu=mu)
        torch.testing.assert_close(
            solver_table(scheduler, 6, image_tokens=tokens).timesteps, reference.timesteps
        )


@pytest.mark.parametrize("base_shift", [0.5, 256 * 1.15 / 4096], ids=["above", "zero"])
def test_a_linear_shift_is_the_grid_of_diffusers(base_shift, save):
    """Also where it would be 0 for an image without tokens, for which a grid is not defined."""
    folder = save(
        "FlowMatchEulerDiscreteScheduler",
        use_dynamic_shifting=True,
        time_shift_type="linear",
        base_shift=base_shift,
        max_shift=1.15,
    )
    scheduler = load_scheduler(folder, latent=True)
    for tokens, mu in ((256, base_shift), (4096, 1.15), (2176, (base_shift + 1.15) / 2)):
        reference = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        reference.set_timesteps(20, mu=mu)
        table = solver_table(scheduler, 20, image_tokens=tokens)
        torch.testing.assert_close(table.timesteps, reference.timesteps)
        torch.testing.assert_close(table.rows[:, 1], reference.sigmas[:-1])
        torch.testing.assert_close(table.rows[:, 3], reference.sigmas[1:])


def test_a_linear_shift_below_zero_is_refused_by_its_name(save):
    folder = save(
        "FlowMatchEulerDiscreteScheduler",
        use_dynamic_shifting=True,
        time_shift_type="linear",
        base_shift=0.02,
    )
    scheduler = load_scheduler(folder, latent=True)
    assert len(solver_table(scheduler, 6, image_tokens=256)) == 6
    with pytest.raises(InputError, match=r"time_shift_type = 'linear': .* for images of 16 tokens"):
        solver_table(scheduler, 6, image_tokens=16)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("LCMScheduler", "original_inference_steps", None),
        ("LCMScheduler", "timestep_scaling", None),
        ("TCDScheduler", "trained_betas", 0.1),
        ("DPMSolverMultistepScheduler", "final_sigmas_type", "last"),
        ("DDIMScheduler", "sample_max_value", None),
    ],
)
def test_an_option_of_another_kind_is_refused_by_its_name(name, option, value, save):
    path = save(name) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, option: value}), encoding="utf-8")
    with pytest.raises(InputError, match=f"scheduler option {option} = {value!r}: expected"):
        load_scheduler(path.parent.parent, latent=True)


def test_a_distilled_grid_longer_than_the_trained_one_is_refused(save):
    folder = save("DDIMScheduler", num_train_timesteps=40, clip_sample=False)
    scheduler = load_scheduler(folder, latent=True)
    for solver in ("lcm", "tcd"):
        with pytest.raises(InputError, match="original_inference_steps = 50: expected at most"):
            solver_table(scheduler, 4, solver=solver)


@pytest.mark.parametrize(
    ("name", "options", "arguments", "named"),
    [
        (
            "DDIMScheduler",
            {},
            {"solver": "heun"},
            "solver = 'heun': expected one of auto, ddim, dpmpp2m, euler",
        ),
        (
            "DDIMScheduler",
            {},
            {"solver": "euler_ancestral", "eta": 1.0},
            "eta = 1.0: only 'ddim' and 'tcd'",
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            {},
            {"solver": "ddim"},
            "'ddim': the pipeline's scheduler takes 'auto' or 'euler' or 'dpmpp2m'",
        ),
        (
            "DDIMScheduler",
            {},
            {"solver": "dpmpp2m", "eta": 0.5},
            "eta = 0.5: only 'ddim' and 'tcd'",
        ),
        ("FlowMatchEulerDiscreteScheduler", {}, {"eta": 0.5}, "eta = 0.5"),
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True},
            {},
            "use_karras_sigmas = True.*use solver = 'dpmpp2m'",
        ),
        ("DDPMScheduler", {"thresholding": True}, {"solver": "dpmpp2m"}, "thresholding = True"),
    ],
)
def test_what_a_solver_cannot_do_is_refused(name, options, arguments, named, save):
    scheduler = load_scheduler(save(name, **options), latent=False)
    with pytest.raises(ValueError, match=named):
        solver_table(scheduler, 10, **arguments)


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_model_samples_as_it_was_distilled(name, save):
    loaded = load_scheduler(save(name, **SETTINGS | {"original_inference_steps": 20}), latent=True)
    reference = getattr(diffusers, name)(**SETTINGS | {"original_inference_steps": 20})
    reference.set_timesteps(4)
    table = solver_table(loaded, 4)
    assert torch.equal(table.timesteps, reference.timesteps)
    assert torch.equal(table.rows, solver_table(loaded, 4, solver=DISTILLED[name]).rows)
    assert_same(
        solver_table(loaded, 4, solver="ddim"),
        _set(diffusers.DDIMScheduler(**SETTINGS, clip_sample=False), 4),
    )
    undistilled = load_scheduler(save("DDIMScheduler", clip_sample=False), latent=True)
    assert solver_table(undistilled, 4, solver=DISTILLED[name]).timesteps.tolist() == [
        999,
        759,
        499,
        259,
    ]


def test_karras_grids_of_a_folder_reach_dpm_solver(save):
    scheduler = load_scheduler(save("EulerDiscreteScheduler", use_karras_sigmas=True), latent=True)
    reference = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    reference.set_timesteps(10)
    assert_same(solver_table(scheduler, 10, solver="dpmpp2m"), reference)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def test_both_solvers_of_a_flow_run_on_the_shift_of_either_scheduler(save):
    """SANA's folders have the one, Stable Diffusion 3 and FLUX the other."""
    kinds = {
        "DPMSolverMultistepScheduler": {**FLOW, "flow_shift": 3.0},
        "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    }
    of_dpm, of_euler = (
        load_scheduler(save(name, **options), latent=True) for name, options in kinds.items()
    )
    assert prediction_of(of_dpm) == prediction_of(of_euler) == "flow"
    for solver, auto in (("dpmpp2m", of_dpm), ("euler", of_euler)):
        tables = [solver_table(each, 9, solver=solver) for each in (of_dpm, of_euler)]
        assert torch.equal(tables[0].rows, tables[1].rows)
        assert torch.equal(solver_table(auto, 9).rows, tables[0].rows)
    folder = save("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    moving = load_scheduler(folder, latent=True)
    with pytest.raises(InputError, match="use_dynamic_shifting = True: DPM-Solver"):
        solver_table(moving, 9, solver="dpmpp2m")


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        (
            "SASolverScheduler",
            {},
            "scheduler SASolverScheduler: expected one of DDIMScheduler",
        ),
        ("EDMEulerScheduler", {}, "scheduler EDMEulerScheduler"),
        (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            "prediction_type = 'flow_prediction'",
        ),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True},
            "use_flow_sigmas = True has no solver here",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True},
            "prediction_type = 'epsilon': expected 'flow_prediction' on a flow",
        ),
        (
            "DPMSolverMultistepScheduler",
            {**FLOW, "use_karras_sigmas": True},
            "use_karras_sigmas = True: DPM-Solver.. 2M has no table for it on a flow",
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            "timestep_type = 'continuous' has no solver",
        ),
        (
            "DDPMScheduler",
            {"beta_schedule": "sigmoid"},
            "its scheduler cannot be read: sigmoid is not implemented",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas = True"),
    ],
)
def test_what_no_solver_stands_for_is_refused_at_load(name, options, named, save):
    with pytest.raises(InputError, match=named):
        load_scheduler(save(name, **options), latent=True)


def test_a_scheduler_that_cannot_be_read_is_refused(save):
    path = save("DDIMScheduler") / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps(
            {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": "low"}
        )
    )
    with pytest.raises(InputError, match="its scheduler cannot be read"):
        load_scheduler(path.parent.parent, latent=True)
    path.write_text("{")
    with pytest.raises(InputError, match="its scheduler cannot be read"):
        load_scheduler(path.parent.parent, latent=True)
    path.unlink()
    with pytest.raises(InputError, match=r"no scheduler_config\.json"):
        load_scheduler(path.parent.parent, latent=True)


def test_nothing_reaches_the_terminal_that_its_user_cannot_mend(tmp_path):
    """Notices of NumPy and of diffusers on how a scheduler is made into another one's table."""
    for name in SOLVERS["ddim"].folders:
        getattr(diffusers, name)().save_pretrained(tmp_path / name / "scheduler")
    code = """
import sys
from pathlib import Path
from dpfast.errors import InputError
from dpfast.generate.solvers import SOLVERS, load_scheduler, solver_table
made = 0
for folder in Path(sys.argv[1]).iterdir():
    scheduler = load_scheduler(folder, latent=True)
    for solver in SOLVERS:
        try:
            solver_table(scheduler, 4, solver=solver)
            made += 1
        except InputError:
            pass
print(made)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert int(done.stdout) > 2 * len(SOLVERS["ddim"].folders)


def test_a_folder_that_says_what_its_scheduler_does_not_know_is_told_of(save, caplog, monkeypatch):
    """What diffusers says of the folder itself is for its owner."""
    folder = save("DDIMScheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_strat": 0.1}))
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    load_scheduler(folder, latent=True)
    assert "beta_strat" in caplog.text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "scheduler None: expected one of"),
        ({"_class_name": ["DDIMScheduler"]}, r"scheduler \['DDIMScheduler'\]: expected one of"),
        ({"steps_offset": -1}, "steps_offset = -1: expected a whole number of at least 0"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000': expected a whole number"),
        ({"timestep_spacing": "dense"}, "timestep_spacing = 'dense': expected one of leading"),
        ({"trained_betas": [0.1, 0.2]}, "has 2 betas between 0.1 and 0.2, expected 1000"),
        ({"beta_end": 1.5}, "between 0.0001 and 1.5, expected 1000 between 0 and 1"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type = \['epsilon'\]: expected one of"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range = -1.0: expected a"),
        ({"num_train_timesteps": 10**15}, "its scheduler cannot be read"),
    ],
)
def test_what_diffusers_takes_and_no_grid_can_be_made_with_is_refused_in_one_line(
    config, said, save
):
    path = save("DDIMScheduler") / "scheduler" / "scheduler_config.json"
    named = {"_class_name": "DDIMScheduler"} | config if config else config
    path.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        load_scheduler(path.parent.parent, latent=True)
    assert len(str(caught.value).splitlines()) == 1
