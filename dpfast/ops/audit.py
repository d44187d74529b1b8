"""An audit of the Triton kernels' machine code for a GPU; it needs Triton's Linux wheel and no GPU.

Each variant is compiled for A100 (sm_80), H100 (sm_90) and B200 (sm_100) and disassembled with the
tools in that wheel.
`problems` lists what breaks a promise: a spill or local memory, an occupancy under one half, and
payload that does not move exactly once in accesses of 16 bytes, or the widest that the alignment of
a row permits.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpfast.ops import dispatch, gather, noise
from dpfast.ops.bias_residual import BLOCK, bias_residual_kernel
from dpfast.ops.entropy import ONE_BLOCK, online_kernel, rows_kernel
from dpfast.ops.entropy import settings as entropy_settings
from dpfast.ops.gate_norm_modulate import backward_kernel as gate_norm_backward_kernel
from dpfast.ops.gate_norm_modulate import gate_norm_modulate_kernel
from dpfast.ops.gate_norm_modulate import settings as gate_norm_settings
from dpfast.ops.geglu import geglu_backward_kernel, geglu_kernel
from dpfast.ops.geglu import settings as geglu_settings
from dpfast.ops.group_norm.triton import WARPS as GROUP_NORM_WARPS
from dpfast.ops.group_norm.triton import (
    apply_kernel,
    backward_coefficients_kernel,
    backward_kernel,
    backward_sums_kernel,
    coefficients_kernel,
    group_settings,
    moments_kernel,
)
from dpfast.ops.group_norm.triton import settings as group_norm_settings
from dpfast.ops.guided_step import triton as guided
from dpfast.ops.quantise import quantise_kernel
from dpfast.ops.quantise import settings as quantise_settings
from dpfast.ops.relu_chain import BLOCK as RELU_BLOCK
from dpfast.ops.relu_chain import relu_backward_kernel
from dpfast.ops.triton_stub import next_power, triton

CAPABILITIES = (80, 90, 100)
FLOAT8_LEAST = 90
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # of one multiprocessor
# Of one multiprocessor, alike on the three.
THREADS = 2048
REGISTERS = 65536
BLOCKS = 32
WIDE = 16


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with the types and constants of one use.

    `arguments` maps a parameter to a type ("*fp32", "i32", "i64:16" for a multiple of 16) or a
    constant; one left out is None. `reads` and `writes` are the payload bytes of a program by the
    operation's formula, in accesses of `width` bytes. `scalars` bounds the narrow loads of a
    thread: coefficients, indices, ids. Multiprocessors before `least` lack what the kernel needs.
    `stages`: iterations of a loop whose loads are under way at once.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    reads: int
    writes: int
    width: int = WIDE
    scalars: int = 0
    least: int = min(CAPABILITIES)
    stages: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Resources of a compiled variant, and its global accesses: width in bytes -> instructions.

    assembly: its machine code, as text.
    """

    variant: Variant
    capability: int
    registers: int
    local_bytes: int
    shared_bytes: int
    occupancy: float
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    assembly: str = field(default="", repr=False)

    def payload(self, accesses: Counter[int]) -> int:
        """Returns bytes that a program moves in accesses of the promised width."""
        width = self.variant.width
        return accesses[width] * width * self.variant.warps * 32


def _binary(tool: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool


def missing() -> str | None:
    """Returns the reason why nothing can be audited here, or None."""
    if not dispatch.has_triton() or not all(
        _binary(tool).is_file() for tool in ("ptxas", "cuobjdump", "nvdisasm")
    ):
        return (
            "the audit needs the compiler and the disassembler of Triton's Linux wheel: pip "
            "install triton"
        )
    if dispatch.INTERPRETED:
        return (
            "the audit compiles the kernels, which TRITON_INTERPRET=1 replaces by its "
            "interpreter: unset it"
        )
    return None


def _toolchain(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_binary(tool)), *arguments], check=True, capture_output=True, encoding="utf-8"
    ).stdout


