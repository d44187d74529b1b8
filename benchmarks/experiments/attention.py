"""Attention at head sizes that are no power of two, with the lanes that they need and few more.

    s = q k^T / sqrt d,   p = softmax(s),   out = p v
    dv = p^T dout,   ds = p (dout v^T - rowsum(out dout))
    dq = ds k / sqrt d,   dk = ds^T q / sqrt d

Tensor cores take 16 lanes at a time and Triton's tiles powers of two, so a kernel of one tile pads
40 to 64 and 72 and 80 to 128. Here a head is two tiles, a wide and a narrow one: 32 + 16, 64 + 16.
Neither the scores nor p are ever in memory: keys come block by block, with the running maximum and
sum of each row (online softmax), and the backward pass computes p again from the rows' logarithms
of sums. Written from the published algorithm (Dao et al., "FlashAttention", 2022, algorithms 1 and
4; Dao, "FlashAttention-2", 2023, algorithms 1 and 2); nothing is copied.

The backward pass has two forms. In two passes, one over the keys of each query and one over the
queries of each key, bits repeat, for seven products and two exponentials of a score. In one pass it
is five and one, but the gradient of q is summed in memory by atomics, as in the libraries, and its
bits need not repeat.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.ops.triton_stub import next_power, tl, triton

LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
LANES = 16  # of a product on tensor cores
INF = float("inf")


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, warps of a program, and blocks that are under way at once.

    whole: what has one padded tile in the place of two: "" nothing, "values", whose products then
    have one wide result in the place of two narrow ones, or "all", as a kernel without the idea.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    whole: Literal["", "values", "all"] = ""

    def __str__(self) -> str:
        size = f"{self.queries} x {self.keys}, {self.warps} warps, {self.stages} stages"
        return f"{size}, {self.whole} whole" if self.whole else size


FORWARD = (
    Tiles(64, 64, 4, 3),
    Tiles(128, 64, 4, 3),
    Tiles(64, 64, 4, 3, "values"),
    Tiles(64, 64, 4, 3, "all"),
    Tiles(128, 64, 8, 3),
    Tiles(128, 128, 8, 2),
)
# of the pass over the keys of each query, and of that over the queries of each key
BACKWARD = (
    (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
)


def lanes(head_size: int) -> tuple[int, int]:
    """The widths of the two tiles of a head, zero lanes included.

    Raises ``InputError`` for a head that one tile holds, or whose rows are not aligned.
    """
    wide = next_power(head_size + 1) // 2
    if wide == head_size or head_size < LANES or head_size % 8:
        raise InputError(
            f"head_size = {head_size}: expected a multiple of 8 above 16 that is no power of two"
        )
    return wide, max(LANES, next_power(head_size - wide))


@triton.jit
def _dot(a, b, total=None):
    """a b + total; the interpreter knows no product of bf16, which is exact in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _tile(
    source, row, stride, rows, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, EVEN
):
    """Lanes FIRST to FIRST + COUNT of some rows; zero beyond D lanes, and beyond the rows unless
    their blocks are EVEN.
    """
    lane = FIRST + tl.arange(0, COUNT)[None, :]
    at = source + row[:, None] * stride + lane
    if EVEN:
        return tl.load(at, mask=lane < D, other=0.0) if FIRST + COUNT > D else tl.load(at)
    else:
        return tl.load(at, mask=(row[:, None] < rows) & (lane < D), other=0.0)


