"""Diffusers pipeline folders on disk: their models and prompts, as the parts that a sampler
needs.

pipeline   ``Pipeline``: a loaded folder
folder     the folder: its index, weights and class names
hub        models of the Hugging Face Hub: folders of its cache, and what is downloaded
lora       LoRA weights, fused into the models of a folder
families   what each kind of pipeline becomes
prompts    class names to prompts, and those to embeddings
"""

from dpfast.generate.pipelines.pipeline import Pipeline

__all__ = ["Pipeline"]
