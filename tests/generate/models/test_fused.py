"""Fused blocks against diffusers: predictions and gradients, in fp32 and bf16; what they do not
know stays as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dpfast import GuidanceConfig, GuidedSampler
from dpfast.generate.graphs import Captured
from dpfast.generate.models.frozen_layers import fuse_projections, share_conditioning
from dpfast.generate.models.fused import fuse
from dpfast.generate.pipelines.families.stable_diffusion import TextUNetDenoiser
from tests.generate.standin import StandInRecorder, force_reference

Call = Callable[[Tensor], Tensor]
NHWC = torch.channels_last


def unet(**options: Any) -> nn.Module:
    """A UNet of prompts: 32 and 64 channels, with and without attention."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def pixels(**options: Any) -> nn.Module:
    """A UNet of pixels and class ids, whose attention is over the pixels."""
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )


def tiny(**options: Any) -> nn.Module:
    """An AutoencoderTiny of three levels."""
    sizes: dict[str, Any] = {
        f"{part}_block_out_channels": (16, 16, 16) for part in ("encoder", "decoder")
    }
    sizes |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (2, 2, 1)}
    return diffusers.AutoencoderTiny(**sizes, **options)


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        patch_size=2,
        num_embeds_ada_norm=10,
        sample_size=16,
    )


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        **options,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "UNet of prompts": unet,
    "UNet of prompts, linear": lambda: unet(
        use_linear_projection=True, transformer_layers_per_block=2
    ),
    "UNet of pixels": pixels,
    "decoder": vae,
    "tiny decoder": tiny,
    "DiT": dit,
    "DiT, shared conditioning": dit,
    "SD3": sd3,
    "SD3, query and key normed": lambda: sd3(qk_norm="rms_norm"),
}
TEXT, POOLED = torch.randn(3, 5, 24), torch.randn(3, 16)
TIME, LABELS = torch.tensor([7, 7, 7]), torch.tensor([1, 2, 10])


def frozen(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with weights that let every part of it matter."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        # those of diffusers are zero where a block begins as the identity
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def fused(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = fuse_projections(frozen(name, dtype))
    if "decoder" in name:
        fuse(model.to(memory_format=NHWC).decoder)
        return model
    if name == "DiT, shared conditioning":
        share_conditioning(model, 20)
    return fuse(model if "DiT" in name or "SD3" in name else model.to(memory_format=NHWC))


def call(model: Any, name: str) -> Call:
    """x (3, 4, 16, 16) fp32 to the prediction, in fp32."""
    dtype = next(model.parameters()).dtype
    text, pooled = TEXT.to(dtype), POOLED.to(dtype)

    def run(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if "decoder" in name:
            return model.decode(x).sample.float()
        if "prompts" in name:
            return model(x, TIME, text).sample.float()
        if "pixels" in name:
            return model(x, TIME, class_labels=LABELS).sample.float()
        if "DiT" in name:
            return model(x, timestep=TIME, class_labels=LABELS).sample.float()
        given = {"timestep": TIME, "encoder_hidden_states": text, "pooled_projections": pooled}
        return model(hidden_states=x, **given).sample.float()

    return run


def results(run: Call) -> list[Tensor]:
    """The prediction without a tape, with one, and the gradient on it and under vjp."""
    torch.manual_seed(1)
    x = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        plain = run(x)
    seed = torch.randn(plain.shape)
    taped = x.clone().requires_grad_()
    y = run(taped)
    (gradient,) = torch.autograd.grad(y, taped, seed)
    _, backward = torch.func.vjp(run, x)
    return [plain, y.detach(), gradient, backward(seed)[0]]


def distances(found: list[Tensor], right: list[Tensor]) -> list[float]:
    pairs = zip(found, right, strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_gradients_are_those_of_diffusers(name: str, caplog: Any) -> None:
    right = results(call(frozen(name), name))
    with caplog.at_level(logging.INFO):
        model = fused(name)
    assert [r.message for r in caplog.records if "not fused" in r.message] == []
    # measured: 2e-6
    assert max(distances(results(call(model, name)), right)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_they_are_no_further_from_fp32_than_diffusers(name: str) -> None:
    right = results(call(frozen(name), name))
    plain = distances(results(call(frozen(name, torch.bfloat16), name)), right)
    ours = distances(results(call(fused(name, torch.bfloat16), name)), right)
    for a, b in zip(ours, plain, strict=True):
        # one realisation of the rounding against another
        assert a < 1.15 * b, (ours, plain)


def test_time_and_text_of_a_whole_unet_are_shared_by_its_blocks() -> None:
    embeddings = torch.randn(11, 5, 24)
    x, labels = torch.randn(3, 4, 16, 16), LABELS
    plain, ours = (
        TextUNetDenoiser(
            frozen("UNet of prompts").to(memory_format=NHWC),
            embeddings,
            prediction="epsilon",
            timesteps=20,
            fused=fused,
        )
        for fused in (False, True)
    )
    layers = [m for m in ours.model.modules() if isinstance(m, nn.Linear)]
    assert layers == []  # neither the time's network nor a projection of time or text is left
    for step in (0, 7, 19):
        t = torch.tensor(step)
        right, seed = plain(x, t, labels), torch.randn(x.shape)
        torch.testing.assert_close(ours(x, t, labels), right, rtol=1e-4, atol=1e-4)
        ways = (torch.func.vjp(lambda x: d(x, t, labels), x)[1](seed)[0] for d in (plain, ours))  # noqa: B023
        torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="expected integers of the training"):
        ours(x, torch.tensor(7.5), labels)


def plain_block(**options: Any) -> Any:
    from diffusers.models.resnet import ResnetBlock2D

    options = {"in_channels": 32, "temb_channels": 8, "groups": 4, **options}
    return ResnetBlock2D(**options).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"non_linearity": "gelu"}, "a GELU"),
        ({"output_scale_factor": 2.0}, "output_scale_factor = 2.0"),
        ({"time_embedding_norm": "scale_shift"}, "time_embedding_norm = 'scale_shift'"),
        ({"up": True}, "up = True"),
        ({"skip_time_act": True}, "skip_time_act = True"),
    ],
    ids=lambda value: str(value),
)
def test_what_a_form_does_not_know_stays_as_it_is_and_the_log_says_why(
    options: dict[str, Any], reason: str, caplog: Any
) -> None:
    model = nn.Sequential(plain_block(**options), plain_block(**options))
    with caplog.at_level(logging.INFO):
        assert fuse(model) is model
    assert [type(block).__name__ for block in model] == ["ResnetBlock2D"] * 2
    assert f"not fused: 2 ResnetBlock2D: {reason}" in [each.message for each in caplog.records]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"act_fn": "silu"}, "a SiLU"), ({"act_fn": "gelu"}, "a GELU")],
    ids=["silu", "gelu"],
)
def test_a_tiny_decoder_of_another_activation_stays_as_it_is(
    options: dict[str, Any], reason: str, caplog: Any
) -> None:
    model: Any = tiny(**options).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.INFO):
        assert fuse(twin.decoder) is twin.decoder
    found = [each.message for each in caplog.records]
    assert f"not fused: 5 AutoencoderTinyBlock: {reason}" in found
    assert f"not fused: 1 DecoderTiny: {reason}" in found
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(twin.decode(x).sample, model.decode(x).sample)


