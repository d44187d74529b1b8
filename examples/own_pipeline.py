"""Run the loop on a generator that is no diffusers pipeline: noisy bars, the harder one of two.

python examples/own_pipeline.py
"""

import torch
from torch import nn

import dpfast


class Bars:
    """A bar in one of four rows. Where a learner guides, the less certain one of two is taken."""

    class_names, image_shape = ("top", "upper", "lower", "bottom"), (1, 16, 16)
    device = torch.device("cpu")

    def __init__(self, learner=None) -> None:
        self.learner = learner

    def sampler(self, learner, *, guidance, seed):
        return Bars(learner)

    def draw(self, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        drawn = [torch.Generator().manual_seed(int(key)) for key in keys]
        images = torch.stack([torch.rand(1, 16, 16, generator=each) for each in drawn]) * 255
        images[torch.arange(len(labels)), 0, 4 * labels] = 160
        return images.byte()

    def stream(self, labels, *, sample_ids, batch_size, omega=None, learner_step=0, **_):
        for some, ids in zip(labels.split(batch_size), sample_ids.split(batch_size), strict=True):
            images = self.draw(some, 2 * ids)
            value = torch.full((len(some),), torch.nan)
            if self.learner is not None:
                others = self.draw(some, 2 * ids + 1)
                values = [dpfast.entropy(self.learner(x / 127.5 - 1)) for x in (images, others)]
                images[values[1] > values[0]] = others[values[1] > values[0]]
                value = torch.maximum(*values).detach()
            batch = {"images": images, "labels": some, "sample_ids": ids, "entropy": value}
            yield dpfast.SampleBatch(**batch, learner_step=learner_step)

    def release(self) -> None: ...


def main() -> list[dpfast.Result]:
    """Returns the results of "dp" and "static"."""
    sizes = {"initial_samples": 40, "round_samples": 20, "maximum_samples": 60, "patience": 1}
    recipe = dpfast.Recipe.load("fashion", iterations=200, evaluate_every=10, **sizes)
    torch.manual_seed(0)  # of the learner's first weights
    real = (Bars().draw(torch.arange(80) % 4, 10**6 + torch.arange(80)), torch.arange(80) % 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    parts = {"pipeline": Bars(), "learner": net, "real": real}
    dp, static = dpfast.DeliberatePractice(recipe, **parts).run(progress=False)
    print(f"accuracy of dp {dp.test.top1:.1%}, of static {static.test.top1:.1%}")
    return [dp, static]


if __name__ == "__main__":
    main()