def occupancy(registers: int, shared_bytes: int, warps: int, capability: int) -> float:
    """Returns resident warps over the most that a multiprocessor holds; registers come in units of
    256 a warp.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    by_shared = SHARED_BYTES[capability] // (shared_bytes + 1024)  # the system keeps 1 KiB a block
    return min(by_registers, by_shared, BLOCKS, THREADS // (32 * warps)) * warps * 32 / THREADS


def inspect(variant: Variant, capability: int) -> Report:
    """Compiles one variant for `capability` (80, 90 or 100) and reads its resources and
    accesses.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    arguments = {name: variant.arguments.get(name) for name in names}
    types = {
        n: v.split(":")[0] if isinstance(v, str) else "constexpr" for n, v in arguments.items()
    }
    constants = {(names.index(n),): v for n, v in arguments.items() if not isinstance(v, str)}
    divisible = [
        (isinstance(value, str) and value.startswith("*")) or str(value).endswith(":16")
        for value in arguments.values()
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i, by_16 in enumerate(divisible) if by_16}
    source = ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=aligned)
    # Contraction to fused multiply-adds is the launchers' default; Triton's own depends on its
    # version.
    options: dict[str, Any] = {"num_warps": variant.warps, "enable_fp_fusion": True}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _toolchain("cuobjdump", "--dump-resource-usage", str(cubin))
        assembly = _toolchain("nvdisasm", "-c", str(cubin))
    numbers = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    }
    spills = re.search(r"\b(?:LDL|STL)\b", assembly)
    shared = compiled.metadata.shared
    return Report(
        variant=variant,
        capability=capability,
        registers=numbers["REG"],
        # A frame that no instruction reads or writes costs nothing.
        local_bytes=numbers["LOCAL"] + (numbers["STACK"] if spills else 0),
        shared_bytes=shared,
        occupancy=occupancy(numbers["REG"], shared, variant.warps, capability),
        loads=_widths("LDG", assembly),
        stores=_widths("STG", assembly),
        assembly=assembly,
    )


