"""The time model over counted kernels: its arithmetic by hand, and what it derives beside what an
H200 has timed.
"""

from __future__ import annotations

import pytest

from benchmarks import ROOT
from benchmarks.systems import seconds
from benchmarks.systems.models import SETTINGS, TINY, USUAL
from benchmarks.systems.seconds import CUDNN, RATES, UNITS, Seconds
from dpfast.hardware.traffic import Kernel, Traffic


def product(rows: int, columns: int, depth: int, name: str = "addmm") -> Kernel:
    moved = 2 * (rows * depth + depth * columns + rows * columns)
    return Kernel(name, "product", moved, (rows, columns), 2 * rows * columns * depth, depth)


def test_a_product_takes_the_rounds_of_its_tiles_at_a_rate_that_grows_with_its_depth():
    whole = product(128 * UNITS, 256, 256)  # a tile for each multiprocessor
    assert seconds.filled(whole) == 1.0
    expected = whole.flops / (RATES.half * RATES.share / 2)
    assert RATES.seconds(whole) == pytest.approx(RATES.launch + expected)
    # one tile more is a round more
    more = product(128 * (UNITS + 1), 256, 256)
    assert seconds.filled(more) < 0.93
    image = Kernel("convolution", "product", 0, (UNITS, 256, 8, 16), 1, 2304)
    assert seconds.filled(image) == 1.0


def test_a_product_in_float8_has_the_published_rates():
    for depth, rate in ((512, 858e12), (1024, 1129e12), (2048, 1343e12)):
        large = product(128 * UNITS, 256 * 8, depth, "_scaled_mm")
        found = large.flops / (RATES.seconds(large) - RATES.launch) / RATES.share
        assert found == pytest.approx(rate, rel=0.01)


def test_an_attention_pays_for_whole_lanes():
    def attention(size: int, name: str = "attention") -> Kernel:
        return Kernel(name, "product", 0, (1, 1, 1, size), size * 10**12, size)

    within = RATES.seconds(attention(64)) - RATES.launch
    assert within == pytest.approx(64e12 / 321e12)
    assert RATES.seconds(attention(40)) == RATES.seconds(attention(64))
    backward = RATES.seconds(attention(64, "attention_backward")) - RATES.launch
    assert backward == pytest.approx(within / RATES.backward)
    assert CUDNN.seconds(attention(72)) < RATES.seconds(attention(72))


def test_what_is_no_product_takes_its_bytes_at_the_rate_of_its_kind():
    def rate(name: str, kind: str = "pointwise", *, own: bool = False) -> float:
        kernel = Kernel(name, kind, 10**9, (1,), own=own)
        return 1e9 / (RATES.seconds(kernel) - RATES.launch)

    assert rate("add") == pytest.approx(0.75 * 4.15e12)
    assert rate("group_norm", own=True) == pytest.approx(0.85 * 4.15e12)
    assert rate("clone", "layout") == pytest.approx(0.8e12)
    assert rate("convolution, cuDNN to NHWC", "layout") == pytest.approx(2.1e12)
    assert rate("convolution, bias") == pytest.approx(1.5e12)


def test_a_batch_is_its_steps_its_guided_ones_and_its_decoding():
    def of(milliseconds: int) -> Traffic:
        moved = round((milliseconds / 1e3 - RATES.launch) * RATES.torch * RATES.copy)
        return Traffic((Kernel("add", "pointwise", moved, (1,)),))

    names = {"step": 40, "half": 25, "prediction": 60, "tiny": 8, "learner": 7, "decoder": 90}
    parts = seconds.Batch(**{name: of(each) for name, each in names.items()})
    made = Seconds.of(parts, SETTINGS["dit-xl-2"])
    assert made.guidance == pytest.approx(0.010 + 0.035 + 0.008 + 0.007)
    assert made.unguided == pytest.approx(20 * 0.040 + 0.090)
    assert made.guided == pytest.approx(made.unguided + 4 * 0.060)


@pytest.mark.parametrize("form", ["(b)", "plain", "fused"])
def test_every_form_of_every_model_is_counted(form: str):
    for name in USUAL:
        parts = seconds.batch(TINY[name], form)
        assert all(traffic.launches > 0 for traffic in vars(parts).values())
        layout_copies = parts.step.layout_copies + parts.decoder.layout_copies
        assert (layout_copies == 0) == (form == "fused")


@pytest.fixture(scope="module")
def counted():
    return seconds.counted_batches()


def test_what_was_timed_is_derived_within_a_tenth(counted):
    """But for the guided batch of (b) with DiT, whose host launches 3,521 kernels a step."""
    for name in USUAL:
        setting = SETTINGS[name]
        for form, measured in seconds.timed(name).items():
            if form == "compiled blocks":
                derived = seconds.in_compiled_blocks(counted[name, "plain"], setting)
                assert derived == pytest.approx(measured["unguided"], rel=0.1)
                continue
            made = Seconds.of(counted[name, form], setting)
            assert made.unguided == pytest.approx(measured["unguided"], rel=0.1)
            slack = 0.2 if (name, form) == ("dit-xl-2", "(b)") else 0.1
            assert made.guided == pytest.approx(measured["guided"], rel=slack)


def test_the_documented_tables_are_those_of_the_model(counted):
    text = (ROOT / "docs" / "records" / "numerics.md").read_text(encoding="utf-8")
    for line in [*seconds.check(counted).splitlines(), *seconds.table(counted).splitlines()]:
        assert line in text
