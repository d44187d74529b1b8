"""Diffusers pipeline folders on disk: their models and prompts, as the parts that a sampler
needs.

pipeline   ``Pipeline``: a loaded folder
folder     the folder: its index, weights and class names
families   what each kind of pipeline becomes
prompts    class names to prompt embeddings
"""

from dpfast.generate.pipelines.pipeline import Pipeline

__all__ = ["Pipeline"]