def _widths(instruction: str, assembly: str) -> Counter[int]:
    widths: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{instruction}\b((?:\.\w+)*)", assembly):
        parts = suffixes.split(".")
        bits = next((int(part) for part in parts if part in ("64", "128", "256")), None)
        narrow = (
            1
            if parts[-1] in ("U8", "S8") or "U8" in parts
            else 2
            if "U16" in parts or "S16" in parts
            else 4
        )
        widths[bits // 8 if bits else narrow] += 1
    return widths


def problems(report: Report) -> list[str]:
    """Returns the promises that a report breaks; empty for a good kernel."""
    variant, found = report.variant, []
    if report.local_bytes:
        found.append(f"{report.local_bytes} bytes of local memory (spills)")
    if report.occupancy < 0.5:
        found.append(f"occupancy {report.occupancy:.0%} with {report.registers} registers a thread")
    for word, accesses, expected in (
        ("reads", report.loads, variant.reads),
        ("writes", report.stores, variant.writes),
    ):
        if report.payload(accesses) != expected:
            moved = f"{report.payload(accesses)} bytes in accesses of {variant.width}"
            found.append(f"{word} {moved}, the formula has {expected}")
    narrow = sum(count for width, count in report.loads.items() if width < variant.width)
    if narrow > variant.scalars:
        found.append(f"{narrow} narrow loads a thread, {variant.scalars} are scalars")
    return found


def _entropy(classes: int, dtype: str, gradient: bool = True) -> Variant:
    rows, block, warps = entropy_settings(classes)
    size, unit = 4 if dtype == "fp32" else 2, math.gcd(classes, 16)
    online = classes > ONE_BLOCK
    width = math.gcd(classes * size, WIDE)
    # H takes a 4-byte store a thread, which only counts where the gradient's are no wider.
    entropies = warps * 32 * 4 if width == 4 else 0
    arguments = {
        "logits": f"*{dtype}",
        "entropy": "*fp32",
        "dlogits": f"*{dtype}",
        "rows": "i32",
        "stride_units": "i32",
        "inverse_temperature": "fp32",
        "CLASSES": classes,
        "UNIT": unit,
        "GRADIENT": gradient,
        "ROWS": rows,
        "BLOCK": block,
    }
    return Variant(
        name=f"entropy{'' if gradient else ', value only'}, K = {classes}, {dtype}",
        kernel=online_kernel if online else rows_kernel,
        arguments=arguments,
        warps=warps,
        reads=(1 + (online and gradient)) * rows * block * size,
        writes=rows * block * size * gradient + entropies,
        width=width,
    )


def guided_variant(name: str, elements: int, dtype: str = "fp32", **changes: Any) -> Variant:
    size = 4 if dtype == "fp32" else 2
    chunks, block, warps = guided.settings(
        elements, size, changes.get("LIMIT") == 2, "ids" in changes, "anchor" in changes
    )
    parts = -(-elements // (chunks * block))
    hold = "anchor" in changes and elements <= guided.HELD
    # The predictions a second time, from the cache: the registers do not suffice.
    again = "anchor" in changes and not hold and parts == 1
    arguments = {
        **dict.fromkeys(("x", "pred_cond", "pred_uncond", "grad", "out"), f"*{dtype}"),
        **{
            "table": "*fp32",
            "steps": "i32",
            "step": "*i64",
            "cfg_scale": "*fp32",
            "omega": "*fp32",
        },
        **{"partials": "*fp32" if parts > 1 else None, "bound": "fp32", "below": "i32"},
        **{
            "fraction": "fp32",
            "maximum": "fp32",
            "ELEMENTS": elements,
            "STEP_AT": True,
            "SEED_AT": True,
        },
        **{
            "CFG_STRIDE": 0,
            "OMEGA_STRIDE": 0,
            "ANCHOR_STRIDE": 0,
            "HOLD": hold,
            "RELATIVE": True,
            "PREDICTION": 1,
            "LIMIT": 0,
        },
        **{"PARTS": next_power(parts), "CHUNKS": chunks, "BLOCK": block, "seed": "*i64", **changes},
    }
    payload = chunks * block * size
    inputs = sum(
        arguments.get(name) is not None
        for name in ("x", "pred_cond", "pred_uncond", "grad", "x0_prev")
    )
    outputs = sum(arguments.get(name) is not None for name in ("out", "x0_out"))
    return Variant(
        name=f"guided_step, {name}, n = {elements}, {dtype}",
        kernel=guided.guided_step_kernel,
        arguments=arguments,
        warps=warps,
        reads=(inputs + 2 * again) * payload,
        writes=outputs * payload,
        width=min(WIDE, block // (warps * 32) * size),
        scalars=24,
    )


def _norms(anchored: bool = False) -> Variant:
    names = ("x", "grad", *(("pred_cond", "pred_uncond") if anchored else ()))
    return Variant(
        name=f"guided_step, norms{', anchor' if anchored else ''}, n = 65536, fp32",
        kernel=guided.norms_kernel,
        arguments={
            **dict.fromkeys((*names, "partials"), "*fp32"),
            **{"ELEMENTS": 65536, "BLOCK": guided.SPLIT},
        },
        warps=guided.settings(65536, 4)[2],
        reads=len(names) * 4 * guided.SPLIT,
        writes=0,
    )


def _gather(name: str, dtype: str, channels_last: bool, flip: bool) -> Variant:
    group, planes, pixels = gather.settings(3, 64, 64, channels_last)
    count, access = 3 if channels_last else 1, WIDE * 32 * gather.WARPS

    def whole(size: int) -> int:
        """Returns the bytes with the lanes that three planes in a tile of four leave idle: rounded
        up to an access of all threads.
        """
        return -(-size // access) * access

    arguments = {
        **{
            "store": "*u8",
            "indices": "*i64",
            "flip": "*u8" if flip else None,
            "scale": "*fp32",
            "bias": "*fp32",
        },
        **{
            "out": f"*{dtype}",
            "rows": "i64",
            "row_stride": "i64:16",
            "CHANNELS": 3,
            "HEIGHT": 64,
            "WIDTH": 64,
        },
        **{
            "CHANNELS_LAST": channels_last,
            "FLIP": flip,
            "GROUP": group,
            "PLANES": planes,
            "PIXELS": pixels,
        },
    }
    return Variant(
        name=f"gather, {name}, {dtype}",
        kernel=gather.gather_kernel,
        arguments=arguments,
        warps=gather.WARPS,
        reads=whole(count * pixels),
        writes=whole(count * pixels * (4 if dtype == "fp32" else 2)),
        scalars=8,
    )


def _geglu(channels: int, backward: bool) -> Variant:
    rows, block = geglu_settings(channels, backward)
    size = 2 * rows * block
    tensors = ("x", "dy", "dx") if backward else ("x", "out")
    return Variant(
        name=f"geglu{', backward' if backward else ''}, C = {channels}, bf16",
        kernel=geglu_backward_kernel if backward else geglu_kernel,
        arguments={
            **dict.fromkeys(tensors, "*bf16"),
            **{"rows": "i32", "C": channels, "ROWS": rows, "BLOCK": block},
        },
        warps=4,
        reads=3 * size if backward else 2 * size,
        writes=2 * size if backward else size,
    )


def _bias_residual(channels: int) -> Variant:
    return Variant(
        name=f"bias_residual, C = {channels}, bf16",
        kernel=bias_residual_kernel,
        arguments={
            **dict.fromkeys(("x", "bias", "residual", "out"), "*bf16"),
            **{"elements": "i32:16", "C": channels, "BLOCK": BLOCK},
        },
        warps=4,
        reads=3 * BLOCK * 2,  # the bias too, but from the cache
        writes=BLOCK * 2,
    )


def _relu_backward(more: bool) -> Variant:
    size = 2 * RELU_BLOCK
    tensors = ("dy", "y", "dz", *(["more"] if more else []))
    return Variant(
        name=f"relu_chain, backward{', residual' if more else ''}, bf16",
        kernel=relu_backward_kernel,
        arguments={
            **dict.fromkeys(tensors, "*bf16"),
            **{"elements": "i32:16", "BLOCK": RELU_BLOCK},
        },
        warps=4,
        reads=(2 + more) * size,
        writes=size,
    )


def gate_norm_variant(name: str, channels: int, given: str, *, backward: bool = False) -> Variant:
    """Returns a launch of the kernel. given: the arguments that are not None, separated by
    spaces.
    """
    names = given.split()
    block, warps = gate_norm_settings(channels, backward)
    row = block * 2
    vectors = {"gate", "offset", "weight", "bias", "scale", "shift"} & set(names)
    if backward:
        tensors: tuple[str, ...] = ("u", "dy", "dx", "dbranch")
        streams = 2 + ("dstream" in names)
        writes = 1 + ("gate" in names)
    else:
        tensors = ("x", "stream", "out")
        streams = writes = 1 + ("branch" in names)
    eight = "scales" in names  # out in float8: half a row
    return Variant(
        name=f"gate_norm_modulate, {name}, D = {channels}, bf16",
        kernel=gate_norm_backward_kernel if backward else gate_norm_modulate_kernel,
        arguments={
            **dict.fromkeys((*tensors, *names), "*bf16"),
            **({"out": "*fp8e4nv", "scales": "*fp32"} if eight else {}),
            **{"tokens": "i32", "stride": "i32:16", "eps": "fp32", "D": channels, "BLOCK": block},
        },
        warps=warps,
        reads=(streams + len(vectors)) * row,  # rows of a sample and vectors from the cache
        writes=writes * row - eight * block,
        least=FLOAT8_LEAST if eight else min(CAPABILITIES),
    )


def _quantise(channels: int, gelu: bool) -> Variant:
    block, warps = quantise_settings(channels)
    return Variant(
        name=f"quantise{', gelu' if gelu else ''}, D = {channels}, bf16",
        kernel=quantise_kernel,
        arguments={
            **{"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"},
            **{"GELU": gelu, "D": channels, "BLOCK": block},
        },
        warps=warps,
        reads=2 * block,
        writes=block,
        least=FLOAT8_LEAST,
    )


GROUP_NORM_KERNELS = {  # and how many channel vectors in fp32 each reads beside x, dy and dx
    "moments": (moments_kernel, 0),
    "apply": (apply_kernel, 2),
    "backward sums": (backward_sums_kernel, 2),
    "backward": (backward_kernel, 4),
    "backward, residual": (backward_kernel, 4),
}


def group_norm_variant(
    name: str, channels: tuple[int, ...], pixels: int, dtype: str = "bf16", **changes: Any
) -> Variant:
    """Returns a launch over one or two sources of so many channels, with every vector and a
    SiLU.
    """
    kernel, vectors = GROUP_NORM_KERNELS[name]
    size = 4 if dtype == "fp32" else 2
    backward = name.startswith("backward")
    rows, chunks, block = group_norm_settings(max(channels), pixels, size, backward)
    two = f"*{dtype}" if len(channels) == 2 else None
    more = name == "backward, residual"
    arguments = {
        **dict.fromkeys(("first", "dy", "bias", "out", "dfirst"), f"*{dtype}"),
        **dict.fromkeys(("partials", "coefficients", "gradients"), "*fp32"),
        **{"vfirst": f"*{dtype}" if more else None, "vsecond": two if more else None},
        **{"second": two, "dsecond": two, "pixels": "i32", "parts": "i32", "SILU": True},
        **{"C1": channels[0], "C2": sum(channels[1:]), "BLOCK": block},
        **{"ROWS": rows, "CHUNKS": 1 if more else chunks, **changes},
    }
    arguments = {name: arguments[name] for name in kernel.arg_names}
    payload = rows * arguments["CHUNKS"] * block * size
    # A thread reads the coefficients of its own channels, as many as are 16 bytes of a tensor.
    beside = vectors * WIDE // size * 4 + ("bias" in arguments) * WIDE
    return Variant(
        name=f"group_norm, {name}, C = {' + '.join(map(str, channels))}, {pixels} px, {dtype}",
        kernel=kernel,
        arguments=arguments,
        warps=GROUP_NORM_WARPS,
        reads=(1 + backward + more) * payload + beside * GROUP_NORM_WARPS * 32,
        writes=payload * ("partials" not in arguments),
    )


def _group_coefficients(group: int, channels: int, parts: int, backward: bool) -> Variant:
    """Returns the launch in the middle. What it reads is no payload, but sums of a group's
    channels: in accesses of 16 bytes where groups begin at multiples of them and there is enough
    for each thread, in narrower ones elsewhere.
    """
    kernel = backward_coefficients_kernel if backward else coefficients_kernel
    at_a_time, block = group_settings(group, parts)
    arguments = {
        **dict.fromkeys(("weight", "bias", "shift"), "*bf16"),
        **dict.fromkeys(("partials", "moments", "coefficients"), "*fp32"),
        **{"pixels": "i32", "parts": "i32", "span": "i32", "eps": "fp32"},
        **{"C": channels, "GROUP": group, "SHIFT_STRIDE": channels},
        **{"PARTS": at_a_time, "BLOCK": block},
    }
    wide = at_a_time * block * 4 // (4 * 32)
    word = "backward coefficients" if backward else "coefficients"
    return Variant(
        name=f"group_norm, {word}, groups of {group}, {parts} parts",
        kernel=kernel,
        arguments={name: arguments[name] for name in kernel.arg_names},
        warps=4,
        reads=0 if group % 4 or wide < WIDE else (2 if backward else 3) * at_a_time * block * 4,
        writes=0,
        scalars=40,
    )


def variants() -> list[Variant]:
    """Returns the uses that the audit promises something about."""
    noise_arguments = {
        "ids": "*i64",
        "out": "*fp32",
        "seed": "*i64",
        "stream": "*i64",
        "ELEMENTS": 16384,
    }
    noise_arguments |= {"SEED_AT": True, "STREAM_AT": True, "WORDS": False, "BLOCK": noise.BLOCK}
    anchor = {"anchor": "*fp32"}
    every = {"x0_prev": "*fp32", "x0_out": "*fp32", "ids": "*i64", "skipped": "*i64"}
    return [
        *(_entropy(classes, "fp32") for classes in (10, 100, 1000, 16384, 128256)),
        *(_entropy(classes, "bf16") for classes in (10, 100)),
        *(_entropy(classes, dtype) for dtype in ("fp16", "bf16") for classes in (1000, 128256)),
        _entropy(1000, "fp32", gradient=False),
        guided_variant("plain", 16384, pred_uncond=None, grad=None),
        guided_variant("CFG", 16384, grad=None),
        *(guided_variant("CFG, relative", elements) for elements in (4096, 16384, 65536)),
        guided_variant("CFG, relative", 16384, "bf16"),
        guided_variant("CFG, score, flow", 16384, RELATIVE=False, PREDICTION=3),
        guided_variant("CFG, relative, noise", 16384, ids="*i64"),
        guided_variant("every term", 16384, **every),
        guided_variant("every term, clip", 16384, LIMIT=1, **every),
        *(
            guided_variant("dynamic threshold, every term", elements, LIMIT=2, **every)
            for elements in (8192, 16384)
        ),
        guided_variant("dynamic threshold", 16384, LIMIT=2),
        # A step of 4 bytes, because one of 8 would count as payload here.
        guided_variant("dynamic threshold", 16384, "bf16", LIMIT=2, step="*i32"),
        guided_variant(
            "dynamic threshold, score, epsilon",
            16384,
            LIMIT=2,
            RELATIVE=False,
            PREDICTION=0,
            **every,
        ),
        # A dynamic threshold of longer samples: x0 alone, then torch.topk, then the step with the
        # bounds.
        _norms(),
        guided_variant("dynamic threshold, first pass", 65536, out=None, x0_out="*fp32"),
        guided_variant(
            "dynamic threshold, second pass, every term", 65536, LIMIT=3, **every, bound="*fp32"
        ),
        *(
            guided_variant("CFG, relative, anchor", elements, **anchor)
            for elements in (4096, 8192, 16384, 65536)
        ),
        guided_variant("CFG, relative, anchor", 8192, "bf16", **anchor),
        guided_variant("CFG, relative, anchor", 16384, "bf16", **anchor, step="*i32"),
        guided_variant("CFG, score, flow, anchor", 16384, RELATIVE=False, PREDICTION=3, **anchor),
        *(
            guided_variant(f"{name}every term, anchor", elements, LIMIT=limit, **every, **anchor)
            for name, limit in (("", 0), ("clip, ", 1), ("dynamic threshold, ", 2))
            for elements in (8192, 16384)
        ),
        _norms(anchored=True),
        Variant(
            name="normal",
            kernel=noise.normal_kernel,
            arguments=noise_arguments,
            warps=noise.BLOCK // 256,
            reads=0,
            writes=noise.BLOCK * 4,
            scalars=3,
        ),
        # Stable Diffusion 1.5 at 512 px: the first level, a skip connection of the lowest, the VAE.
        *(
            group_norm_variant(name, channels, pixels, dtype)
            for channels, pixels, dtype in (
                ((320,), 4096, "bf16"),
                ((320,), 4096, "fp32"),
                ((1280, 640), 256, "bf16"),
                ((128,), 512 * 512, "bf16"),
            )
            for name in GROUP_NORM_KERNELS
        ),
        *(
            _group_coefficients(*use, backward)
            for use in ((10, 320, 32), (60, 1920, 2), (4, 128, 2048))
            for backward in (False, True)
        ),
        *(_gather("NCHW", dtype, False, False) for dtype in ("fp32", "bf16")),
        *(_gather("NCHW, flip", dtype, False, True) for dtype in ("fp32", "bf16")),
        *(_gather("NHWC", dtype, True, False) for dtype in ("fp32", "bf16")),
        *(_gather("NHWC, flip", dtype, True, True) for dtype in ("fp32", "bf16")),
        # Stable Diffusion 1.5 has widths of 320, 640 and 1280, DiT-XL/2 of 1152.
        *(_geglu(channels, backward) for channels in (1280, 5120) for backward in (False, True)),
        *(_bias_residual(channels) for channels in (128, 320, 1280)),
        *(_relu_backward(more) for more in (False, True)),
        gate_norm_variant("DiT, first", 1152, "scale shift"),
        gate_norm_variant("DiT, between", 1152, "branch gate scale shift"),
        gate_norm_variant("DiT, first, float8", 1152, "scale shift scales"),
        gate_norm_variant("DiT, between, float8", 1152, "branch gate scale shift scales"),
        _quantise(1152, gelu=False),
        _quantise(4608, gelu=True),
        gate_norm_variant("DiT, backward", 1152, "dstream gate scale", backward=True),
        *(gate_norm_variant("UNet", width, "offset weight bias") for width in (320, 1280)),
        gate_norm_variant("UNet, between", 1280, "branch weight bias"),
        gate_norm_variant("UNet, backward", 1280, "dstream weight", backward=True),
    ]


def audit(
    chosen: Iterable[Variant] | None = None, capabilities: Sequence[int] = CAPABILITIES
) -> list[Report]:
    """Returns reports for `chosen` variants, all by default, on each of `capabilities` that they
    run on.
    """
    return [
        inspect(variant, capability)
        for variant in chosen or variants()
        for capability in capabilities
        if capability >= variant.least
    ]


def record(report: Report) -> dict[str, Any]:
    """Returns one report as a JSON object; `loads` and `stores` map a width in bytes to a thread's
    instructions.
    """
    variant = report.variant
    return {
        "kernel": variant.name,
        "capability": report.capability,
        "warps": variant.warps,
        "registers": report.registers,
        "local_bytes": report.local_bytes,
        "shared_bytes": report.shared_bytes,
        "occupancy": report.occupancy,
        "loads": dict(sorted(report.loads.items())),
        "stores": dict(sorted(report.stores.items())),
        "problems": problems(report),
    }


def table(reports: Iterable[Report]) -> str:
    """Returns the reports as a Markdown table."""
    lines = [
        "| kernel | GPU | registers | local bytes | shared bytes "
        "| occupancy | loads | stores | promises |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        loads, stores = (
            " + ".join(
                f"{count} x {width} B" for width, count in sorted(accesses.items(), reverse=True)
            )
            or "-"
            for accesses in (report.loads, report.stores)
        )
        lines.append(
            f"| {report.variant.name} | sm_{report.capability} | {report.registers} | "
            f"{report.local_bytes} | "
            f"{report.shared_bytes} | {report.occupancy:.0%} | {loads} | {stores} | "
            f"{'; '.join(problems(report)) or 'kept'} |"
        )
    return "\n".join(lines)
