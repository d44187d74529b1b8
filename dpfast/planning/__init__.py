"""What a run costs in FLOPs, bytes and hours, and how much of it a device's peaks allow.

counting       FLOPs and bytes moved by any computation
devices        peaks: published ones, and this machine measured
architectures  generators without weights, on the meta device
methods        a guided sample by the way its gradient is made
plan           a recipe on a number of devices: `dpfast plan`
measure        the stages of a recipe timed on this machine
"""

from dpfast.hardware.flops import Counts, Passes, count_flops, count_passes, count_work
from dpfast.hardware.peaks import DEVICES, Device, device, limit
from dpfast.planning.methods import PREDECESSOR, Method, PartFlops, dit_xl_2, stable_diffusion_15

__all__ = [
    "DEVICES",
    "PREDECESSOR",
    "Counts",
    "Device",
    "Method",
    "PartFlops",
    "Passes",
    "count_flops",
    "count_passes",
    "count_work",
    "device",
    "dit_xl_2",
    "limit",
    "stable_diffusion_15",
]
