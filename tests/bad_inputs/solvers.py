"""Schedulers' configurations with a mistake."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

from dpfast.generate.solvers import is_flow, load_scheduler, solver_table
from tests.bad_inputs.case import NEVER, Case, generated, listed

STEPS = 7


def _write(folder: Path, data: bytes | str) -> None:
    (folder / "scheduler").mkdir()
    raw = data if isinstance(data, bytes) else data.encode()
    (folder / "scheduler" / "scheduler_config.json").write_bytes(raw)


def _table(folder: Path) -> Any:
    """(steps,) timesteps and whether all rows are finite."""
    table = solver_table(load_scheduler(folder, latent=True), STEPS, image_tokens=1024)
    return table.timesteps.double().numpy(), bool(table.rows.isfinite().all())


WRONG = {  # what diffusers takes without a word
    "clip_sample_range": lambda x: not isinstance(x, float) or not x > 0,
    "dynamic_thresholding_ratio": lambda x: x > 1,
}


def _case(folder: Path, config: dict[str, Any], *named: str, valid: bool = False) -> Case:
    """Right is the grid of diffusers' own scheduler, where it has one that is finite."""
    _write(folder, json.dumps(config))
    right: Any = NEVER
    try:
        kind = getattr(diffusers, config["_class_name"])
        own = kind.from_config(config)
        reference = own if is_flow(own) else diffusers.DDIMScheduler.from_config(own.config)
        options = {}
        if config.get("use_dynamic_shifting"):
            options["mu"] = _mu(own.config)
        reference.set_timesteps(STEPS, **options)
        grid = reference.timesteps.double().numpy()
        levels = reference.sigmas if is_flow(own) else reference.alphas_cumprod
        falling = bool((np.diff(grid) < 0).all()) and bool((grid >= 0).all())
        if falling and bool(levels.isfinite().all()) and bool((levels >= 0).all()):
            right = (grid, True)
    except Exception:  # what diffusers cannot read either
        right = NEVER
    if any(WRONG[name](config[name]) for name in WRONG.keys() & config.keys()):
        right = NEVER
    return Case(
        lambda: _table(folder),
        (folder.name, "scheduler", "steps", *named),
        right,
        valid=valid,
        near=1e-3,
    )


def _mu(config: Any) -> float:
    """Black Forest Labs' shift by image tokens."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return float(1024 * slope + config.base_shift - slope * low)


def config_text(data: bytes | str, random: random.Random, folder: Path) -> Case:
    _write(folder, data)
    return Case(lambda: _table(folder), ("scheduler",))


listed(
    "solvers",
    {
        "empty": "",
        "torn": '{"_class_name": "DDIMSch',
        "list": "[1]",
        "null": "null",
        "text": '"DDIMScheduler"',
        "without-class": "{}",
        "class-of-null": '{"_class_name": null}',
        "class-as-list": '{"_class_name": ["DDIMScheduler"]}',
        "unknown-class": '{"_class_name": "MyScheduler"}',
        "class-that-is-none": '{"_class_name": "UNet2DModel"}',
        "utf-16": '{"_class_name": "DDIMScheduler"}'.encode("utf-16"),
        "latin-1": '{"_class_name": "DDIMScheduler", "n": "\xe9"}'.encode("latin-1"),
        "deep": "[" * 100_000,
    },
    config_text,
)


def option(given: dict[str, Any], random: random.Random, folder: Path) -> Case:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"} | given
    return _case(folder, config, *given)


listed(
    "solvers",
    {
        "plain": {},
        "beta-start-nan": {"beta_start": math.nan},
        "beta-end-infinite": {"beta_end": math.inf},
        "beta-end-above-one": {"beta_end": 1.5},
        "beta-start-negative": {"beta_start": -0.1},
        "beta-start-text": {"beta_start": "0.1"},
        "beta-schedule-unknown": {"beta_schedule": "wavy"},
        "trained-betas-short": {"trained_betas": [0.1, 0.2, 0.3]},
        "trained-betas-text": {"trained_betas": ["a"]},
        "trained-betas-empty": {"trained_betas": []},
        "no-timesteps": {"num_train_timesteps": 0},
        "few-timesteps": {"num_train_timesteps": 5},
        "negative-timesteps": {"num_train_timesteps": -10},
        "fraction-of-timesteps": {"num_train_timesteps": 10.5},
        "text-timesteps": {"num_train_timesteps": "1000"},
        "endless-timesteps": {"num_train_timesteps": 10**12},
        "prediction-unknown": {"prediction_type": "noise"},
        "prediction-null": {"prediction_type": None},
        "prediction-list": {"prediction_type": ["epsilon"]},
        "spacing-unknown": {"timestep_spacing": "dense"},
        "spacing-null": {"timestep_spacing": None},
        "offset-negative": {"steps_offset": -1},
        "offset-huge": {"steps_offset": 10**6},
        "offset-text": {"steps_offset": "1"},
        "clip-range-nan": {"clip_sample": True, "clip_sample_range": math.nan},
        "clip-range-negative": {"clip_sample": True, "clip_sample_range": -1.0},
        "clip-range-text": {"clip_sample": True, "clip_sample_range": "1"},
        "thresholding-ratio": {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
        "zero-snr-epsilon": {"rescale_betas_zero_snr": True},
        "unknown-option": {"wavelets": True},
    },
    option,
)


def flow(given: dict[str, Any], random: random.Random, folder: Path) -> Case:
    return _case(folder, {"_class_name": "FlowMatchEulerDiscreteScheduler"} | given, *given)


listed(
    "solvers",
    {
        "plain": {"shift": 3.0},
        "dynamic": {"use_dynamic_shifting": True},
        "dynamic-linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        "dynamic-unknown": {"use_dynamic_shifting": True, "time_shift_type": "wavy"},
        "dynamic-one-length": {
            "use_dynamic_shifting": True,
            "base_image_seq_len": 256,
            "max_image_seq_len": 256,
        },
        "shift-zero": {"shift": 0.0},
        "shift-negative": {"shift": -1.0},
        "shift-nan": {"shift": math.nan},
        "shift-infinite": {"shift": math.inf},
        "shift-text": {"shift": "3"},
        "shift-null": {"shift": None},
        "terminal-nan": {"shift_terminal": math.nan},
        "terminal-two": {"shift_terminal": 2.0},
        "karras": {"use_karras_sigmas": True},
        "stochastic": {"stochastic_sampling": True},
        "invert": {"invert_sigmas": True},
        "no-timesteps": {"num_train_timesteps": 0},
    },
    flow,
)


@generated(20)
def several_options(random: random.Random, folder: Path) -> Case:
    """Options of chance: the grid is diffusers' own, or refused."""
    choices: dict[str, list[Any]] = {
        "_class_name": [
            "DDIMScheduler",
            "PNDMScheduler",
            "DDPMScheduler",
            "EulerDiscreteScheduler",
        ],
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
        "beta_end": [0.012, 0.02, 0.5, 1.0, 0.0],
        "timestep_spacing": ["leading", "trailing", "linspace", "other"],
        "num_train_timesteps": [1000, 100, 7, 3],
        "prediction_type": ["epsilon", "v_prediction", "sample", "flow"],
        "steps_offset": [0, 1, 50],
    }
    return _case(folder, {key: random.choice(values) for key, values in choices.items()})
