from __future__ import annotations

from dataclasses import replace

import pytest

from dpfast.ops import dispatch
from dpfast.ops.audit import (
    CAPABILITIES,
    Variant,
    _widths,
    audit,
    group_norm_variant,
    guided_variant,
    inspect,
    occupancy,
    problems,
    table,
    variants,
)
from dpfast.ops.triton_stub import tl, triton

pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED or not dispatch.has_triton(),
    reason="the compiler needs Triton outside its interpreter",
)
VARIANTS = variants()
ON_EVERY_GPU = [
    "entropy, K = 1000, bf16",
    "entropy, K = 128256, fp32",
    "guided_step, CFG, relative, n = 16384, fp32",
    "guided_step, every term, clip, n = 16384, fp32",
    "guided_step, dynamic threshold, every term, n = 16384, fp32",
    "guided_step, CFG, relative, anchor, n = 8192, fp32",
    "guided_step, CFG, relative, anchor, n = 16384, fp32",
    "guided_step, CFG, relative, anchor, n = 16384, bf16",
    "guided_step, every term, anchor, n = 16384, fp32",
    "guided_step, dynamic threshold, every term, anchor, n = 16384, fp32",
    "gather, NCHW, fp32",
    "normal",
    "geglu, backward, C = 1280, bf16",
    "bias_residual, C = 320, bf16",
    "relu_chain, backward, residual, bf16",
    "gate_norm_modulate, DiT, between, D = 1152, bf16",
    "gate_norm_modulate, DiT, between, float8, D = 1152, bf16",
    "gate_norm_modulate, DiT, backward, D = 1152, bf16",
    "quantise, gelu, D = 4608, bf16",
    "group_norm, moments, C = 320, 4096 px, bf16",
    "group_norm, apply, C = 1280 + 640, 256 px, bf16",
    "group_norm, backward sums, C = 320, 4096 px, bf16",
    "group_norm, backward, C = 1280 + 640, 256 px, bf16",
    "group_norm, backward, residual, C = 1280 + 640, 256 px, bf16",
    "group_norm, backward coefficients, groups of 4, 2048 parts",
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_kernels_keep_their_promises_on_h100(variant):
    assert problems(inspect(variant, 90)) == []


@pytest.mark.parametrize(
    "capability", [capability for capability in CAPABILITIES if capability != 90]
)
@pytest.mark.parametrize("name", ON_EVERY_GPU)
def test_kernels_keep_their_promises_on_others(name, capability):
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    # an A100 has no float8, and no report of what writes it
    assert [problems(report) for report in audit([variant], [capability])] == [[]] * (
        capability >= variant.least
    )


def test_float8_is_written_from_hopper_on():
    assert {v.name for v in VARIANTS if v.least > 80} == {
        "gate_norm_modulate, DiT, first, float8, D = 1152, bf16",
        "gate_norm_modulate, DiT, between, float8, D = 1152, bf16",
        "quantise, D = 1152, bf16",
        "quantise, gelu, D = 4608, bf16",
    }


@pytest.mark.parametrize("anchor", [{}, {"anchor": "*fp32"}], ids=["", "anchor"])
def test_16_bit_samples_with_a_quantile_and_noise_do_not_spill(anchor):
    """Its accesses of 8 bytes cannot be told from those of ids and seeds, so the table has no such
    row.
    """
    terms = {"x0_prev": "*bf16", "x0_out": "*bf16", "ids": "*i64", "skipped": "*i64", **anchor}
    variant = guided_variant("", 16384, "bf16", LIMIT=2, PREDICTION=0, **terms)
    assert (variant.width, inspect(variant, 90).local_bytes) == (8, 0)


def test_an_anchor_reads_predictions_twice_only_where_registers_do_not_suffice():
    """4 tensors of 8,192 elements are held; of 16,384, in fp32 all of a multiprocessor's registers,
    the predictions come twice, and every other tensor once.
    """
    anchor = {"anchor": "*fp32"}
    once, twice = (guided_variant("", elements, **anchor) for elements in (8192, 16384))
    assert (once.reads, twice.reads) == (4 * 4 * 8192, 6 * 4 * 16384)
    held = guided_variant("", 16384, **anchor, HOLD=True)
    assert any("local memory" in problem for problem in problems(inspect(held, 90)))


@triton.jit
def spilling_kernel(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    value = tl.load(source + lane)
    tl.store(target + lane, value - tl.sum(value, axis=0))


@triton.jit
def rereading_kernel(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + lane), axis=0)
    tl.debug_barrier()
    tl.store(target + lane, tl.load(source + lane, volatile=True) * total)


@triton.jit
def narrow_kernel(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane * 3))


