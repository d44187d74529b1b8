"""GroupNorm in NHWC against fp64, forward and to the input, eagerly, under vjp and compiled."""

from __future__ import annotations

import pytest
import torch

from dpfast.hardware.traffic import count_traffic
from dpfast.ops import dispatch, group_norm, group_norm_and_x
from dpfast.ops.audit import group_norm_variant
from dpfast.ops.group_norm import reference, triton
from dpfast.ops.group_norm.triton import bytes_moved
from tests.tolerances import GROUP_NORM, HALF_ULP

# Triton's interpreter truncates to bf16, a GPU rounds.
ROUNDED = [torch.float16] if dispatch.INTERPRETED else [torch.float16, torch.bfloat16]
# Channels of one or two sources, height and width, groups. Widths of a group: 10, 20, 40, 80, one
# that begins in one source and ends in the other, odd ones; a single pixel.
SHAPES = [
    (2, (20,), (8, 8), 2),
    (2, (40,), (9, 7), 2),
    (1, (120,), (5, 13), 3),
    (1, (160,), (16, 16), 2),
    (1, (10,), (64, 64), 1),
    (2, (48, 32), (8, 8), 4),
    (1, (30, 25), (5, 7), 5),
    (3, (32,), (1, 1), 2),
    (2, (3,), (5, 4), 1),
    (1, (1,), (3, 5), 1),
    (2, (24,), (37,), 3),
    (1, (2, 10), (2, 3, 4), 2),
]
NAMES = {"ids": lambda shape: "x".join(map(str, (shape[0], *shape[1], *shape[2])))}


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Problem:
    """Sources, frozen vectors and a gradient of the result, on a device."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", mean=0.5):
        samples, channels, size, self.groups = shape
        total = sum(channels)
        self.sources = [
            nhwc(torch.randn(samples, c, *size) * 2 + mean).to(device, dtype) for c in channels
        ]
        self.weight, self.bias = torch.randn(2, total, device=device)
        self.shift = torch.randn(samples, total, device=device)
        self.dy = nhwc(torch.randn(samples, total, *size)).to(device, dtype)
        self.silu = True

    def x(self, sources):
        return sources[0] if len(sources) == 1 else tuple(sources)

    def run(self, *sources):
        vectors = (self.weight, self.bias, self.groups, 1e-5)
        return group_norm(self.x(sources), *vectors, shift=self.shift, silu=self.silu)

    def truth(self, *sources):
        vectors = (None if v is None else v.double() for v in (self.weight, self.bias))
        shift = None if self.shift is None else self.shift.double()
        return reference(self.x(sources), *vectors, self.groups, 1e-5, shift, self.silu)

    def both(self, function, dtype=None):
        """The result, and the gradients of the sources by the tape, of sources in ``dtype``."""
        leaves = [source.detach().to(dtype, copy=True) for source in self.sources]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        return y.detach(), torch.autograd.grad(y, leaves, self.dy.to(y.dtype))

    def exact(self):
        return self.both(self.truth, torch.float64)

    def assert_exact(self):
        """fp32 inside and one rounding; the plain reference rounds after each operation."""
        y, gradients = self.both(self.run)
        expected, slopes = self.exact()
        dtype = self.sources[0].dtype
        plain = dispatch.backend_of("group_norm", y.device) == "reference"
        room = 8 * HALF_ULP[dtype] * plain * (dtype != torch.float32)
        for made, exact in zip((y, *gradients), (expected, *slopes), strict=True):
            assert made.dtype == dtype
            scale = max(1.0, exact.abs().max().item())
            torch.testing.assert_close(
                made.double(), exact, rtol=HALF_ULP[dtype], atol=(GROUP_NORM + room) * scale
            )


@pytest.mark.parametrize("shape", SHAPES, **NAMES)
def test_values_and_gradients_match_fp64(shape, device):
    Problem(shape, device=device).assert_exact()


@pytest.mark.parametrize("used", ["all", "first", "x alone"])
@pytest.mark.parametrize("channels", [(20,), (20, 12)], ids=str)
def test_the_gradient_of_x_from_elsewhere_is_added(channels, used, device):
    problem = Problem((2, channels, (5, 7), 4), device=device)
    leaves = [source.clone().requires_grad_() for source in problem.sources]
    vectors = (problem.weight, problem.bias, 4)
    y, x = group_norm_and_x(problem.x(leaves), *vectors, shift=problem.shift, silu=True)
    handed = x if isinstance(x, tuple) else (x,)
    assert all(torch.equal(a, b) for a, b in zip(handed, leaves, strict=True))
    more = [torch.randn_like(each) for each in leaves[: 1 if used == "first" else None]]
    outputs = [*handed[: len(more)], *([] if used == "x alone" else [y])]
    found = torch.autograd.grad(outputs, leaves, [*more, problem.dy][: len(outputs)])
    exact = problem.exact()[1] if used != "x alone" else [torch.zeros(()) for _ in leaves]
    for index, (made, right) in enumerate(zip(found, exact, strict=True)):
        v = more[index].double() if index < len(more) else torch.zeros_like(made).double()
        torch.testing.assert_close(made.double(), right.to(device) + v, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:7:2], **NAMES)
def test_16_bits_are_rounded_once(shape, dtype, device):
    Problem(shape, dtype, device).assert_exact()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("without", ["weight", "bias", "shift", "all"])
def test_every_vector_may_be_absent(without, silu, device):
    problem = Problem((2, (20, 12), (5, 3), 4), device=device)
    for name in ("weight", "bias", "shift"):
        if without in (name, "all"):
            setattr(problem, name, None)
    problem.silu = silu
    problem.assert_exact()


def test_a_shift_may_be_one_row_for_all_samples(device):
    problem = Problem((3, (12,), (5, 3), 4), device=device)
    row = problem.shift[0].clone()
    problem.shift = row.expand(3, 12)
    expected = problem.both(problem.run)
    problem.shift = row
    made = problem.both(problem.run)
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1][0], expected[1][0])


def test_gradients_by_vjp_are_those_of_the_tape(device):
    problem = Problem((2, (20, 28), (5, 4), 4), device=device)
    y, gradients = problem.both(problem.run)
    with torch.no_grad():
        value, pull_back = torch.func.vjp(problem.run, *problem.sources)
        pulled = pull_back(problem.dy)
    for made, expected in zip((value, *pulled), (y, *gradients), strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=GROUP_NORM)


@pytest.mark.parametrize("channels", [(20,), (20, 28)], ids=str)
def test_compiles_into_one_graph_with_its_vjp(channels, device):
    problem = Problem((2, channels, (5, 4), 4), device=device)

    def both(*sources):
        y, pull_back = torch.func.vjp(
            lambda *inner: problem.run(*(torch.sin(x) for x in inner)).sin(), *sources
        )
        return y, *pull_back(problem.dy)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for made, expected in zip(compiled(*problem.sources), both(*problem.sources), strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


def test_compiles_under_the_tape(device):
    problem = Problem((2, (20,), (5, 4), 4), device=device)
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    for made, expected in zip(problem.both(compiled), problem.both(problem.run), strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_under_vmap(device):
    problem = Problem((2, (12,), (5, 4), 4), device=device)
    lanes = torch.randn(3, *problem.sources[0].shape, device=device)
    made = torch.func.vmap(problem.run)(lanes)
    expected = torch.stack([problem.run(lane) for lane in lanes])
    torch.testing.assert_close(made, expected, rtol=0, atol=GROUP_NORM)


@pytest.mark.parametrize("shape", [(3, (48, 32), (8, 8), 4), (3, (10,), (27, 32), 1)], **NAMES)
def test_a_sample_has_the_same_bits_alone_and_beside_others(shape, device):
    problem = Problem(shape, device=device)
    y, gradients = problem.both(problem.run)
    again, others = problem.both(problem.run)
    assert torch.equal(again, y)
    assert all(map(torch.equal, others, gradients))
    problem.sources = [source[1:2] for source in problem.sources]
    problem.shift, problem.dy = problem.shift[1:2], problem.dy[1:2]
    alone, slopes = problem.both(problem.run)
    assert torch.equal(alone, y[1:2])
    for slope, gradient in zip(slopes, gradients, strict=True):
        assert torch.equal(slope, gradient[1:2])


def test_a_broken_sample_stays_alone(device):
    problem = Problem((3, (20,), (8, 8), 2), device=device)
    clean, slopes = problem.both(problem.run)
    problem.sources[0][1, 3, 2, 2] = float("nan")
    y, gradients = problem.both(problem.run)
    for made, expected in ((y, clean), (gradients[0], slopes[0])):
        assert made[1, :10].isnan().all()  # the group of channel 3
        for whole in (made[::2], made[1, 10:]), (expected[::2], expected[1, 10:]):
            assert not any(part.isnan().any() for part in whole)
        assert torch.equal(made[::2], expected[::2])
        assert torch.equal(made[1, 10:], expected[1, 10:])


def test_other_layouts_are_read_and_nhwc_is_returned(device):
    problem = Problem((2, (20, 12), (5, 4), 4), device=device)
    y, gradients = problem.both(problem.run)
    problem.sources = [source.contiguous() for source in problem.sources]
    problem.dy = problem.dy.contiguous()
    problem.weight = torch.stack([problem.weight, problem.weight], 1)[:, 0]
    made, slopes = problem.both(problem.run)
    torch.testing.assert_close(made, y, rtol=0, atol=GROUP_NORM)
    for slope, gradient in zip(slopes, gradients, strict=True):
        torch.testing.assert_close(slope, gradient, rtol=0, atol=GROUP_NORM)
    if dispatch.backend_of("group_norm", device) == "triton":
        assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [1, 3])
def test_memory_that_begins_anywhere_gives_the_same_bits(offset, device):
    problem = Problem((2, (20,), (5, 4), 4), device=device)
    expected, slopes = problem.both(problem.run)
    (x,) = problem.sources
    memory = torch.empty(x.numel() + offset, device=device)[offset:]
    moved = memory.view(2, 5, 4, 20).movedim(-1, 1).copy_(x).requires_grad_()
    assert moved.data_ptr() % 16 != 0
    made = problem.run(moved)
    assert torch.equal(made.detach(), expected)
    assert torch.equal(torch.autograd.grad(made, moved, problem.dy)[0], slopes[0])


def test_a_group_of_one_value_is_its_bias(device):
    problem = Problem((2, (4,), (1, 1), 4), device=device)
    problem.silu = False
    y, (gradient,) = problem.both(problem.run)
    torch.testing.assert_close(y, problem.bias.expand(2, 4)[..., None, None], rtol=0, atol=2e-3)
    assert gradient.abs().max() < 1e-3


def test_no_samples(device):
    problem = Problem((0, (20, 12), (5, 4), 4), device=device)
    y, gradients = problem.both(problem.run)
    assert y.shape == (0, 32, 5, 4)
    assert [gradient.shape for gradient in gradients] == [(0, 20, 5, 4), (0, 12, 5, 4)]


def test_weights_are_frozen(device):
    problem = Problem((1, (8,), (3, 3), 2), device=device)
    for vector in (problem.weight, problem.bias, problem.shift):
        vector.requires_grad_()
    assert not problem.run(problem.sources[0]).requires_grad
    x = problem.sources[0].clone().requires_grad_()
    y = problem.run(x)
    wanted = (x, problem.weight, problem.bias, problem.shift)
    slopes = torch.autograd.grad(y.sum(), wanted, allow_unused=True)
    assert [slope is None for slope in slopes] == [False, True, True, True]


def test_a_source_without_a_gradient(device):
    problem = Problem((1, (8, 8), (3, 3), 2), device=device)
    _, expected = problem.both(problem.run)
    for i in range(2):
        leaves = [source.clone() for source in problem.sources]
        leaves[i].requires_grad_()
        (made,) = torch.autograd.grad(problem.run(*leaves), leaves[i], problem.dy)
        assert torch.equal(made, expected[i])


def test_fp64_runs_the_reference(device):
    problem = Problem((1, (8,), (3, 3), 2), torch.float64, device)
    for name in ("weight", "bias"):
        setattr(problem, name, getattr(problem, name).double())
    assert torch.equal(problem.run(*problem.sources), problem.truth(*problem.sources))


class TestKernels:
    """What concerns the kernels alone."""

    @pytest.fixture(autouse=True)
    def only_kernels(self, device):
        if dispatch.backend_of("group_norm", device) != "triton":
            pytest.skip("no kernels on this device")

    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's exp
    def test_an_average_a_thousand_times_the_deviation_cancels_nothing(self, device):
        """The twin, E[x^2] - E[x]^2 in fp32, is off by 3 % and more."""
        problem = Problem((1, (20,), (24, 24), 2), device=device, mean=2000)
        problem.shift = problem.bias = None
        y, gradients = problem.both(problem.run)
        expected, slopes = problem.exact()
        assert (y - expected).abs().max() < 1e-3
        assert (gradients[0] - slopes[0]).abs().max() < 1e-3
        group = problem.sources[0].reshape(2, -1)
        naive = group.square().mean(1) - group.mean(1).square()
        assert (naive.double() / group.double().var(1, correction=0) - 1).abs().max() > 0.03

    @pytest.mark.parametrize("dtype", ROUNDED, ids=str)
    def test_the_error_is_no_larger_than_that_of_plain_operations(self, dtype, device):
        problem = Problem((1, (40, 20), (9, 8), 3), dtype, device)
        y, gradients = problem.both(problem.run)
        expected, slopes = problem.exact()
        vectors = [v.to(dtype) for v in (problem.weight, problem.bias)]
        plain, plain_gradients = problem.both(
            lambda *sources: reference(sources, *vectors, 3, 1e-5, problem.shift, True)
        )
        for made, rival, exact in zip(
            (y, *gradients), (plain, *plain_gradients), (expected, *slopes), strict=True
        ):
            error, allowed = ((tensor.double() - exact).abs() for tensor in (made, rival))
            assert error.mean() <= allowed.mean()
            assert error.max() <= allowed.max()

    def test_registered_operations(self, device):
        problem = Problem((2, (20, 12), (5, 4), 4), device=device)
        first, second = problem.sources
        vectors = (problem.weight, problem.bias)
        options = (4, 1e-5, problem.shift, True)
        forward = torch.ops.dpfast.group_norm
        torch.library.opcheck(forward.default, (first, second, *vectors, *options))
        torch.library.opcheck(forward.default, (first, None, None, None, 4, 1e-5, None, False))
        _, *saved = forward(first, second, *vectors, *options)
        torch.library.opcheck(
            torch.ops.dpfast.group_norm_backward.default,
            (problem.dy, first, second, *vectors, problem.shift, *saved, True),
        )
        torch.library.opcheck(
            torch.ops.dpfast.group_norm_backward.default,
            (problem.dy, first, second, *vectors, problem.shift, *saved, True, first, second),
        )

    def test_a_second_derivative_is_refused(self, device):
        x = torch.randn(1, 4, 3, 3, device=device, requires_grad=True)
        y = group_norm(x, None, None, 2)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.sum().backward()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
    def test_a_captured_graph_repeats_the_bits(self, device):
        problem = Problem((2, (320, 64), (16, 16), 32), torch.bfloat16, device)

        def both():
            with torch.no_grad():
                y, pull_back = torch.func.vjp(problem.run, *problem.sources)
                return y, *pull_back(problem.dy)

        expected = [tensor.clone() for tensor in both()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = both()
        graph.replay()
        assert all(map(torch.equal, made, expected))

    @pytest.mark.parametrize("broken", ["programs", "span"])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_twins_that_the_comparisons_find(self, broken, device, monkeypatch):
        """A program left out leaves NaN, which new memory holds here; a wrong weight of a part of
        the rows moves the average.
        """
        problem = Problem((1, (20,), (19, 20), 2), device=device)
        problem.assert_exact()
        if broken == "programs":
            right = triton._Cut.of
            monkeypatch.setattr(
                triton._Cut,
                "of",
                lambda *given, **options: (cut := right(*given, **options))._replace(
                    programs=(cut.programs[0] - 1,)
                ),
            )
        else:
            monkeypatch.setattr(triton._Cut, "span", property(lambda cut: 2 * cut.tile[0]))
        with pytest.raises(AssertionError):
            problem.assert_exact()


def meta(samples, channels, size, dtype=torch.bfloat16):
    x = torch.empty(samples, channels, size, size, device="meta", dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def test_counters_see_three_launches_a_pass_and_their_bytes():
    """By hand: 32 x 320 x 64 x 64 in bf16 three times and five times, and sums of each 128 and 64
    rows.
    """
    x, dy = meta(32, 320, 64).requires_grad_(), meta(32, 320, 64)
    counted = count_traffic(
        lambda: torch.autograd.grad(group_norm(x, None, None, 32, silu=True), x, dy)
    )
    tensor, columns = 32 * 320 * 64 * 64 * 2, 32 * 320
    pair, sums, back = columns * 8, columns * 32 * 8, columns * 64 * 8
    assert [kernel.bytes for kernel in counted.kernels] == [
        tensor + sums,
        sums + pair,
        2 * tensor + pair,
        2 * tensor + pair + back,
        back + pair,
        3 * tensor + 2 * pair,
    ]
    assert counted.layout_copies == 0


def test_counters_see_the_gradient_from_elsewhere_in_the_last_launch():
    x, dy, v = meta(2, 64, 8).requires_grad_(), meta(2, 64, 8), meta(2, 64, 8)

    def residual() -> None:
        y, kept = group_norm_and_x(x, None, None, 4)
        torch.autograd.grad((y, kept), x, (dy, v))

    found = [kernel.bytes for kernel in count_traffic(residual).kernels]
    assert found[3:] == list(bytes_moved(2, (64,), 64, 2, backward=True, more=True))
    assert found[5] - bytes_moved(2, (64,), 64, 2, backward=True)[2] == 2 * x.numel()


def test_counters_see_the_copy_of_another_layout_and_no_concatenation():
    sources = (meta(2, 64, 8), meta(2, 32, 8).contiguous())
    counted = count_traffic(lambda: group_norm(sources, None, None, 4))
    assert [kernel.kind for kernel in counted.kernels] == ["layout", *["pointwise"] * 3]
    assert [k.bytes for k in counted.kernels[1:]] == list(bytes_moved(2, (64, 32), 64, 2))
    y = group_norm(sources, None, None, 4)
    assert y.shape == (2, 96, 8, 8)
    assert y.is_contiguous(memory_format=torch.channels_last)


# Bytes of coefficients that a thread reads for its own channels, 8 in bf16.
COEFFICIENTS = {"moments": 0, "apply": 64, "backward sums": 64 + 16, "backward": 128}


@pytest.mark.parametrize("channels", [(320,), (1280, 640)], ids=str)
def test_the_formula_is_what_all_audited_programs_move(channels):
    tensor = 4096 * sum(channels) * 2
    for backward, names in ((False, ("moments", "apply")), (True, ("backward sums", "backward"))):
        rows, chunks, block = triton.settings(max(channels), 4096, 2, backward)
        programs = 4096 // (rows * chunks) * (sum(channels) // block)
        launches = bytes_moved(1, channels, 4096, 2, backward=backward)[::2]
        for name, launch in zip(names, launches, strict=True):
            variant = group_norm_variant(name, channels, 4096)
            beside = COEFFICIENTS[name] * variant.warps * 32
            moved = programs * (variant.reads - beside + variant.writes)
            assert moved % tensor == 0
            assert moved // tensor == launch // tensor
            assert launch % tensor < 0.07 * tensor  # tables of the channels


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 6)}, ValueError, r"x has shape \(2, 6\), expected \(B, C, H, W\)"),
        ({"x": torch.zeros(2, 6, 3, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        (
            {"x": (torch.zeros(2, 6, 3, 3),)},
            ValueError,
            "x has 1 tensors, expected one, or",
        ),
        (
            {"x": (torch.zeros(2, 4, 3, 3), torch.zeros(2, 2, 3, 4))},
            ValueError,
            r"x\[1\] has shape \(2, 2, 3, 4\), expected \(2, 2, 3, 3\)",
        ),
        (
            {"x": (torch.zeros(2, 4, 3, 3), torch.zeros(2, 2, 3, 3).half())},
            TypeError,
            r"x\[1\] must be float32, got torch.float16",
        ),
        ({"x": torch.zeros(2, 0, 3, 3)}, ValueError, "groups = 3: expected a divisor of the 0"),
        ({"groups": 4}, ValueError, "groups = 4: expected a divisor of the 6 channels of x"),
        ({"groups": 0}, ValueError, "groups = 0: expected at least one group"),
        ({"groups": 1.5}, TypeError, "groups must be an integer"),
        ({"eps": -1.0}, ValueError, "eps = -1.0: expected a number that is not negative"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\), expected \(6,\)"),
        ({"bias": torch.zeros(6, 1)}, ValueError, r"bias has shape \(6, 1\), expected \(6,\)"),
        ({"bias": torch.zeros(6, dtype=torch.int8)}, TypeError, "bias must be float32"),
        ({"shift": torch.zeros(3, 6)}, ValueError, r"expected \(6,\) or \(2, 6\)"),
        ({"weight": torch.zeros(6, device="meta")}, ValueError, "weight .* is on meta"),
    ],
)
def test_bad_input(changes, error, message, backend):
    arguments = {"x": torch.zeros(2, 6, 3, 3), "weight": None, "bias": None, "groups": 3}
    with pytest.raises(error, match=message):
        group_norm(**arguments | changes)
