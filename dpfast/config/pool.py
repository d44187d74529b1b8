"""The section ``[pool]`` of a recipe: where samples are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpfast.config.option import option
from dpfast.config.section import Section, require


@dataclass(frozen=True, kw_only=True)
class Pool(Section, name="pool"):
    """The form in which samples are kept, and the memory that they may take."""

    codec: Literal["pixels", "latents", "jpeg"] = option(
        "pixels",
        common=True,
        help="form of a sample in the pool: uint8 pixels, float16 latents that are decoded when a "
        "batch is made, or JPEG",
    )
    device_gib: float | None = option(
        None,
        unit="GiB",
        low=0,
        unset="half of what is free on a GPU",
        common=True,
        help="memory on the run's device, which is filled first",
    )
    host_gib: float | None = option(
        None,
        unit="GiB",
        low=0,
        unset="70 % of what is free at the start",
        common=True,
        help="memory of the host, which is filled next",
    )
    mapped: bool = option(
        False,
        help="hold the rest in memory-mapped files in "
        "the run's folder, up to 90 % of its free disk",
    )
    save_samples: Literal["png", "npy", "jpeg", "none"] = option(
        "png",
        common=True,
        help="form of samples of pixels in the run's folder; png and npy are exact; none: no "
        "resume, no export",
    )

    def check(self) -> None:
        fits = self.save_samples != "jpeg" or self.codec == "pixels"
        require(fits, "save_samples", self.save_samples, "'png' unless codec = 'pixels'")
