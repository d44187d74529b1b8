"""One step of a guided diffusion solver in one pass: CFG, guidance, the prediction of x0 and the update.

The solver is a table: a row (alpha, sigma, a, b, c, d) for each step, read on the device; x = alpha x0 + sigma eps.

    pred = pred_uncond + cfg_scale (pred_cond - pred_uncond)
    relative: x~ = x + omega |x| / (|g| + 1e-8) g        the norms are those of one sample
    score:    eps <- eps - omega sigma g                 an ascent; x0 follows: x0 <- x0 + omega sigma^2 / alpha g
    x0, eps:  epsilon: x0 = (x~ - sigma pred) / alpha    eps = pred
              v:       x0 = alpha x~ - sigma pred        eps = sigma x~ + alpha pred
              sample:  x0 = pred                         eps = (x~ - alpha pred) / sigma
              flow:    x0 = x~ - sigma pred              eps = x~ + alpha pred         (alpha = 1 - sigma)
    x_next = a clip(x0) + b eps + c x0_prev + d noise    eps is the one from before the clip

A division by a coefficient that is zero contributes zero (flow matching starts at alpha = 0). A sample whose gradient
has a squared norm that is not finite in fp32 takes its step unguided, and is counted. The noise of step t is
`normal(sample_ids, ..., stream=t + 1)`; stream 0 is left to the first latent.

Bytes for n elements of b bytes: 5 n b (read x, pred_cond, pred_uncond, grad, write x_next), n b more for x0_prev or x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from dpfast.ops import _check, _dispatch, _guided_step_kernel, noise

Mode = Literal["relative", "score"]
Prediction = Literal["epsilon", "v", "sample", "flow"]
COLUMNS = 6
NORM_FLOOR = 1e-8


class DynamicThreshold(NamedTuple):
    """Imagen's dynamic threshold: clamp(x0, -s, s) / s, s = quantile(|x0|, ratio) of a sample within [1, maximum].

    Source: Saharia et al., "Photorealistic text-to-image diffusion models with deep language understanding" (2022).
    """

    ratio: float = 0.995
    maximum: float = 1.0


def _row(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A scalar as it is, a (B,) tensor as (B, 1)."""
    return value.to(like.dtype).reshape(-1, 1) if isinstance(value, Tensor) else value


def _reciprocal(value: Tensor) -> Tensor:
    return torch.where(value == 0, 0.0, 1.0 / value)


def _clipped(x0: Tensor, clip: float | DynamicThreshold | None) -> Tensor:
    if clip is None:
        return x0
    if not isinstance(clip, DynamicThreshold):
        return x0.clamp(-clip, clip)
    bound = quantile(x0.abs(), clip.ratio).clamp(1.0, clip.maximum)
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


def quantile(values: Tensor, ratio: float) -> Tensor:
    """The quantile of each row, linear between its neighbours: (B, n) -> (B, 1)."""
    position = ratio * (values.shape[1] - 1)
    below = math.floor(position)
    largest = values.topk(values.shape[1] - below, dim=1).values
    low = torch.where(values.isnan().any(dim=1, keepdim=True), torch.nan, largest[:, -1:])
    high = largest[:, -2:-1] if below + 1 < values.shape[1] else low
    return low + (position - below) * (high - low)


class Options(NamedTuple):
    """What selects a variant of the step, in the types that a registered operation takes."""

    mode: str
    prediction: str
    clip: float  # infinite for none
    threshold_ratio: float  # negative for no dynamic threshold
    threshold_maximum: float

    def limit(self) -> float | DynamicThreshold | None:
        if self.threshold_ratio >= 0:
            return DynamicThreshold(self.threshold_ratio, self.threshold_maximum)
        return None if math.isinf(self.clip) else self.clip


class Call(NamedTuple):
    """The checked arguments of one step, and where its results go."""

    out: Tensor
    x0_out: Tensor | None
    skipped: Tensor | None
    x: Tensor
    pred_cond: Tensor
    pred_uncond: Tensor | None
    grad: Tensor | None
    x0_prev: Tensor | None
    table: Tensor
    step: int | Tensor
    cfg_scale: float | Tensor
    omega: float | Tensor
    options: Options
    sample_ids: Tensor | None
    seed: int | Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.pred_cond, self.pred_uncond, self.grad, self.x0_prev


