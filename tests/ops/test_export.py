"""All operations in one graph: `torch.export`, and a compiled step with a vector-Jacobian product inside."""

from __future__ import annotations

import torch

from dpfast.ops import entropy_and_grad, gather_batch, guided_step, normal


class Everything(torch.nn.Module):
    def forward(self, x, cond, uncond, grad, table, step, seed, ids, logits, store):
        guided = guided_step(x, cond, uncond, grad, table, step, cfg_scale=2.0, omega=0.1, sample_ids=ids, seed=seed)
        options = {"mean": [0.5] * 3, "std": [0.2] * 3, "dtype": torch.float32, "channels_last": True}
        noise = normal(ids, (3,), seed=seed, stream=0)
        return *entropy_and_grad(logits), guided, noise, gather_batch(store, ids, **options)


def test_export(device):
    latents = [torch.randn(2, 4, 5, device=device) for _ in range(4)]
    scalars = [torch.rand(7, 6, device=device), torch.tensor(2, device=device), torch.tensor(5, device=device)]
    store = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, device=device)
    arguments = (*latents, *scalars, torch.arange(2, device=device), torch.randn(2, 9, device=device), store)
    module = Everything()
    exported = torch.export.export(module, arguments).module()
    for actual, expected in zip(exported(*arguments), module(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_a_guided_step_compiles_with_its_vjp(device):
    table, step = torch.rand(7, 6, device=device), torch.tensor(2, device=device)

    def guide(x):
        logits, pull_back = torch.func.vjp(torch.sin, x)
        _, dlogits = entropy_and_grad(logits)
        return guided_step(x, x, None, pull_back(dlogits)[0], table, step, cfg_scale=1.0, omega=0.1)

    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(torch.compile(guide, fullgraph=True, backend="aot_eager")(x), guide(x))
