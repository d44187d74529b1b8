"""What Inductor would launch on an H100 for one transformer block, beside the fused form; needs no
GPU.

    python -m benchmarks.systems.inductor_blocks --helper lower.py --out
    benchmarks/results/inductor_blocks.jsonl

`--helper` and the bytes of generated kernels are those of `benchmarks.systems.inductor_comparison`.
A block of DiT-XL/2 at 256 px and the widest level of Stable Diffusion 1.5 at 512 px, in bf16:
without a tape, and its forward and backward pass, parted as AOT autograd parts them. Counted is
what is no product and no attention. Eager forms are counted by `dpfast.hardware.traffic`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.systems.inductor_comparison import _helper, traffic
from dpfast.cli.parser import Parser, in_one_line
from dpfast.generate.models.frozen_layers import Conditioned, fuse_projections, share_conditioning
from dpfast.generate.models.fused import alone, fuse
from dpfast.generate.models.fused.adaptive import FeedForward, Stream
from dpfast.generate.models.fused.projection import is_taped
from dpfast.generate.models.fused.transformer import FusedBlock
from dpfast.hardware.traffic import count_traffic
from dpfast.ops import dispatch
from dpfast.ops.traffic import FORMULAS

BF16 = torch.bfloat16


class Count(NamedTuple):
    """What is no product: launches, and the bytes that they move."""

    launches: int
    bytes: int


class Case(NamedTuple):
    """A block plain and fused: functions of the stream x and of what goes with it.

    compiled: the fused form as a region would compile it; between: the fused form between others
    of its kind.
    """

    name: str
    rows: int  # without a tape; half of them with one, as in a guided step
    inputs: Callable[[int], list[Tensor]]
    plain: Callable[..., Any]
    compiled: Callable[..., Any]
    between: Callable[..., Any]


class GpuFeedForward(FeedForward):
    """As on a GPU, traced on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if is_taped(x):
            return super().forward(x)
        bias, weight = self.into.bias, self.into.weight
        assert bias is not None
        rows = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
        return self.out(rows.unflatten(0, x.shape[:2]))


def _made(make: Callable[[], nn.Module], device: str) -> Any:
    with torch.device("meta"):
        module = make().to(BF16)
    module = module.to_empty(device=device).eval().requires_grad_(False)
    return fuse_projections(module)


def dit(device: str) -> Case:
    """A block in the middle of DiT-XL/2, of 256 tokens."""
    import diffusers

    def make() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            num_layers=2,
            sample_size=32,
            num_embeds_ada_norm=1000,
        )

    plain = share_conditioning(_made(make, device), 2).transformer_blocks[0]  # type: ignore[index,union-attr]
    fused = fuse(share_conditioning(_made(make, device), 2)).transformer_blocks[0]  # type: ignore[index,union-attr]
    if device == "cpu":
        fused.feed_forward.__class__ = GpuFeedForward
    single: Any = alone(fused)

    def inputs(rows: int) -> list[Tensor]:
        x = torch.empty(rows, 256, 1152, dtype=BF16, device=device)
        return [x, torch.empty(1, rows, 6912, dtype=BF16, device=device)]

    def between(x: Tensor, rows: Tensor) -> Any:
        stream = Stream(x, x.view_as(x), rows[0, :, :1152])
        return tuple(fused(stream, timestep=Conditioned(rows, rows[0]))[:2])

    def on(block: Any) -> Callable[..., Any]:
        return lambda x, rows: block(x, timestep=Conditioned(rows, rows[0]))

    return Case("DiT-XL/2", 64, inputs, on(plain), on(single), between)


def unet(device: str) -> Case:
    """A block of Stable Diffusion 1.5 with 320 channels, of 4096 tokens and 77 of text."""
    from diffusers.models.attention import BasicTransformerBlock

    plain = _made(lambda: BasicTransformerBlock(320, 8, 40, cross_attention_dim=768), device)
    fused = FusedBlock(plain, torch.zeros(320, device=device))

    def inputs(rows: int) -> list[Tensor]:
        x = torch.empty(rows, 4096, 320, dtype=BF16, device=device)
        return [x, torch.empty(rows, 77, 768, dtype=BF16, device=device)]

    return Case(
        "SD 1.5, 320 channels",
        32,
        inputs,
        lambda x, text: plain(x, encoder_hidden_states=text),
        fused,
        fused,
    )


