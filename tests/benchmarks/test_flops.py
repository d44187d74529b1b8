"""FLOPs of a guided sample, of published models and of folders."""

import pytest

from benchmarks.systems import flops
from dpfast.config import Generator
from dpfast.planning.methods import Method, stable_diffusion_15


def test_a_named_model_is_counted_as_in_the_table():
    generator = Generator(pipeline="stable-diffusion-1.5", height=256, width=256)
    parts, method = flops.of_folder(generator, 4)
    known = stable_diffusion_15(256)
    for part in ("denoiser", "decoder", "tiny", "learner"):
        assert getattr(parts, part) == getattr(known, part)
    assert method == Method(steps=generator.steps)


def test_a_folder_whose_guidance_is_embedded_makes_one_prediction_a_step(flux_folder):
    generator = Generator(pipeline=str(flux_folder), steps=6, class_names=("dog",))
    parts, method = flops.of_folder(generator, 2)
    assert method.unguided(parts) == 6 * parts.denoiser.forward + parts.decoder.forward
    (row,) = flops.of_families([(parts, method)]).splitlines()[2:]
    assert row.startswith(f"| {flux_folder.name}, 1 x 256 x 256 | 6, 2 |")


def test_more_guided_steps_than_steps_are_refused(capsys):
    from benchmarks import run

    assert run.main(["flops", "--pipeline", "fashion", "--guided", "21"]) == 2
    assert "guided = 21: expected at most steps = 20" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["nowhere", ""])
def test_a_pipeline_that_is_not_there_is_one_line(wrong, capsys):
    from benchmarks import run

    assert run.main(["flops", "--pipeline", wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
