"""The experiments: right in Triton's interpreter, read as machine code, and judged by a record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import run
from benchmarks.experiments import attention, bench, geglu_product, machine_code
from dpfast.errors import InputError
from dpfast.ops import audit, dispatch

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not dispatch.has_triton(), reason="needs Triton")
needs_compiler = pytest.mark.skipif(
    audit.missing() is not None, reason="the audit needs Triton's Linux wheel"
)


def interpreted(only: str, capfd) -> list[str]:
    """The cases that are right."""
    code = run.main(["experiments", "--interpret", "--only", only])
    out, err = capfd.readouterr()
    assert code == 0, err[-3000:]
    assert all(line.endswith(": right") for line in out.splitlines())
    return [line.removesuffix(": right") for line in out.splitlines()]


@needs_triton
@pytest.mark.parametrize(
    ("only", "count"), [("attention 40, 100 x 77, bf16", 2), ("GEGLU 128, 77 x 128", 2)]
)
def test_they_match_fp64_at_sizes_that_fit_no_tile(only, count, capfd):
    """Forward and gradients, of memory that held NaN."""
    assert len(interpreted(only, capfd)) == count


@pytest.mark.long
@needs_triton
def test_they_match_fp64_at_every_size(capfd):
    assert interpreted("", capfd) == list(bench.odd_cases())


def small(**ours) -> bench.Case:
    """Attention on a CPU, ours replaced by functions of q, k and v."""
    case = bench.attention_case(
        1, 2, 20, 20, 40, device=CPU, forms=(), backward=False, dtype=torch.bfloat16
    )
    plain = case.rivals["torch's choice"]
    return replace(
        case, ours={name: lambda c=change: (c(plain()[0]),) for name, change in ours.items()}
    )


def changed(out, index, value):
    out[index] = value
    return out


def test_what_is_wrong_is_named_and_not_timed(monkeypatch):
    def raises(out):
        raise RuntimeError("no kernel image")

    case = small(
        right=lambda out: out,
        scaled=lambda out: out * 1.02,
        unwritten=lambda out: changed(out, (0, 1, 19), torch.nan),
        one=lambda out: changed(out, (0, 1, 19, 39), 1.0),
        none=raises,
    )
    right, wrong = bench.gate(case)
    assert list(right) == ["right"]
    assert list(wrong) == ["scaled", "unwritten", "one", "none"]
    assert "out by 2.0e-02" in wrong["scaled"]
    assert wrong["none"] == "RuntimeError: no kernel image"
    monkeypatch.setattr(bench.timing, "replayed", lambda call: None)
    record, told = bench.measure(case, 1, CPU)
    assert told == record["wrong"] == wrong
    assert "right" in record["seconds"]
    assert not set(record["seconds"]) & set(wrong)


@pytest.mark.parametrize(("seconds", "enters"), [(0.9, True), (0.95, False)])
def test_a_record_says_whether_the_fastest_form_enters(seconds, enters):
    case = replace(small(slow=None, fast=None), rivals={"a": None, "b": None, "absent": None})
    times = {"a": 1.2, "b": 1.0, "slow": 2.0, "fast": seconds}
    found = bench.verdict(case, {n: bench.timing.Times([s]) for n, s in times.items()})
    assert found == {
        "fastest_rival": "b",
        "fastest": "fast",
        "gain": pytest.approx(1 / seconds),
        "needed": 1.1,
        "enters": enters,
    }


def test_a_case_that_fails_leaves_the_others_and_each_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.timing, "replayed", lambda call: None)
    makers = {
        "first": lambda: small(same=lambda out: out),
        "second": lambda: 1 / 0,
        "third": lambda: small(same=lambda out: out, nothing=lambda out: out * torch.nan),
    }
    assert bench.run(makers, 1, CPU, tmp_path) == 1
    made = [json.loads(line) for line in (tmp_path / "experiments.jsonl").read_text().splitlines()]
    assert [list(each["wrong"]) for each in made] == [[], ["nothing"]]
    for each in made:
        assert each["errors"]["same"]["out"]["norm"] < 2**-7
        assert {"dpfast's choice", "torch's choice", "same"} <= set(each["seconds"])
    captured = capsys.readouterr()
    assert "second: all: ZeroDivisionError" in captured.err
    assert captured.out.count("| same |") == 2
    assert bench.run({"first": makers["first"]}, 1, CPU, None) == 0


def test_times_need_a_gpu(capsys):
    assert run.main(["experiments", "--device", "cpu"]) == 2
    assert "device = 'cpu': the suite experiments needs a GPU" in capsys.readouterr().err
    assert run.main(["experiments", "--interpret", "--only", "nosuch"]) == 2
    assert "only = 'nosuch': no case of experiments has it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head_size", "wide", "narrow"), [(40, 32, 16), (72, 64, 16), (80, 64, 16), (160, 128, 32)]
)
def test_a_head_is_a_wide_tile_and_a_narrow_one(head_size, wide, narrow):
    assert attention.lanes(head_size) == (wide, narrow)


@pytest.mark.parametrize("head_size", [8, 16, 36, 64, 128])
def test_heads_of_one_tile_and_rows_out_of_line_are_refused(head_size):
    with pytest.raises(InputError, match=f"head_size = {head_size}: expected a multiple of 8"):
        attention.lanes(head_size)


def test_products_that_fit_no_tile_are_refused():
    x, weight = torch.zeros(3, 320), torch.zeros(200, 320)
    with pytest.raises(InputError, match=r"weight has shape \(200, 320\): expected halves"):
        geglu_product.geglu_product(x, weight, torch.zeros(200))


def test_views_of_a_joined_projection_are_read_where_they_are():
    joined = torch.zeros(2, 10, 3 * 80, dtype=torch.bfloat16).chunk(3, dim=-1)
    q = joined[1].unflatten(-1, (2, 40)).transpose(1, 2)
    assert attention._readable(q) is q
    for other in (q.contiguous(), torch.zeros(2, 2, 10, 80)[..., ::2]):
        read = attention._readable(other)
        assert read.stride() == (2 * 10 * 40, 40, 80, 1)
        assert torch.equal(read, other)


def test_the_useful_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.zeros(2, 3, 10, 40, requires_grad=True)
    k = torch.zeros(2, 3, 7, 40, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scores = (q @ k.transpose(2, 3)).softmax(-1) @ k
    assert counter.get_total_flops() == attention.flops(2, 3, 10, 7, 40)
    with FlopCounterMode(display=False) as counter:
        scores.sum().backward()
    # torch keeps the scores, where a kernel makes them again
    assert counter.get_total_flops() + attention.flops(2, 3, 10, 7, 40) // 2 == attention.flops(
        2, 3, 10, 7, 40, backward=True
    )


def test_the_product_with_a_geglu_inside_moves_a_third_of_the_bytes_at_the_first_level():
    moved = [
        geglu_product.bytes_moved(32 * 4096, 320, 1280, 2, fused=fused) for fused in (True, False)
    ]
    assert moved == [419430400, 1761607680]


LANES = {"": 48 / 40, "values": 56 / 40, "all": 64 / 40}


@needs_compiler
@pytest.mark.parametrize("tiles", attention.FORWARD, ids=str)
def test_a_head_of_40_costs_tensor_cores_the_lanes_of_its_tiles(tiles):
    variant = machine_code.attention_variant(attention.forward_kernel, 40, tiles)
    report = audit.inspect(variant, 90)
    assert report.local_bytes == 0
    work = machine_code.operations(report) / machine_code.useful(variant)
    assert work == pytest.approx(LANES[tiles.whole])
    # keys and values go to shared memory past the registers, 16 bytes at a time; the narrow tile
    # has 8 for each of 256 threads
    most = {"16", "8"} if tiles.warps * 32 > tiles.keys * 2 else {"16"}
    assert set(machine_code.copies(report)) == most
    assert set(report.loads) == {16}  # the queries
    assert set(report.stores) == {16}
    small = tiles.queries * tiles.keys // tiles.warps <= 64 * 64 // 4
    assert report.occupancy >= (0.25 if small else 0.125)


@needs_compiler
@pytest.mark.parametrize("dq", [None, "*fp32"], ids=["two passes", "one pass"])
def test_the_gradients_of_keys_spill_nothing(dq):
    for _, tiles in attention.BACKWARD:
        variant = machine_code.attention_variant(attention.keys_kernel, 40, tiles, dq=dq)
        report = audit.inspect(variant, 90)
        assert report.local_bytes == 0
        work = machine_code.operations(report) / machine_code.useful(variant)
        assert work == pytest.approx(48 / 40)


@needs_compiler
def test_larger_blocks_of_the_gradients_spill():
    tiles = attention.Tiles(128, 128, 8, 2)
    variant = machine_code.attention_variant(attention.keys_kernel, 40, tiles, dq="*fp32")
    assert audit.inspect(variant, 90).local_bytes > 0


@needs_compiler
@pytest.mark.parametrize("tiles", geglu_product.TILES, ids=str)
def test_the_product_with_a_geglu_inside_wastes_no_operation(tiles):
    variant = machine_code.geglu_variant(tiles)
    report = audit.inspect(variant, 90)
    assert report.local_bytes == 0
    assert machine_code.operations(report) == machine_code.useful(variant)
    assert set(machine_code.copies(report)) == {"16"}
    assert set(report.stores) == {16}


def test_the_reference_of_a_geglu_is_what_the_library_computes():
    case = bench.geglu_case(5, 64, 64, device=CPU, forms=(), dtype=torch.float16)
    (rival,) = case.rivals.values()
    right, wrong = bench.gate(replace(case, ours={"library": rival}))
    assert wrong == {}
    assert right["library"]["y"].norm < 1e-3
    halves = replace(case, ours={"halves": lambda: (F.silu(rival()[0]),)})
    assert list(bench.gate(halves)[1]) == ["halves"]