def test_a_tiny_decoder_enlarges_as_it_is_told() -> None:
    """By another factor or between pixels: not by doubling them."""
    for options in ({"upsampling_scaling_factor": 3}, {"upsample_fn": "bilinear"}):
        torch.manual_seed(0)
        model: Any = tiny(**options).eval().requires_grad_(False)
        twin: Any = copy.deepcopy(model).to(memory_format=NHWC)
        fuse(twin.decoder)
        x = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(twin.decode(x).sample, model.decode(x).sample)


class Adapted(nn.Conv2d):
    """A convolution with more behind it, as an adapter of low rank."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrapped(block: Any) -> None:
    block.conv2 = Adapted(32, 32, 3, padding=1)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "padding": (lambda b: setattr(b.conv1, "padding_mode", "circular"), "padding_mode"),
    "adapter": (wrapped, "a Adapted"),
    "hook": (lambda b: b.conv2.register_forward_hook(lambda *_: None), "a hook on a Conv2d"),
    "forward": (lambda b: setattr(b.norm2, "forward", lambda x: x), "a hook on a GroupNorm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_somebody_has_changed_stays_as_it_is(change: str, caplog: Any) -> None:
    act, reason = CHANGES[change]
    model = nn.Sequential(plain_block())
    act(model[0])
    with caplog.at_level(logging.INFO):
        fuse(model)
    assert type(model[0]).__name__ == "ResnetBlock2D"
    assert any(f"ResnetBlock2D: {reason}" in each.message for each in caplog.records)


def test_an_up_block_with_a_block_that_is_not_fused_concatenates_as_before(caplog: Any) -> None:
    torch.manual_seed(0)
    model = unet(act_fn="gelu").eval().requires_grad_(False)
    twin = fuse(copy.deepcopy(model).to(memory_format=NHWC))
    assert all(type(block).__module__.startswith("diffusers") for block in twin.up_blocks)
    x = torch.randn(3, 4, 16, 16)
    torch.testing.assert_close(twin(x, TIME, TEXT).sample, model(x, TIME, TEXT).sample)


def test_masks_of_attention_reach_no_fused_transformer() -> None:
    block = fused("UNet of prompts").down_blocks[0].attentions[0]
    x = torch.randn(3, 32, 4, 4)
    with pytest.raises(NotImplementedError, match="masks and options of attention"):
        block(x, TEXT, attention_mask=torch.ones(3, 16))


def test_the_input_of_a_block_is_not_written_into() -> None:
    """Sums in a product's own memory are those of tensors that nobody else holds."""
    for name in ("UNet of prompts", "UNet of pixels", "decoder", "tiny decoder", "DiT", "SD3"):
        run = call(fused(name), name)
        x = torch.randn(3, 4, 16, 16)
        before = x.clone()
        with torch.no_grad():
            first, second = run(x), run(x)
        assert torch.equal(x, before)
        assert torch.equal(first, second)


