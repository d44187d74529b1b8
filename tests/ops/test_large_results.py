"""What a large result costs beyond its arithmetic: the page faults of its own memory, once."""

from __future__ import annotations

import gc
import mmap
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from dpfast.ops import dispatch, entropy_and_grad, gather_batch, guided_step, normal
from dpfast.ops.chunk_rows import ChunkTable, take_rows
from dpfast.ops.crop import crop_batch
from dpfast.ops.permutation import permutation

resource = pytest.importorskip("resource")  # counts page faults; Windows has none
pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED or dispatch.native() is None or platform.system() != "Linux",
    reason="Linux counts the pages that the extension touches",
)
# Every case makes 36 MiB: beyond what the C library keeps for the next result, so that each lies on
# new pages.
SIDE = 3072
BYTES = 4 * SIDE * SIDE
PAGES = BYTES // mmap.PAGESIZE
STRAY = 600  # other pages: the ends of a result, which are no whole large page, and small results
Call = Callable[[], object]


@pytest.fixture(autouse=True)
def on_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "native")
    torch.use_deterministic_algorithms(False)  # what fills new memory has touched it already


@pytest.fixture
def large_pages():
    before = dispatch.native_module().large_pages(False)
    yield dispatch.native_module().large_pages
    dispatch.native_module().large_pages(before)


def entropies() -> Call:
    logits = torch.ones(SIDE, SIDE)
    return lambda: entropy_and_grad(logits)


def halves() -> Call:
    logits = torch.ones(2 * SIDE, SIDE, dtype=torch.bfloat16)
    return lambda: entropy_and_grad(logits)


def steps(*, x0: bool = False) -> Call:
    x, table = torch.ones(SIDE, SIDE), torch.tensor([[0.8, 0.6, 0.9, 0.3, 0.0, 0.2]])
    known = {"cfg_scale": 1.0, "omega": 0.0}
    if not x0:
        return lambda: guided_step(x, x, None, None, table, 0, **known)
    out = torch.ones_like(x)
    return lambda: guided_step(
        x, x, None, None, table, 0, **known, out=out, x0_out=torch.empty_like(x)
    )


def batches(make: Callable[..., torch.Tensor], **also: object) -> Call:
    store, indices = torch.zeros(SIDE, 3, 32, 32, dtype=torch.uint8), torch.arange(SIDE)
    form = {"mean": [0.5] * 3, "std": [0.2] * 3, "dtype": torch.float32, "channels_last": True}
    rows = (store, indices) if make is gather_batch else (store,)
    return lambda: make(*rows, **form, **also)


def rows() -> Call:
    table = ChunkTable(SIDE, 4 * SIDE).with_chunks([torch.zeros(BYTES, dtype=torch.uint8)])
    indices = torch.arange(SIDE)
    return lambda: take_rows(table, indices, SIDE)


CALLS: dict[str, Callable[[], Call]] = {
    "entropy_and_grad": entropies,
    "entropy_and_grad, bf16": halves,
    "guided_step": steps,
    "guided_step, x0_out": lambda: steps(x0=True),
    "normal": lambda: lambda: normal(torch.arange(SIDE), (SIDE,), seed=0, stream=0),
    "gather_batch": lambda: batches(gather_batch),
    "crop_batch": lambda: batches(crop_batch),
    "crop_batch, boxes": lambda: batches(
        crop_batch, boxes=torch.tensor([[1.0, 2.0, 20.0, 25.0]]).expand(SIDE, 4)
    ),
    "take_rows": rows,
    "permutation": lambda: (
        lambda: permutation(0, BYTES // 8, BYTES // 8, seed=0, epoch=0, stream=0)
    ),
}


def faults(call: Call) -> int:
    """Of the second call: the first also touches what later ones use again."""
    call()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = call()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del result
    return int(after - before)


def touched(advice: bool) -> object:
    """New memory of the same size, by hand."""
    memory = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if advice:
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(0)
    return memory


@pytest.mark.parametrize("name", CALLS)
def test_a_large_result_touches_its_pages_once(name, large_pages):
    large_pages(False)
    assert faults(CALLS[name]()) <= PAGES + STRAY


@pytest.mark.parametrize("name", CALLS)
def test_a_large_result_lies_on_large_pages_where_they_are_wanted(name, large_pages):
    if not hasattr(mmap, "MADV_HUGEPAGE") or faults(lambda: touched(True)) > PAGES // 8:
        pytest.skip("no large pages to be had")
    if faults(lambda: touched(False)) <= PAGES // 8:
        pytest.skip("all pages are large")
    large_pages(True)
    assert faults(CALLS[name]()) <= PAGES // 8 + STRAY


@pytest.mark.parametrize(
    ("text", "given_back"),
    [
        ("9\n", True),
        ("0\n", True),
        ("5", True),
        ("-1\n", False),
        ("4294967295\n", False),  # -1, as kernels without a driver print it
        ("64\n", False),
        ("\n", False),
        ("none\n", False),
    ],
)
def test_a_guest_that_hands_free_blocks_back_is_told_by_their_order(tmp_path, text, given_back):
    file = tmp_path / "page_reporting_order"
    file.write_text(text, encoding="utf-8")
    assert dispatch.native_module().gives_back_free_blocks(str(file)) is given_back


def test_where_nothing_tells_of_reporting_free_blocks_are_kept(tmp_path):
    native = dispatch.native_module()
    assert not native.gives_back_free_blocks(str(tmp_path / "missing"))
    assert not native.gives_back_free_blocks(str(tmp_path))  # opens, and cannot be read


def test_large_pages_are_wanted_unless_this_machine_hands_free_blocks_back():
    code = "from dpfast.ops import dispatch; print(dispatch.native().large_pages(True))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    native = dispatch.native_module()
    assert ran.stdout.split() == [str(not native.gives_back_free_blocks(native.REPORTING_ORDER))]
