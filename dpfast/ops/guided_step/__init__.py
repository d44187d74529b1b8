"""One step of a guided diffusion solver in one pass: CFG, guidance, the prediction of x0 and the
update.

The solver is a table: a row (alpha, sigma, a, b, c, d) for each step, read on the device; x = alpha
x0 + sigma eps.

    pred = pred_uncond + cfg_scale (pred_cond - pred_uncond)
    relative: x~ = x + omega |x| / (|g| + 1e-8) g        the norms are those of one sample
    score:    eps <- eps - omega sigma g                 an ascent; x0 follows:
                                                         x0 <- x0 + omega sigma^2 / alpha g
    x0, eps:  epsilon: x0 = (x~ - sigma pred) / alpha    eps = pred
              v:       x0 = alpha x~ - sigma pred        eps = sigma x~ + alpha pred
              sample:  x0 = pred                         eps = (x~ - alpha pred) / sigma
              flow:    x0 = x~ - sigma pred              eps = x~ + alpha pred (alpha = 1 - sigma)
    x_next = a clip(x0) + b eps + c x0_prev + d noise    eps is the one from before the clip

An anchor kappa holds the guided sample to its label: beside g it ascends the generator's own log
p(label | x), whose gradient c = score(x | label) - score(x) lies between the two predictions:

    c = -(eps_cond - eps_uncond) / sigma = alpha / sigma^2 (x0_cond - x0_uncond)
    at one x:  epsilon: eps is pred            c is  -1 / sigma        times pred_cond - pred_uncond
               v:       eps moves by alpha v         -alpha / sigma
               flow:    eps moves by alpha pred      -alpha / sigma
               sample:  x0 is pred                   alpha / sigma^2
    d = g / |g| + kappa c / |c|             of c only the direction counts: the sign of its factor
    relative: x~ = x + omega |x| |g| / (|g| + 1e-8) d / max(|d|, 1/32)
    score:    eps <- eps - omega sigma |g| d             g + kappa |g| c / |c| in the place of g

Both modes move along the same d. |d|^2 = (1 - kappa)^2 + 2 kappa (1 + cos(g, c)). Where g and c are
nearly opposite and kappa is nearly 1, d is little but rounding: below a length of 1/32 (at kappa =
1, a cosine below -0.9995) the relative move shrinks with d, to none at d = 0; a kappa above 2^40
counts as that there, so that no square overflows. A sample with kappa = 0, without pred_uncond or
with c = 0 takes the step without an anchor; one with g = 0 is unguided.

A division by a coefficient that is zero contributes zero (flow matching starts at alpha = 0). A
sample whose gradient g (or, with an anchor, whose pred_cond - pred_uncond) has a squared norm that
is not finite in fp32 takes its step unguided, and is counted. The noise of step t is
`normal(sample_ids, ..., stream=t + 1)`; stream 0 is left to the first latent.

Bytes for n elements of b bytes: 5 n b (read x, pred_cond, pred_uncond, grad, write x_next), n b
more for x0_prev or x0. An anchor adds sums alone up to 8,192 elements a sample; above, the
predictions are read twice, which ``triton`` says more about.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch, noise
from dpfast.ops.guided_step.reference import Call, Options, reference
from dpfast.ops.guided_step.triton import launch

Mode = Literal["relative", "score"]
Prediction = Literal["epsilon", "v", "sample", "flow"]
COLUMNS = 6


class DynamicThreshold(NamedTuple):
    """Imagen's dynamic threshold, a bound of x0 that each sample finds for itself.

    It is clamp(x0, -s, s) / s with s = quantile(abs(x0), ratio) of a sample within [1, maximum].
    Source: Saharia et al., "Photorealistic text-to-image diffusion models with deep language
    understanding" (2022).
    """

    ratio: float = 0.995
    maximum: float = 1.0


def _as_pointer(value: float | Tensor) -> tuple[float, Tensor | None, int]:
    """Returns a scalar or a tensor as number, contiguous tensor and stride: the extension reads
    either.
    """
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
    table = call.table.contiguous()
    ids = dispatch.contiguous(call.sample_ids)
    step, step_at = (0, call.step.long()) if isinstance(call.step, Tensor) else (call.step, None)
    seed, seed_at = (0, call.seed.long()) if isinstance(call.seed, Tensor) else (call.seed, None)
    cfg_scale, cfg_at, cfg_stride = _as_pointer(call.cfg_scale)
    omega, omega_at, omega_stride = _as_pointer(call.omega)
    anchor, anchor_at, anchor_stride = _as_pointer(0.0 if call.anchor is None else call.anchor)
    address = dispatch.address
    dispatch.native_module().guided_step(
        call.out.shape[0],
        math.prod(call.out.shape[1:]),
        dispatch.DTYPE_CODES[dtype],
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
        anchor,
        address(anchor_at),
        anchor_stride,
        call.options.mode == "relative",
        get_args(Prediction).index(call.options.prediction),
        *call.options[2:],
        address(ids),
        seed,
        address(seed_at),
        address(call.skipped),
        torch.get_num_threads(),
    )
    call.deliver(targets)


def _run(call: Call) -> None:
    """Writes the step into `call.out`."""
    backend = dispatch.backend_for(call.out.device)
    if backend == "triton":
        launch(call)
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
    anchor: float,
    anchor_at: Tensor | None,
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
        (anchor or None) if anchor_at is None else anchor_at,
        Options(guidance, prediction, clip, threshold_ratio, threshold_maximum),
        sample_ids,
        seed if seed_at is None else seed_at,
    )
    _run(call)


def _options(mode: str, prediction: str, clip: object) -> Options:
    if mode not in get_args(Mode):
        raise InputError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if prediction not in get_args(Prediction):
        raise InputError(
            f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}"
        )
    if clip is None:
        return Options(mode, prediction, math.inf, -1.0, 1.0)
    if (
        isinstance(clip, tuple)
        and len(clip) == 2
        and all(isinstance(value, (int, float)) for value in clip)
    ):
        ratio, maximum = map(float, clip)
        if not (0 <= ratio <= 1 and maximum >= 1):
            raise InputError(
                f"clip needs a ratio in [0, 1] and a maximum of at least 1, got {(ratio, maximum)}"
            )
        return Options(mode, prediction, math.inf, ratio, maximum)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        raise TypeError(f"clip must be None, a number or a DynamicThreshold, got {clip!r}")
    if not clip > 0:
        raise InputError(f"clip must be positive, got {clip}")
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
    anchor: float | Tensor | None = None,
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
    """Returns the state after one guided solver step, in x's shape and dtype.

    The solvers are those of Song et al., DDIM (2021); Lu et al., DPM-Solver++ (2022); and Lipman et
    al., flow matching (2023).

    Args:
        x: (B, ...) fp32, fp16 or bf16: the state at this step.
        pred_cond: Output of the network with the condition, x's shape, any of the three dtypes.
        pred_uncond: Output without it, or None for no classifier-free guidance.
        grad: Gradient of the guidance criterion with respect to x, or None for an unguided step.
        table: (steps, 6) fp32 on x's device, columns alpha, sigma, a, b, c, d.
        step: Row of the table; a Python integer, or a 0-d integer tensor that is read on the
            device.
        cfg_scale: Scale by diffusers' convention, 1 is the conditional prediction; number, 0-d or
            (B,) tensor.
        omega: Strength of the guidance; number, 0-d or (B,) tensor.
        anchor: kappa, the weight of the generator's own belief in the label beside the guidance;
            number, 0-d or (B,) tensor. None and 0 are the step without one, bit for bit. A number
            is at least 0; a tensor's values nobody looks at: a negative one leads away from the
            label, and so does a positive one beside a negative omega.
        mode: "relative" moves the state by omega times its norm, "score" adds omega grad to the
            score.
        prediction: Kind of the network's prediction: "epsilon", "v", "sample" or "flow".
        clip: Bound of the absolute x0, or a ``DynamicThreshold``, or None.
        x0_prev: x0 of the step before, for the table's column c; None drops the term.
        sample_ids: (B,) int64 keys of the noise for the table's column d; None drops the term.
        seed: Seed of the noise; integer or 0-d tensor.
        out: Tensor for the result; may be x itself.
        x0_out: Tensor for the (clipped) x0; must not overlap.
        skipped: int64 counter of shape () or (1,), raised by the number of samples whose gradient
            was not finite, or with an anchor the difference of the predictions.

    Returns:
        ``out``, or a new contiguous tensor. A step tensor outside the table gives NaN.

    Raises:
        InputError: For a wrong shape or device, an unknown option, a step outside the table, an
            anchor that is a negative number.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch, dpfast
        >>> table = torch.tensor([[0.6, 0.8, 1.0, 0.0, 0.0, 0.0]])  # x_next = x0
        >>> x = torch.full((1, 2), 0.6)
        >>> dpfast.guided_step(x, torch.zeros(1, 2), None, None, table, 0, cfg_scale=1, omega=0)
        tensor([[1., 1.]])
    """
    check.tensor("x", x, check.FLOATS)
    if x.dim() < 2 or math.prod(x.shape[1:]) == 0:
        raise InputError(
            f"x has shape {tuple(x.shape)}, expected (B, ...) with at least one element a sample"
        )
    shape, device = tuple(x.shape), x.device
    named = {"pred_cond": pred_cond, "pred_uncond": pred_uncond, "grad": grad, "x0_prev": x0_prev}
    for name, value in named.items():
        if value is not None or name == "pred_cond":
            check.shaped(name, check.tensor(name, value, check.FLOATS, device), shape)
    for name, value in {"out": out, "x0_out": x0_out}.items():
        if value is not None:
            check.shaped(name, check.tensor(name, value, (x.dtype,), device), shape)
    check.tensor("table", table, (torch.float32,), device)
    if table.dim() != 2 or table.shape[1] != COLUMNS or table.shape[0] == 0:
        raise InputError(
            f"table has shape {tuple(table.shape)}, expected (steps, {COLUMNS}) with steps >= 1"
        )
    step = check.integer("step", step, device)
    if isinstance(step, int) and not 0 <= step < table.shape[0]:
        raise InputError(
            f"step must be in [0, {table.shape[0]}), the rows of the table, got {step}"
        )
    cfg_scale = check.per_sample("cfg_scale", cfg_scale, shape[0], device)
    omega = check.per_sample("omega", omega, shape[0], device)
    if anchor is not None:
        anchor = check.per_sample("anchor", anchor, shape[0], device)
        if not isinstance(anchor, Tensor) and not anchor >= 0:
            raise InputError(f"anchor must be at least 0, got {anchor:g}")
        nothing = not isinstance(anchor, Tensor) and anchor == 0
        if nothing or grad is None or pred_uncond is None:
            anchor = None
    options = _options(mode, prediction, clip)
    if sample_ids is not None:
        check.shaped(
            "sample_ids", check.tensor("sample_ids", sample_ids, (torch.int64,), device), shape[:1]
        )
    if (
        skipped is not None
        and check.tensor("skipped", skipped, (torch.int64,), device).numel() != 1
    ):
        raise InputError(f"skipped has shape {tuple(skipped.shape)}, expected ()")
    seed = noise.check_seed("seed", seed, device)
    inputs = (x, pred_cond, pred_uncond, grad, x0_prev)
    if not dispatch.traced():
        out = torch.empty(shape, dtype=x.dtype, device=device) if out is None else out
        _run(
            Call(
                out,
                x0_out,
                skipped,
                *inputs,
                table,
                step,
                cfg_scale,
                omega,
                anchor,
                options,
                sample_ids,
                seed,
            )
        )
        return out
    # torch.func would look for a derivative of the operation, and there is none: its inputs carry
    # no gradient either.
    constants = (None if tensor is None else tensor.detach() for tensor in inputs)
    cfg_scale, omega, anchor = (
        value.detach() if isinstance(value, Tensor) else value
        for value in (cfg_scale, omega, 0.0 if anchor is None else anchor)
    )
    # A traced graph knows no aliases: it computes into a tensor of its own, and the copy fuses or
    # vanishes.
    result = torch.empty(shape, dtype=x.dtype, device=device)
    _operation(
        result,
        x0_out,
        skipped,
        *constants,
        table,
        *dispatch.integer_or_tensor(step),
        *dispatch.number_or_tensor(cfg_scale),
        *dispatch.number_or_tensor(omega),
        *dispatch.number_or_tensor(anchor),
        *options,
        sample_ids,
        *dispatch.integer_or_tensor(seed),
    )
    return result if out is None else out.copy_(result)