def reference(call: Call) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, fp32 inside (fp64 for an fp64 x): x_next and x0, in the dtype of x."""
    x, table, step, options = call.x, call.table, call.step, call.options
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch = x.shape[0]

    def flat(tensor: Tensor) -> Tensor:
        return tensor.to(work).reshape(batch, math.prod(x.shape[1:]))

    if isinstance(step, Tensor):
        row = table.index_select(0, step.long().clamp(0, table.shape[0] - 1).reshape(1))[0]
        row = torch.where((step >= 0) & (step < table.shape[0]), row, torch.nan)
    else:
        row = table[step]
    alpha, sigma, a, b, c, d = row.to(work).unbind()

    state, pred = flat(x), flat(call.pred_cond)
    if call.pred_uncond is not None:
        base = flat(call.pred_uncond)
        pred = base + _row(call.cfg_scale, state) * (pred - base)
    shift: Tensor | None = None
    if call.grad is not None:
        gradient = flat(call.grad)
        squares = gradient.square().sum(dim=1, keepdim=True)
        finite = squares.float().isfinite()
        gradient = torch.where(finite, gradient, 0.0)
        if call.skipped is not None:
            call.skipped.add_((~finite).sum())
        if options.mode == "relative":
            squares = torch.where(finite, squares, 0.0)
            norm = state.square().sum(dim=1, keepdim=True).sqrt()
            state = state + _row(call.omega, state) * norm / (squares.sqrt() + NORM_FLOOR) * gradient
        else:
            shift = _row(call.omega, state) * sigma * gradient

    if options.prediction == "epsilon":
        x0, eps = (state - sigma * pred) * _reciprocal(alpha), pred
    elif options.prediction == "v":
        x0, eps = alpha * state - sigma * pred, sigma * state + alpha * pred
    elif options.prediction == "sample":
        x0, eps = pred, (state - alpha * pred) * _reciprocal(sigma)
    else:
        x0, eps = state - sigma * pred, state + alpha * pred
    if shift is not None:
        x0, eps = x0 + sigma * _reciprocal(alpha) * shift, eps - shift
    x0 = _clipped(x0, options.limit())
    following = a * x0 + b * eps
    if call.x0_prev is not None:
        following = following + c * flat(call.x0_prev)
    if call.sample_ids is not None:
        z = noise.reference(call.sample_ids, (following.shape[1],), call.seed, step + 1)
        following = following + d * z
    return following.to(x.dtype).reshape(x.shape), x0.to(x.dtype).reshape(x.shape)


def _as_pointer(value: float | Tensor) -> tuple[float, Tensor | None, int]:
    """A scalar or a tensor as number, contiguous tensor and stride: the extension reads either."""
    return (0.0, value.contiguous(), value.dim()) if isinstance(value, Tensor) else (value, None, 0)


def _native(call: Call) -> None:
    # The extension knows one dtype a call: with several, it works on fp32 copies.
    mixed = any(tensor is not None and tensor.dtype != call.out.dtype for tensor in call.inputs)
    dtype = torch.float32 if mixed else call.out.dtype
    values = [None if tensor is None else tensor.to(dtype).contiguous() for tensor in call.inputs]
    targets = [
        tensor
        if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
        else torch.empty(tensor.shape, dtype=dtype)
        for tensor in (call.out, call.x0_out)
    ]
    # These names keep the tensors alive until the kernel has read them.
    table, ids = call.table.contiguous(), None if call.sample_ids is None else call.sample_ids.contiguous()
    step, step_at = (0, call.step.long()) if isinstance(call.step, Tensor) else (call.step, None)
    seed, seed_at = (0, call.seed.long()) if isinstance(call.seed, Tensor) else (call.seed, None)
    cfg_scale, cfg_at, cfg_stride = _as_pointer(call.cfg_scale)
    omega, omega_at, omega_stride = _as_pointer(call.omega)
    address = _dispatch.address
    _dispatch.native_module().guided_step(
        call.out.shape[0],
        math.prod(call.out.shape[1:]),
        _dispatch.DTYPE_CODES[dtype],
        *map(address, values),
        *map(address, targets),
        table.data_ptr(),
        table.shape[0],
        step,
        address(step_at),
        cfg_scale,
        address(cfg_at),
        cfg_stride,
        omega,
        address(omega_at),
        omega_stride,
        call.options.mode == "relative",
        get_args(Prediction).index(call.options.prediction),
        *call.options[2:],
        address(ids),
        seed,
        address(seed_at),
        address(call.skipped),
        torch.get_num_threads(),
    )
    _copy_back(call, targets)


def _copy_back(call: Call, targets: Sequence[Tensor | None]) -> None:
    for given, target in zip((call.out, call.x0_out), targets, strict=True):
        if given is not None and target is not None and target is not given:
            given.copy_(target)


def _triton(call: Call) -> None:
    options, elements = call.options, math.prod(call.out.shape[1:])
    values = tuple(None if tensor is None else tensor.contiguous() for tensor in call.inputs)
    targets = [None if tensor is None else tensor.contiguous() for tensor in (call.out, call.x0_out)]
    ids = None if call.sample_ids is None else call.sample_ids.contiguous()
    scale, weight = (v.contiguous() if isinstance(v, Tensor) else v for v in (call.cfg_scale, call.omega))

    def launch(following: Tensor, x0: Tensor | None, counter: Tensor | None, limit: _guided_step_kernel.Limit) -> None:
        _guided_step_kernel.launch(
            following, x0, counter, values, call.table, call.step, scale, weight,
            options.mode == "relative", options.prediction, limit, ids, call.seed,
        )  # fmt: skip

    limit = _guided_step_kernel.Limit(0 if math.isinf(options.clip) else 1, options.clip)
    if options.threshold_ratio >= 0:
        position = options.threshold_ratio * (elements - 1)
        limit = _guided_step_kernel.Limit(
            2, 0.0, math.floor(position), position - math.floor(position), options.threshold_maximum
        )
        if elements > _guided_step_kernel.WITH_QUANTILE:
            x0 = torch.empty(call.out.shape, dtype=torch.float32, device=call.out.device)
            launch(torch.empty_like(x0), x0, None, _guided_step_kernel.Limit(0))
            bound = quantile(x0.reshape(-1, elements).abs(), options.threshold_ratio)
            limit = _guided_step_kernel.Limit(3, bound.clamp(1.0, options.threshold_maximum).contiguous())
    launch(cast(Tensor, targets[0]), targets[1], call.skipped, limit)
    _copy_back(call, targets)


def _run(call: Call) -> None:
    """Writes the step into `call.out`."""
    backend = _dispatch.backend_for(call.out.device)
    if backend == "triton":
        _triton(call)
    elif backend == "native":
        _native(call)
    else:
        following, x0 = reference(call)
        call.out.copy_(following)
        if call.x0_out is not None:
            call.x0_out.copy_(x0)


@torch.library.custom_op("dpfast::guided_step", mutates_args=("out", "x0_out", "skipped"))
def _operation(
    out: Tensor,
    x0_out: Tensor | None,
    skipped: Tensor | None,
    x: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    grad: Tensor | None,
    x0_prev: Tensor | None,
    table: Tensor,
    step: int,
    step_at: Tensor | None,
    cfg_scale: float,
    cfg_at: Tensor | None,
    omega: float,
    omega_at: Tensor | None,
    guidance: str,  # `mode` is taken by torch's dispatcher
    prediction: str,
    clip: float,
    threshold_ratio: float,
    threshold_maximum: float,
    sample_ids: Tensor | None,
    seed: int,
    seed_at: Tensor | None,
) -> None:
    call = Call(
        out,
        x0_out,
        skipped,
        x,
        pred_cond,
        pred_uncond,
        grad,
        x0_prev,
        table,
        step if step_at is None else step_at,
        cfg_scale if cfg_at is None else cfg_at,
        omega if omega_at is None else omega_at,
        Options(guidance, prediction, clip, threshold_ratio, threshold_maximum),
        sample_ids,
        seed if seed_at is None else seed_at,
    )
    _run(call)


def _split(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def _options(mode: str, prediction: str, clip: object) -> Options:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}")
    if clip is None:
        return Options(mode, prediction, math.inf, -1.0, 1.0)
    if isinstance(clip, tuple):
        ratio, maximum = map(float, clip)
        if not (0 <= ratio <= 1 and maximum >= 1):
            raise ValueError(f"clip needs a ratio in [0, 1] and a maximum of at least 1, got {(ratio, maximum)}")
        return Options(mode, prediction, math.inf, ratio, maximum)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        raise TypeError(f"clip must be None, a number or a DynamicThreshold, got {type(clip).__name__}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    return Options(mode, prediction, float(clip), -1.0, 1.0)


def guided_step(
    x: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    grad: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    *,
    cfg_scale: float | Tensor,
    omega: float | Tensor,
    mode: Mode = "relative",
    prediction: Prediction = "epsilon",
    clip: float | DynamicThreshold | None = None,
    x0_prev: Tensor | None = None,
    sample_ids: Tensor | None = None,
    seed: int | Tensor = 0,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Tensor:
    """The state after one guided solver step, in x's shape and dtype.

    Args:
        x: (B, ...) fp32, fp16 or bf16: the state at this step.
        pred_cond: the network's output with the condition, x's shape, any of the three dtypes.
        pred_uncond: the output without it, or None for no classifier-free guidance.
        grad: the gradient of the guidance criterion with respect to x, or None for an unguided step.
        table: (steps, 6) fp32 on x's device, columns alpha, sigma, a, b, c, d.
        step: the row of the table; a Python integer, or a 0-d integer tensor that is read on the device.
        cfg_scale: diffusers' convention, 1 is the conditional prediction; number, 0-d or (B,) tensor.
        omega: strength of the guidance; number, 0-d or (B,) tensor.
        mode: "relative" moves the state by omega times its norm, "score" adds omega grad to the score.
        prediction: what the network predicts: "epsilon", "v", "sample" or "flow".
        clip: bound of |x0|, or a `DynamicThreshold`, or None.
        x0_prev: the x0 of the step before, for the table's column c; None drops the term.
        sample_ids: (B,) int64 keys of the noise for the table's column d; None drops the term.
        seed: seed of the noise; integer or 0-d tensor.
        out: where to write the result; may be x itself. x0_out: where to write the (clipped) x0; must not overlap.
        skipped: int64 counter of shape () or (1,), raised by the number of samples whose gradient was not finite.

    Returns:
        x_next: `out`, or a new contiguous tensor. A step tensor outside the table gives NaN.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape or device, an unknown option, a step outside the table.

    Source: Song et al., DDIM (2021); Lu et al., DPM-Solver++ (2022); Lipman et al., flow matching (2023).
    """
    _check.tensor("x", x, _check.FLOATS)
    if x.dim() < 2 or math.prod(x.shape[1:]) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, ...) with at least one element a sample")
    shape, device = tuple(x.shape), x.device
    named = {"pred_cond": pred_cond, "pred_uncond": pred_uncond, "grad": grad, "x0_prev": x0_prev}
    for name, value in named.items():
        if value is not None or name == "pred_cond":
            _check.shaped(name, _check.tensor(name, value, _check.FLOATS, device), shape)
    for name, value in {"out": out, "x0_out": x0_out}.items():
        if value is not None:
            _check.shaped(name, _check.tensor(name, value, (x.dtype,), device), shape)
    _check.tensor("table", table, (torch.float32,), device)
    if table.dim() != 2 or table.shape[1] != COLUMNS or table.shape[0] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected (steps, {COLUMNS}) with steps >= 1")
    step = _check.integer("step", step, device)
    if isinstance(step, int) and not 0 <= step < table.shape[0]:
        raise ValueError(f"step must be in [0, {table.shape[0]}), the rows of the table, got {step}")
    cfg_scale = _check.per_sample("cfg_scale", cfg_scale, shape[0], device)
    omega = _check.per_sample("omega", omega, shape[0], device)
    options = _options(mode, prediction, clip)
    if sample_ids is not None:
        _check.shaped("sample_ids", _check.tensor("sample_ids", sample_ids, (torch.int64,), device), shape[:1])
    if skipped is not None and _check.tensor("skipped", skipped, (torch.int64,), device).numel() != 1:
        raise ValueError(f"skipped has shape {tuple(skipped.shape)}, expected ()")
    seed = noise.check_seed("seed", seed, device)
    inputs = (x, pred_cond, pred_uncond, grad, x0_prev)
    if not _dispatch.traced():
        out = torch.empty(shape, dtype=x.dtype, device=device) if out is None else out
        _run(Call(out, x0_out, skipped, *inputs, table, step, cfg_scale, omega, options, sample_ids, seed))
        return out
    # A traced graph knows no aliases: it computes into a tensor of its own, and the copy fuses or vanishes.
    result = torch.empty(shape, dtype=x.dtype, device=device)
    _operation(
        result, x0_out, skipped, *inputs, table, *noise.split(step), *_split(cfg_scale), *_split(omega), *options,
        sample_ids, *noise.split(seed),
    )  # fmt: skip
    return result if out is None else out.copy_(result)