@triton.jit
def _store(
    target, row, stride, rows, value, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr
):
    lane = FIRST + tl.arange(0, COUNT)[None, :]
    inside = (row[:, None] < rows) & (lane < D)
    at = target + row[:, None] * stride + lane
    tl.store(at, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    logs,
    q_sample,
    q_token,
    k_sample,
    k_token,
    v_sample,
    v_token,
    queries,
    keys,
    factor,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    V_WIDE: tl.constexpr,
    V_NARROW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """M queries of a head of a sample; logs: of the rows' sums to base 2, for a backward pass."""
    blocks = tl.cdiv(queries, M)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    column = (head % H) * D
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    q += sample * q_sample + column
    k += sample * k_sample + column
    v += sample * v_sample + column
    q_wide = _tile(q, row, q_token, queries, 0, WIDE, D, False)
    if NARROW:
        q_narrow = _tile(q, row, q_token, queries, WIDE, NARROW, D, False)
    largest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    wide = tl.zeros((M, V_WIDE), tl.float32)
    if V_NARROW:
        narrow = tl.zeros((M, V_NARROW), tl.float32)
    for start in range(0, keys, N):
        key = start + tl.arange(0, N)
        k_wide = _tile(k, key, k_token, keys, 0, WIDE, D, EVEN)
        s = _dot(q_wide, tl.trans(k_wide))
        if NARROW:
            k_narrow = _tile(k, key, k_token, keys, WIDE, NARROW, D, EVEN)
            s = _dot(q_narrow, tl.trans(k_narrow), s)
        if not EVEN:
            s = tl.where(key[None, :] < keys, s, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - largest[:, None])
        shrunk = tl.exp2(before - largest)
        total = total * shrunk + tl.sum(p, 1)
        v_wide = _tile(v, key, v_token, keys, 0, V_WIDE, D, EVEN)
        p = p.to(v.dtype.element_ty)
        wide = _dot(p, v_wide, wide * shrunk[:, None])
        if V_NARROW:
            v_narrow = _tile(v, key, v_token, keys, V_WIDE, V_NARROW, D, EVEN)
            narrow = _dot(p, v_narrow, narrow * shrunk[:, None])
    out += sample * queries * (H * D) + column
    _store(out, row, H * D, queries, wide / total[:, None], 0, V_WIDE, D)
    if V_NARROW:
        _store(out, row, H * D, queries, narrow / total[:, None], V_WIDE, V_NARROW, D)
    if logs is not None:
        at = logs + head.to(tl.int64) * queries + row
        tl.store(at, largest + tl.log2(total), mask=row < queries)


@triton.jit
def products_kernel(
    out,
    dout,
    sums,
    d_sample,
    d_token,
    queries,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    M: tl.constexpr,
):
    """The sum of out dout over a head, of M queries."""
    blocks = tl.cdiv(queries, M)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    column = (head % H) * D
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    out += sample * queries * (H * D) + column
    dout += sample * d_sample + column
    left = _tile(out, row, H * D, queries, 0, WIDE, D, False).to(tl.float32)
    total = tl.sum(left * _tile(dout, row, d_token, queries, 0, WIDE, D, False), 1)
    left = _tile(out, row, H * D, queries, WIDE, NARROW, D, False).to(tl.float32)
    total += tl.sum(left * _tile(dout, row, d_token, queries, WIDE, NARROW, D, False), 1)
    tl.store(sums + head.to(tl.int64) * queries + row, total, mask=row < queries)


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    dout,
    logs,
    sums,
    dq,
    q_sample,
    q_token,
    k_sample,
    k_token,
    v_sample,
    v_token,
    d_sample,
    d_token,
    queries,
    keys,
    factor,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dq of M queries of a head, over all keys."""
    blocks = tl.cdiv(queries, M)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    column = (head % H) * D
    row = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    q += sample * q_sample + column
    k += sample * k_sample + column
    v += sample * v_sample + column
    dout += sample * d_sample + column
    q_wide = _tile(q, row, q_token, queries, 0, WIDE, D, False)
    q_narrow = _tile(q, row, q_token, queries, WIDE, NARROW, D, False)
    d_wide = _tile(dout, row, d_token, queries, 0, WIDE, D, False)
    d_narrow = _tile(dout, row, d_token, queries, WIDE, NARROW, D, False)
    at = head.to(tl.int64) * queries + row
    log = tl.load(logs + at, mask=row < queries, other=0.0)
    inner = tl.load(sums + at, mask=row < queries, other=0.0)
    wide = tl.zeros((M, WIDE), tl.float32)
    narrow = tl.zeros((M, NARROW), tl.float32)
    for start in range(0, keys, N):
        key = start + tl.arange(0, N)
        k_wide = _tile(k, key, k_token, keys, 0, WIDE, D, EVEN)
        k_narrow = _tile(k, key, k_token, keys, WIDE, NARROW, D, EVEN)
        s = _dot(q_wide, tl.trans(k_wide))
        s = _dot(q_narrow, tl.trans(k_narrow), s)
        p = tl.exp2(s * factor - log[:, None])
        if not EVEN:  # an infinity times a zero key
            p = tl.where(key[None, :] < keys, p, 0.0)
        v_wide = _tile(v, key, v_token, keys, 0, WIDE, D, EVEN)
        v_narrow = _tile(v, key, v_token, keys, WIDE, NARROW, D, EVEN)
        dp = _dot(d_wide, tl.trans(v_wide))
        dp = _dot(d_narrow, tl.trans(v_narrow), dp)
        ds = (p * (dp - inner[:, None])).to(k.dtype.element_ty)
        wide = _dot(ds, k_wide, wide)
        narrow = _dot(ds, k_narrow, narrow)
    dq += sample * queries * (H * D) + column
    _store(dq, row, H * D, queries, wide * scale, 0, WIDE, D)
    _store(dq, row, H * D, queries, narrow * scale, WIDE, NARROW, D)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    dout,
    logs,
    sums,
    dq,
    dk,
    dv,
    q_sample,
    q_token,
    k_sample,
    k_token,
    v_sample,
    v_token,
    d_sample,
    d_token,
    queries,
    keys,
    factor,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dk and dv of N keys of a head, over all queries; to dq, in fp32, their share is added if it
    is there.
    """
    blocks = tl.cdiv(keys, N)
    head = tl.program_id(0) // blocks
    sample = (head // H).to(tl.int64)
    column = (head % H) * D
    key = (tl.program_id(0) % blocks) * N + tl.arange(0, N)
    q += sample * q_sample + column
    k += sample * k_sample + column
    v += sample * v_sample + column
    dout += sample * d_sample + column
    first = head.to(tl.int64) * queries
    k_wide = _tile(k, key, k_token, keys, 0, WIDE, D, False)
    k_narrow = _tile(k, key, k_token, keys, WIDE, NARROW, D, False)
    v_wide = _tile(v, key, v_token, keys, 0, WIDE, D, False)
    v_narrow = _tile(v, key, v_token, keys, WIDE, NARROW, D, False)
    dk_wide = tl.zeros((N, WIDE), tl.float32)
    dk_narrow = tl.zeros((N, NARROW), tl.float32)
    dv_wide = tl.zeros((N, WIDE), tl.float32)
    dv_narrow = tl.zeros((N, NARROW), tl.float32)
    for start in range(0, queries, M):
        row = start + tl.arange(0, M)
        q_wide = _tile(q, row, q_token, queries, 0, WIDE, D, EVEN)
        q_narrow = _tile(q, row, q_token, queries, WIDE, NARROW, D, EVEN)
        s = _dot(k_wide, tl.trans(q_wide))
        s = _dot(k_narrow, tl.trans(q_narrow), s)
        # a row that is not there has an infinite sum, so that p is 0
        log = tl.load(logs + first + row, mask=row < queries, other=float("inf"))
        p = tl.exp2(s * factor - log[None, :])
        if dq is not None and not EVEN:  # an infinity times a zero key
            p = tl.where(key[:, None] < keys, p, 0.0)
        d_wide = _tile(dout, row, d_token, queries, 0, WIDE, D, EVEN)
        d_narrow = _tile(dout, row, d_token, queries, WIDE, NARROW, D, EVEN)
        dv_wide = _dot(p.to(q.dtype.element_ty), d_wide, dv_wide)
        dv_narrow = _dot(p.to(q.dtype.element_ty), d_narrow, dv_narrow)
        dp = _dot(v_wide, tl.trans(d_wide))
        dp = _dot(v_narrow, tl.trans(d_narrow), dp)
        inner = tl.load(sums + first + row, mask=row < queries, other=0.0)
        ds = (p * (dp - inner[None, :])).to(q.dtype.element_ty)
        dk_wide = _dot(ds, q_wide, dk_wide)
        dk_narrow = _dot(ds, q_narrow, dk_narrow)
        if dq is not None:
            at = dq + sample * queries * (H * D) + column + row[:, None] * (H * D)
            lane = tl.arange(0, WIDE)[None, :]
            share = _dot(tl.trans(ds), k_wide) * scale
            tl.atomic_add(at + lane, share, mask=row[:, None] < queries, sem="relaxed")
            lane = WIDE + tl.arange(0, NARROW)[None, :]
            share = _dot(tl.trans(ds), k_narrow) * scale
            inside = (row[:, None] < queries) & (lane < D)
            tl.atomic_add(at + lane, share, mask=inside, sem="relaxed")
    dk += sample * keys * (H * D) + column
    dv += sample * keys * (H * D) + column
    _store(dk, key, H * D, keys, dk_wide * scale, 0, WIDE, D)
    _store(dk, key, H * D, keys, dk_narrow * scale, WIDE, NARROW, D)
    _store(dv, key, H * D, keys, dv_wide, 0, WIDE, D)
    _store(dv, key, H * D, keys, dv_narrow, WIDE, NARROW, D)


def _readable(x: Tensor) -> Tensor:
    """(B, H, T, d) whose tokens hold their heads side by side, as a joined projection has them."""
    side_by_side = x.stride(3) == 1 and x.stride(1) == x.shape[3]
    if side_by_side and not (x.stride(0) % 8 or x.stride(2) % 8):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Of samples and tokens."""
    return [stride for tensor in tensors for stride in (tensor.stride(0), tensor.stride(2))]


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, T, d) of new memory (B, T, H, d)."""
    b, h, t, d = like.shape
    return like.new_empty((b, t, h, d), dtype=dtype).transpose(1, 2)


def _common(q: Tensor, tiles: Tiles) -> dict[str, int]:
    h, d = q.shape[1], q.shape[3]
    wide, narrow = lanes(d)
    common = {"H": h, "D": d, "WIDE": wide, "NARROW": narrow, "M": tiles.queries}
    return {**common, "num_warps": tiles.warps, "num_stages": tiles.stages}


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles = FORWARD[0], *, taped: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The result (B, H, T, d), and where ``taped`` the logarithms (B, H, T) of the rows' sums, fp32
    to base 2.
    """
    q, k, v = map(_readable, (q, k, v))
    b, h, queries, d = q.shape
    keys = k.shape[2]
    out = _new(q)
    logs = q.new_empty((b, h, queries), dtype=torch.float32) if taped else None
    grid = (b * h * -(-queries // tiles.queries),)
    wide, narrow = lanes(d)
    one = next_power(d), 0
    values = one if tiles.whole else (wide, narrow)
    scores = one if tiles.whole == "all" else (wide, narrow)
    common = {**_common(q, tiles), "WIDE": scores[0], "NARROW": scores[1]}
    forward_kernel[grid](
        *(q, k, v, out, logs, *_strides(q, k, v), queries, keys, LOG2_E / math.sqrt(d)),
        **common,
        V_WIDE=values[0],
        V_NARROW=values[1],
        N=tiles.keys,
        EVEN=keys % tiles.keys == 0,
    )
    return out, logs


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    *,
    one_pass: bool,
    tiles: tuple[Tiles, Tiles] = BACKWARD[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each (B, H, T, d) of memory (B, T, H, d)."""
    dout, q, k, v = map(_readable, (dout, q, k, v))
    b, h, queries, d = q.shape
    keys = k.shape[2]
    of_queries, of_keys = tiles
    common = _common(q, of_queries)
    query_blocks, key_blocks = -(-queries // of_queries.queries), -(-keys // of_keys.keys)
    sums = torch.empty_like(logs)
    products_kernel[(b * h * query_blocks,)](out, dout, sums, *_strides(dout), queries, **common)
    dk, dv = _new(k), _new(v)
    dq = _new(q, torch.float32).zero_() if one_pass else _new(q)
    strides = _strides(q, k, v, dout)
    given: list[Any] = [*strides, queries, keys, LOG2_E / math.sqrt(d), 1 / math.sqrt(d)]
    if not one_pass:
        queries_kernel[(b * h * query_blocks,)](
            *(q, k, v, dout, logs, sums, dq, *given),
            **common,
            N=of_queries.keys,
            EVEN=keys % of_queries.keys == 0,
        )
    even = queries % of_keys.queries == 0 and keys % of_keys.keys == 0
    keys_kernel[(b * h * key_blocks,)](
        *(q, k, v, dout, logs, sums, dq if one_pass else None, dk, dv, *given),
        **_common(q, of_keys),
        N=of_keys.keys,
        EVEN=even,
    )
    return dq.to(q.dtype), dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Tiles,
        back: tuple[Tiles, Tiles],
        one_pass: bool,
    ) -> Tensor:
        out, logs = forward(q, k, v, tiles, taped=True)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.given = {"tiles": back, "one_pass": one_pass}
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grads[0], *ctx.saved_tensors, **ctx.given), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles = FORWARD[0],
    *,
    back: tuple[Tiles, Tiles] = BACKWARD[0],
    one_pass: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt d) v, where what ``dpfast.generate.models.attention.attend`` takes.

    Args:
        q, k, v: (B, H, T, d), (B, H, S, d), (B, H, S, d) in fp16 or bf16, views of (B, T, H d) at
            best, others are copied. d: as `lanes` takes it.
        tiles: of the forward pass. back: of the two passes of the backward pass. one_pass: whether
            the second of them alone makes all gradients.

    Returns:
        (B, H, T, d), a view of (B, T, H, d). Differentiable once.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, tiles, back, one_pass)  # type: ignore[no-any-return]
    return forward(q, k, v, tiles)[0]


def flops(b: int, h: int, queries: int, keys: int, d: int, *, backward: bool = False) -> int:
    """The useful operations of the products: two forward, five backward."""
    return 2 * (5 if backward else 2) * b * h * queries * keys * d