def bad(kernel, block: int, warps: int, width: int = 16) -> list[str]:
    arguments = {"source": "*fp32", "target": "*fp32", "BLOCK": block}
    variant = Variant(
        name="bad",
        kernel=kernel,
        arguments=arguments,
        warps=warps,
        reads=4 * block,
        writes=4 * block,
        width=width,
    )
    return problems(inspect(variant, 90))


def test_audit_finds_spills():
    assert any("local memory" in problem for problem in bad(spilling_kernel, 65536, 4))


def test_audit_finds_a_second_read():
    assert any(problem.startswith("reads 8192 bytes") for problem in bad(rereading_kernel, 1024, 4))


def test_audit_finds_narrow_loads():
    found = bad(narrow_kernel, 1024, 4)
    assert any(problem.startswith("reads 0 bytes") for problem in found)
    assert any("narrow loads" in problem for problem in found)


def test_audit_finds_loads_narrower_than_a_row_permits():
    assert bad(narrow_kernel, 1024, 4, width=8) == [
        "reads 0 bytes in accesses of 8, the formula has 4096",
        "writes 0 bytes in accesses of 8, the formula has 4096",
        "8 narrow loads a thread, 0 are scalars",
    ]


@pytest.mark.parametrize(
    ("name", "channels", "changes", "found"),
    [
        ("backward", 320, {"CHUNKS": 8}, "occupancy"),
        ("moments", 320, {"CHUNKS": 32}, "bytes of local memory"),
        ("apply", 321, {}, "reads 0 bytes in accesses of 16"),
        ("backward sums", 321, {}, "narrow loads"),
    ],
)
def test_audit_finds_a_group_norm_cut_up_badly(name, channels, changes, found):
    """Twins of the uses above: longer programs, and rows that no 16 bytes divide."""
    variant = group_norm_variant(name, (channels,), 4096, **changes)
    assert any(found in problem for problem in problems(inspect(variant, 90)))


def test_audit_finds_a_group_norm_that_reads_twice():
    (variant,) = (v for v in VARIANTS if v.name == "group_norm, apply, C = 320, 4096 px, bf16")
    once = replace(variant, reads=variant.reads - variant.writes)
    assert any(problem.startswith("reads 32768 bytes") for problem in problems(inspect(once, 90)))


@pytest.mark.parametrize(
    ("name", "width"), [("K = 10, fp32", 8), ("K = 10, bf16", 4), ("K = 100, bf16", 8)]
)
def test_rows_that_no_16_bytes_divide_move_in_the_widest_accesses_that_fit(name, width):
    (variant,) = (variant for variant in VARIANTS if variant.name == f"entropy, {name}")
    assert variant.width == width
    broken = replace(variant, arguments={**variant.arguments, "UNIT": 1})
    assert problems(inspect(variant, 90)) == []
    assert problems(inspect(broken, 90)) != []


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "expected"),
    [
        (32, 0, 8, 90, 1.0),
        (64, 0, 32, 90, 0.5),
        (65, 0, 32, 90, 0.0),
        (128, 0, 4, 80, 0.25),
        (32, 100 * 1024, 4, 80, 1 / 16),
    ],
)
def test_occupancy(registers, shared, warps, capability, expected):
    assert occupancy(registers, shared, warps, capability) == expected


def test_copies_past_the_registers_are_no_loads():
    """Loops whose loads are under way at once have them; they are no narrow loads."""
    assembly = "LDGSTS.E.BYPASS.128 [R1], [R2.64] ;\nLDG.E.128 R4, [R2.64] ;\nLDG.E R5, [R2.64] ;"
    assert _widths("LDG", assembly) == {16: 1, 4: 1}


def test_table():
    (report,) = audit([variant for variant in VARIANTS if variant.name == "normal"], [90])
    assert "| normal | sm_90 |" in table([report])
    assert table([report]).endswith("| kept |")


def changed(name: str, *, warps: float = 1, payload: int = 1, **arguments: int) -> Variant:
    """A variant of the table with other settings."""
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    return replace(
        variant,
        arguments=variant.arguments | arguments,
        warps=int(variant.warps * warps),
        reads=variant.reads * payload,
        writes=variant.writes * payload,
    )


def test_backward_passes_hold_half_of_what_forward_passes_do_for_a_reason():
    """With as many elements a thread as forward, fewer than half of the warps fit."""
    norm = changed("gate_norm_modulate, DiT, backward, D = 1152, bf16", warps=0.5)
    assert problems(inspect(norm, 90)) == ["occupancy 44% with 72 registers a thread"]
    gate = changed("geglu, backward, C = 1280, bf16", payload=2, ROWS=8)
    assert problems(inspect(gate, 100)) == ["occupancy 44% with 68 registers a thread"]


def test_channels_that_no_16_bytes_divide_are_found():
    found = problems(inspect(changed("bias_residual, C = 320, bf16", C=321), 90))
    assert any("narrow loads" in problem for problem in found)