def graphs(function: Callable[..., Any], given: list[Tensor], *, taped: bool) -> list[Any]:
    """What reaches Inductor: pairs of a graph and its inputs, one or, taped, forward and
    backward.
    """
    found: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        found.append((graph, [i.detach() for i in inputs]))
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(taped):
        x, *rest = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in given)
        run = aot_function(
            function,
            fw_compiler=keep,
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        out = run(x.requires_grad_(taped), *rest)
        if taped:
            out.backward(torch.empty_like(out))
    return found


def inductor(
    lower: Any, function: Callable[..., Any], given: list[Tensor], *, taped: bool
) -> Count:
    """The launches of Inductor's kernels and of ours that stay in its program."""
    launches = moved = 0
    for graph, inputs in graphs(function, given, taped=taped):
        fake = [torch.empty_strided(tuple(i.shape), i.stride(), dtype=i.dtype) for i in inputs]

        def call(*args: Tensor, graph: Any = graph) -> list[Tensor]:
            return [value for value in graph(*args) if value is not None]

        with torch.no_grad():
            report = lower(call, fake)
            table = select_decomp_table()
            trace = make_fx(call, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*fake)
        launches, moved = launches + len(report.kernels), moved + traffic(report.code)
        for node in trace.graph.nodes:
            packet = getattr(node.target, "overloadpacket", None)
            if packet in FORMULAS:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _value)
                _, formula = FORMULAS[packet]
                kernels = formula(*args, **kwargs, out=node.meta["val"])
                launches, moved = launches + len(kernels), moved + sum(kernels)
    return Count(launches, moved)


def _value(node: torch.fx.Node) -> Any:
    return node.meta["val"]


def eager(function: Callable[..., Any], given: list[Tensor], *, taped: bool) -> Count:
    """The launches of a call on meta tensors."""
    x, *rest = given

    def call() -> None:
        with torch.set_grad_enabled(taped):
            leaf = x.detach().requires_grad_(taped)
            out = function(leaf, *rest)
            if taped:
                results = out if isinstance(out, tuple) else (out,)
                torch.autograd.grad(results, leaf, [torch.empty_like(r) for r in results])

    kernels = [k for k in count_traffic(call).kernels if k.kind != "product"]
    return Count(len(kernels), sum(kernel.bytes for kernel in kernels))


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helper", type=Path, required=True, help="file with the function lower")
    parser.add_argument("--out", type=Path, required=True, help="one JSON object a line")
    options = parser.parse_args()
    lower = _helper(options.helper).lower
    lines = []
    print("| block | pass | plain, eager | plain, Inductor | fused, Inductor | fused, eager |")
    print("|---|---|---|---|---|---|")
    for make in (dit, unet):
        on_meta = make("meta")
        for taped in (False, True):
            rows = on_meta.rows // 2 if taped else on_meta.rows
            given = on_meta.inputs(rows)
            found = {
                "plain, eager": eager(on_meta.plain, given, taped=taped),
                "fused, eager": eager(on_meta.between, given, taped=taped),
            }
            # make_fx is no compilation to torch: the operations stay whole
            kept = dispatch.traced, dispatch.has_kernels
            dispatch.traced, dispatch.has_kernels = _always, _always
            case = make("cpu")
            for name, function in (("plain", case.plain), ("fused", case.compiled)):
                found[f"{name}, Inductor"] = inductor(
                    lower, function, case.inputs(rows), taped=taped
                )
            dispatch.traced, dispatch.has_kernels = kept
            passes = f"{'forward and backward' if taped else 'without a tape'}, {rows} rows"
            order = ("plain, eager", "plain, Inductor", "fused, Inductor", "fused, eager")
            cells = [f"{found[n].launches}, {found[n].bytes / 1e6:.0f} MB" for n in order]
            print(f"| {case.name} | {passes} | {' | '.join(cells)} |", flush=True)
            counts = {name: count._asdict() for name, count in found.items()}
            record = {"block": case.name, "taped": taped, "rows": rows, "torch": torch.__version__}
            lines.append(json.dumps(record | counts))
    options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


def _always(*_: Any) -> bool:
    return True


if __name__ == "__main__":
    sys.exit(in_one_line("inductor_blocks", main))
