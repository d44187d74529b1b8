"""The baselines that dpfast is measured against, in plain diffusers code. Three, kept apart:

(a) ``Predecessor``: guidance as published before dpfast: one image at a time, one more denoiser
forward for each guided
    step, the full decoder in the gradient, PNG files that a loader reads back.
(b) ``Batched``: the mathematics of dpfast in batched eager code, with nothing left out that plain
code can do. (c) ``Batched(compile=True)``: the networks of (b) and their gradient under
``torch.compile``.

All take the initial noise from ``dpfast.ops.normal``, so that images with one sample id can be
compared one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpfast.generate.pipelines.folder import dtype_option
from dpfast.ops import normal


@dataclass(frozen=True)
class Models:
    """A ``DiTPipeline`` folder in float32, as diffusers loads it, and the learner: images in [-1,
    1] to logits.
    """

    transformer: nn.Module
    vae: nn.Module
    tiny: nn.Module
    scheduler: diffusers.DDIMScheduler
    learner: nn.Module

    @classmethod
    def load(
        cls, folder: str | Path, learner: nn.Module, device: torch.device | str = "cpu"
    ) -> Models:
        pipeline = diffusers.DiTPipeline.from_pretrained(folder, **dtype_option(torch.float32))
        tiny = diffusers.AutoencoderTiny.from_pretrained(
            Path(folder) / "tiny_decoder", **dtype_option(torch.float32)
        )
        networks = (pipeline.transformer, pipeline.vae, tiny)
        for network in networks:
            network.eval().requires_grad_(False).to(device)
        return cls(
            *networks, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config), learner
        )

    def predict(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.transformer(
            x, timestep=t.to(x.device).expand(len(x)), class_labels=labels
        ).sample

    def null(self, labels: Tensor) -> Tensor:
        """The labels of classifier-free guidance's empty condition."""
        return torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def decode_tiny(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents).sample

    def x0(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.scales(t)
        if self.scheduler.config.prediction_type == "v_prediction":
            return alpha * x - sigma * prediction
        return (x - sigma * prediction) / alpha

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self.scheduler.alphas_cumprod[t]
        return cumulative.sqrt(), (1 - cumulative).sqrt()


class Predecessor:
    """(a): image by image through files.

    A guided step moves the latent z by omega |z| along the normalised gradient of the entropy of
    the learner at x0 s + z (1 - s), s = sqrt(1 - alpha_bar), decoded in full and stretched to [0,
    1] by its own minimum and maximum. The prediction of the scheduler's step is the one from before
    the shift.
    """

    def __init__(
        self,
        models: Models,
        folder: Path,
        *,
        steps: int = 20,
        every: int = 5,
        omega: float = 0.03,
        cfg_scale: float = 1.5,
        seed: int = 0,
    ) -> None:
        self.models = models
        self.folder = folder
        self.every = every
        self.omega = omega
        self.cfg_scale, self.seed = cfg_scale, seed
        self.scheduler = diffusers.DDIMScheduler.from_config(models.scheduler.config)
        self.scheduler.set_timesteps(steps)

    def generate(self, labels: Tensor, ids: Tensor) -> Tensor:
        """uint8 images (B, C, H, W), which were files in between; the order is that of the
        labels.
        """
        return self.read(self.write(labels, ids))

    def write(self, labels: Tensor, ids: Tensor) -> list[Path]:
        """A PNG file for each label, in its class's folder: what the predecessor does, and all
        that is timed. Reading a file back is the training's work.
        """
        return [self._sample(label[None], i[None]) for label, i in zip(labels, ids, strict=True)]

    def read(self, paths: list[Path]) -> Tensor:
        """The images (B, C, H, W) of files, as PIL decodes them."""
        arrays = (np.atleast_3d(np.array(Image.open(path))) for path in paths)
        return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])

    def latents(self, label: Tensor, sample_id: Tensor) -> Tensor:
        """The final latent (1, c, h, w) of one label (1,) and id (1,)."""
        models, config = self.models, self.models.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        z = normal(sample_id, shape, seed=self.seed, stream=0)
        for index, t in enumerate(self.scheduler.timesteps):
            with torch.no_grad():
                both = models.predict(torch.cat([z, z]), t, torch.cat([label, models.null(label)]))
            conditional, unconditional = both.chunk(2)
            prediction = unconditional + self.cfg_scale * (conditional - unconditional)
            if index % self.every == 0 and self.omega:
                gradient = self.gradient(z, t, label)
                if not gradient.isfinite().all():  # one retry, then without
                    gradient = self.gradient(z, t, label).nan_to_num(0.0, 0.0, 0.0)
                z = z + gradient / (gradient.norm() + 1e-8) * z.norm() * self.omega
            z = self.scheduler.step(prediction, t, z).prev_sample
        return z

    def _sample(self, label: Tensor, sample_id: Tensor) -> Path:
        latents = self.latents(label, sample_id)
        with torch.no_grad():
            image = (self.models.decode(latents) / 2 + 0.5).clamp(0, 1)
        pixels = (image[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        target = self.folder / f"{int(label):04d}"
        target.mkdir(parents=True, exist_ok=True)
        # the next free number, by a look at the folder
        path = target / f"{len(list(target.iterdir())):06d}.png"
        Image.fromarray(pixels.squeeze()).save(path)
        return path

    @torch.enable_grad()
    def gradient(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        models = self.models
        z = z.detach().requires_grad_(True)
        x0 = models.x0(z, models.predict(z, t, label), t)
        share = models.scales(t)[1]
        image = models.decode(x0 * share + z * (1 - share)) / 2 + 0.5
        image = image - image.detach().min()
        image = image / image.detach().max()
        logits = models.learner(image * 2 - 1)
        entropy = nn.functional.cross_entropy(logits, logits.softmax(dim=1))
        return torch.autograd.grad(entropy, z)[0]


@dataclass(kw_only=True)
class Batched:
    """(b) by default, and its variants on the way from (a).

    share: the conditional forward of classifier-free guidance is the one that is differentiated;
    False: one more forward. decoder: in the gradient. blend: the image that (a) shows its learner,
    per sample; False: x0's own. cfg_until: classifier-free guidance stops at this fraction of the
    steps. solver: "ddim" or "dpmpp2m". compile: (c). Norms belong to samples.
    """

    models: Models
    steps: int = 20
    every: int = 5
    omega: float = 0.03
    cfg_scale: float = 1.5
    cfg_until: float = 1.0
    share: bool = True
    decoder: Literal["full", "tiny"] = "tiny"
    blend: bool = False
    solver: Literal["ddim", "dpmpp2m"] = "ddim"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        kind = (
            diffusers.DDIMScheduler
            if self.solver == "ddim"
            else diffusers.DPMSolverMultistepScheduler
        )
        self.scheduler = kind.from_config(self.models.scheduler.config)
        if self.compile:
            self.gradient = torch.compile(self.gradient, fullgraph=True, dynamic=False)
            self._predict = torch.compile(self.models.predict, fullgraph=True, dynamic=False)
            self._decode = torch.compile(self.models.decode, fullgraph=True, dynamic=False)
        else:
            self._predict, self._decode = self.models.predict, self.models.decode

    @torch.no_grad()
    def generate(self, labels: Tensor, ids: Tensor) -> Tensor:
        """uint8 images (B, C, H, W)."""
        return (
            ((self._decode(self.latents(labels, ids)) / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        )

    @torch.no_grad()
    def latents(self, labels: Tensor, ids: Tensor) -> Tensor:
        """The final latents (B, c, h, w)."""
        models, config = self.models, self.models.transformer.config
        null = models.null(labels)
        x = normal(
            ids,
            (config.in_channels, config.sample_size, config.sample_size),
            seed=self.seed,
            stream=0,
        )
        self.scheduler.set_timesteps(self.steps)
        for index, t in enumerate(self.scheduler.timesteps):
            guided = index % self.every == 0 and self.omega != 0
            cfg = self.cfg_scale != 1 and index < self.cfg_until * self.steps
            gradient = unconditional = None
            if guided:
                gradient, conditional = self.gradient(x, t, labels, *models.scales(t))
            if cfg and guided and self.share:
                unconditional = self._predict(x, t, null)
            elif cfg:
                both = self._predict(torch.cat([x, x]), t, torch.cat([labels, null]))
                conditional, unconditional = both.chunk(2)
            elif not guided:
                conditional = self._predict(x, t, labels)
            prediction = conditional
            if unconditional is not None:
                prediction = unconditional + self.cfg_scale * (conditional - unconditional)
            if gradient is not None:
                size, length = (
                    tensor.flatten(1).norm(dim=1)[:, None, None, None] for tensor in (x, gradient)
                )
                x = x + self.omega * size / (length + 1e-8) * gradient
            x = self.scheduler.step(prediction, t, x).prev_sample
        return x

    def gradient(
        self, x: Tensor, t: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the learner's entropy at x, and the conditional prediction."""

        def entropy(x: Tensor) -> tuple[Tensor, Tensor]:
            prediction = self.models.predict(x, t, labels)
            v = self.models.scheduler.config.prediction_type == "v_prediction"
            x0 = alpha * x - sigma * prediction if v else (x - sigma * prediction) / alpha
            if self.blend:
                x0 = x0 * sigma + x * (1 - sigma)
            image = (
                self.models.decode_tiny(x0) if self.decoder == "tiny" else self.models.decode(x0)
            )
            if self.blend:
                image = image / 2 + 0.5
                image = image - image.detach().amin(dim=(1, 2, 3), keepdim=True)
                image = image / image.detach().amax(dim=(1, 2, 3), keepdim=True) * 2 - 1
            log_p = self.models.learner(image).float().log_softmax(dim=1)
            return -(log_p.exp() * log_p).sum(), prediction

        gradient, prediction = torch.func.grad(entropy, has_aux=True)(x)
        return gradient, prediction
