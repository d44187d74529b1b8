"""The guidance of dpfast inside other people's samplers.

``docs/guides/embed_sampler.md`` shows each in use.

GuidanceCallback      ``callback_on_step_end`` of Stable Diffusion 1.x, 2.x and 3 pipelines
GuidedDDIMScheduler   a ``DDIMScheduler`` for DiT, Stable Diffusion and pixel pipelines
LearnerGuidance       a guider of diffusers' modular pipelines
make_cond_fn          ``cond_fn(x, t, y)`` of guided-diffusion

They differ in the price of the gradient. The guider differentiates the conditional forward that the
pipeline runs anyway, as ``GuidedSampler`` does; a callback and a scheduler are called after it, so
they run one more.
"""

from dpfast.adapters.callback import GuidanceCallback
from dpfast.adapters.cond_fn import CondFn, make_cond_fn
from dpfast.adapters.guider import LearnerGuidance
from dpfast.adapters.scheduler import GuidedDDIMScheduler

__all__ = ["CondFn", "GuidanceCallback", "GuidedDDIMScheduler", "LearnerGuidance", "make_cond_fn"]
