"""Tiny pipelines of each family with random weights, tokenizers included, saved as diffusers saves
them.
"""

import string
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from dpfast.learn.models import build_learner

NAMES = ("cat", "dog", "red bicycle")
WORDS = ("cat", "dog", "photo", "red")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
INDEX = {str(i): name for i, name in enumerate(NAMES)}


def randomise(*models, std=0.1):
    """Weights far from the usual initialisation: zero-initialised outputs would hide the input and
    the condition.
    """
    generator = torch.Generator().manual_seed(7)
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)


def vae(latent_channels=4, **options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **{"scaling_factor": 0.5, **options},
    )


def tiny_vae(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        **options,
    )


def clip_tokenizer():
    """A byte-level BPE of letters and a few words, with CLIP's special tokens."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(pieces)):
            merge = ("".join(pieces[:i]), pieces[i])
            if merge not in merges:
                merges.append(merge)
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge) for merge in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [
        (letter, -3.0) for letter in string.ascii_lowercase
    ]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def clip_encoder(kind, tokenizer, width=16, **options):
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return kind(config).eval()


def dit(folder: Path, *, learned_sigma=False, tiny=True, layers=2, index=INDEX, **scheduler):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned_sigma else 4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
    )
    randomise(transformer)
    schedule = diffusers.DDIMScheduler(
        **{"beta_schedule": "scaled_linear", "clip_sample": False, **scheduler}
    )
    pipeline = diffusers.DiTPipeline(transformer, vae(), schedule, id2label=index)
    pipeline.register_to_config(id2label=index)
    pipeline.save_pretrained(folder)
    if tiny:
        tiny_vae().save_pretrained(folder / "tiny_decoder")
    return folder


def stable_diffusion(folder: Path, scheduler=None, encoder=None, **unet):
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        **{"attention_head_dim": 2, **unet},
    )
    randomise(network, std=0.3)
    tokenizer = clip_tokenizer()
    # the scheduler of the published 1.5 folder
    scheduler = scheduler or diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(transformers.CLIPTextModel, tokenizer, **(encoder or {})),
        tokenizer=tokenizer,
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path, scheduler=None, **unet):
    """Two encoders of other widths, heads and layers by level, and the sizes' embedding."""
    tokenizer = clip_tokenizer()
    first = clip_encoder(transformers.CLIPTextModel, tokenizer)
    second = clip_encoder(transformers.CLIPTextModelWithProjection, tokenizer, 24)
    network = diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16 + 24,
            "norm_num_groups": 4,
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 24,
            **unet,
        }
    )
    randomise(network, std=0.3)
    # the scheduler of the published folder
    base = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=network,
        scheduler=scheduler or base,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path, *, t5=True, **scheduler):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    randomise(transformer)
    clip, t5_words = clip_tokenizer(), t5_tokenizer()
    encoder = clip_encoder(transformers.CLIPTextModelWithProjection, clip)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=encoder,
        tokenizer=clip,
        text_encoder_2=encoder,
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5_words) if t5 else None,
        tokenizer_3=t5_words if t5 else None,
    ).save_pretrained(folder)
    return folder


def t5_encoder(words, width=32):
    torch.manual_seed(4)
    config = transformers.T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return transformers.T5EncoderModel(config).eval()


def flux(folder: Path, *, guidance_embeds=True, scheduler=None):
    """dev, or schnell without ``guidance_embeds``, with their schedulers."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    randomise(transformer)
    clip, words = clip_tokenizer(), t5_tokenizer()
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    diffusers.FluxPipeline(
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip_encoder(transformers.CLIPTextModel, clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(words),
        tokenizer_2=words,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path, *, kind=diffusers.PixArtSigmaPipeline, scheduler=None, **options):
    transformer = diffusers.PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "attention_bias": True,
            "sample_size": 8,
            "caption_channels": 32,
            **options,
        }
    )
    randomise(transformer)
    words = t5_tokenizer()
    kind(
        tokenizer=words,
        text_encoder=t5_encoder(words),
        vae=vae(),
        transformer=transformer,
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**BETAS),
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer(begin=True):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    numbers = {token: i for i, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(numbers, [], add_bos_token=begin)


def deep_compression():
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        in_channels=1,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )


def sana(folder: Path, *, scheduler=None, **options):
    transformer = diffusers.SanaTransformer2DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 32,
            "sample_size": 16,
            **options,
        }
    )
    randomise(transformer, std=0.2)
    words = gemma_tokenizer()
    torch.manual_seed(5)
    gemma = transformers.Gemma2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    # the scheduler of the published folders
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    diffusers.SanaPipeline(
        tokenizer=words,
        text_encoder=transformers.Gemma2Model(gemma).eval(),
        vae=deep_compression(),
        transformer=transformer,
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**flow),
    ).save_pretrained(folder)
    return folder


def pixel(folder: Path, *, class_embeddings=None, kind=diffusers.DDIMPipeline, scheduler=None):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=class_embeddings,
    )
    randomise(unet)
    kind(unet, scheduler or diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def learner(classes, channels):
    """A vision transformer for images of 16 px; as a recipe's model:
    "tests.tiny_pipelines:learner".
    """
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return build_learner(
        "transformers:ViTForImageClassification",
        classes=classes,
        channels=channels,
        image_size=16,
        patch_size=8,
        **sizes,
    )
