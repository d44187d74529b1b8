"""Stand-ins that hold the sampler to the rules of a CUDA graph on a machine without one."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpfast.ops import dispatch

HOST_READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
}


class HostRead(RuntimeError):
    pass


def force_reference(monkeypatch):
    """dpfast's operations as PyTorch's: native kernels hide from a dispatch mode what they do."""
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "reference")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):
    """Sees every operation: notes host reads, and copies from a device to the host."""

    def __init__(self, *, refuse=False):
        super().__init__()
        self.refuse, self.reads, self.calls = refuse, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        out = func(*args, **kwargs)
        to_host = any(t.device.type != "cpu" for t in tensors((args, kwargs))) and any(
            t.device.type == "cpu" for t in tensors(out)
        )
        if name in HOST_READS or to_host:
            self.reads.append(name)
            if self.refuse:
                raise HostRead(f"{name} reads the host during a capture")
        self.calls.append((func, args, kwargs, out))
        return out


def from_noise(sampler, noise, labels, sample_ids=None):
    """Runs all steps from unit noise (B, c, h, w) of the test's own, and returns final latents."""
    begun = sampler.begin(labels, sample_ids)
    return sampler.advance(replace(begun, x=noise * sampler.table.initial_scale)).x


class StandInRecording:
    """Re-executes the recorded operations on the recorded tensors: what a call closed over stays
    where it was.
    """

    def __init__(self, calls, outputs, recorder):
        self.calls, self.outputs, self.recorder = calls, outputs, recorder
        recorder.alive += 1

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                for old, new in zip(tensors(recorded), tensors(func(*args, **kwargs)), strict=True):
                    # a view, or a result in place
                    if old.untyped_storage().data_ptr() not in inputs:
                        old.copy_(new)

    def reset(self):
        self.calls, self.outputs = [], ()
        self.recorder.alive -= 1


class StandInRecorder:
    """The protocol of ``dpfast.generate.graphs.Recorder`` by recording operations instead of
    kernels.

    It needs ``force_reference``. recorded: recordings ever made; alive: those that were not reset.
    """

    def __init__(self):
        self.recorded = self.closed = self.alive = 0

    def record(self, call):
        with torch.no_grad():
            call()
            with Watch(refuse=True) as watch:
                outputs = call()
        self.recorded += 1
        return StandInRecording(watch.calls, outputs, self)

    def close(self):
        self.closed += 1