def test_no_sample_depends_on_another() -> None:
    """As far as torch's own products allow: their bits may change with the number of rows."""
    run = call(fused("UNet of pixels"), "UNet of pixels")
    x = torch.randn(3, 4, 16, 16)
    y = x.clone()
    y[1:] = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(run(x)[0], run(y)[0])


@pytest.mark.parametrize("options", [{}, {"cache_interval": 2}], ids=["plain", "cached"])
def test_a_sampler_makes_the_same_images(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    learner = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    guidance = GuidanceConfig(omega=0.1, every=4)
    given = {"guidance": guidance, "steps": 8, "cfg_scale": 1.5, "compile": False, **options}
    plain, ours = (
        GuidedSampler.from_pretrained("fashion", learner, fused=fused, **given).generate([3, 8, 1])
        for fused in (False, True)
    )
    difference = (plain.images.int() - ours.images.int()).abs()
    assert int(difference.max()) <= 1  # of 255
    torch.testing.assert_close(ours.entropy, plain.entropy, rtol=1e-3, atol=1e-4)


def guided(run: Call) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, seed) to the prediction and the gradient of its product with the seed."""

    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        prediction, backward = torch.func.vjp(run, x)
        return prediction, backward(seed)[0]

    return step


@pytest.mark.parametrize("name", ["UNet of prompts", "tiny decoder", "DiT, shared conditioning"])
def test_a_step_through_a_fused_model_is_one_graph(name: str) -> None:
    """With a gradient and, where residuals are summed in place, without."""
    run = call(fused(name), name)
    x = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        right = run(x)
        plain = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(plain, right, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(right)
    compiled = torch.compile(guided(run), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, seed), guided(run)(x, seed), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class One(NamedTuple):
    prediction: Tensor


class Two(NamedTuple):
    prediction: Tensor
    gradient: Tensor


@pytest.mark.parametrize("name", MODELS)
def test_a_step_through_a_fused_model_is_captured_and_replayed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tape and with the gradient: no host read, and a replay computes what a call does,
    of inputs that it has not seen.
    """
    force_reference(monkeypatch)
    run, recorder = call(fused(name), name), StandInRecorder()
    with torch.no_grad():
        shape = run(torch.randn(3, 4, 16, 16)).shape
    plain = Captured(lambda x: One(run(x)), recorder)
    both = Captured(lambda x, seed: Two(*guided(run)(x, seed)), recorder)
    with torch.no_grad():
        for _ in range(3):
            x, seed = torch.randn(3, 4, 16, 16), torch.randn(shape)
            torch.testing.assert_close(plain(x).prediction, run(x), rtol=0, atol=1e-6)
            for found, right in zip(both(x, seed), guided(run)(x, seed), strict=True):
                torch.testing.assert_close(
                    found, right, rtol=0, atol=1e-6 * float(right.abs().max())
                )
    assert (plain.reason, both.reason, recorder.recorded) == (None, None, 2)


def test_timesteps_and_labels_of_a_captured_step_are_read_at_each_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of time and of prompts are taken from their tables inside of the step."""
    force_reference(monkeypatch)
    denoiser = TextUNetDenoiser(
        frozen("UNet of prompts").to(memory_format=NHWC),
        torch.randn(11, 5, 24),
        prediction="epsilon",
        timesteps=20,
        fused=True,
    )
    recorder = StandInRecorder()
    captured = Captured(lambda x, t, labels: One(denoiser(x, t, labels)), recorder)
    x, seen = torch.randn(3, 4, 16, 16), []
    with torch.no_grad():
        for step, labels in ((19, LABELS), (3, LABELS), (3, LABELS.flip(0))):
            t = torch.tensor(step)
            seen.append(captured(x, t, labels).prediction.clone())
            torch.testing.assert_close(seen[-1], denoiser(x, t, labels), rtol=0, atol=1e-6)
    assert recorder.recorded == 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_captured_sampler_of_fused_blocks_makes_the_eager_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_reference(monkeypatch)
    torch.manual_seed(0)
    learner = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    recorder = StandInRecorder()
    given = {"guidance": GuidanceConfig(omega=0.1, every=2), "steps": 4, "cfg_scale": 1.5}
    eager, captured = (
        GuidedSampler.from_pretrained(
            "fashion", learner, fused=True, compile=False, cuda_graphs=graphs, **given
        )
        for graphs in (False, recorder)
    )
    for labels in ([3, 8, 1], [0, 8, 2]):
        right, found = eager.generate(labels), captured.generate(labels)
        assert torch.equal(found.images, right.images)
        torch.testing.assert_close(found.entropy, right.entropy, rtol=1e-5, atol=1e-6)
    assert recorder.recorded == 3  # guided, plain, decoding
    assert not captured.runner.fallbacks
