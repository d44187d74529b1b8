"""All operations in one graph: `torch.export`, a compiled step with a vector-Jacobian product
inside, `torch.func`.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpfast.ops import entropy_and_grad, gather_batch, guided_step, normal


class Everything(torch.nn.Module):
    def forward(self, x, cond, uncond, grad, table, step, seed, ids, logits, store):
        guided = guided_step(
            x, cond, uncond, grad, table, step, cfg_scale=2.0, omega=0.1, sample_ids=ids, seed=seed
        )
        options = {
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
            "dtype": torch.float32,
            "channels_last": True,
        }
        noise = normal(ids, (3,), seed=seed, stream=0)
        return *entropy_and_grad(logits), guided, noise, gather_batch(store, ids, **options)


def test_export(device):
    latents = [torch.randn(2, 4, 5, device=device) for _ in range(4)]
    scalars = [
        torch.rand(7, 6, device=device),
        torch.tensor(2, device=device),
        torch.tensor(5, device=device),
    ]
    store = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, device=device)
    arguments = (
        *latents,
        *scalars,
        torch.arange(2, device=device),
        torch.randn(2, 9, device=device),
        store,
    )
    module = Everything()
    exported = torch.export.export(module, arguments).module()
    for actual, expected in zip(exported(*arguments), module(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_fake_tensors_pass_through(device):
    """Their memory cannot be read: whoever plans or traces with them has to meet the registered
    operations.
    """
    with FakeTensorMode():
        x, ids = torch.empty(3, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
        results = Everything()(
            x,
            x,
            x,
            x,
            torch.empty(7, 6, device=device),
            ids[0],
            ids[0],
            ids,
            x.bfloat16(),
            torch.empty(4, 3, 5, 6, dtype=torch.uint8, device=device),
        )
    assert [tuple(result.shape) for result in results] == [
        (3,),
        (3, 8),
        (3, 8),
        (3, 3),
        (3, 3, 5, 6),
    ]
    assert results[1].dtype == torch.bfloat16
    assert results[-1].is_contiguous(memory_format=torch.channels_last)


def test_a_guided_step_compiles_with_its_vjp(device):
    table, step = torch.rand(7, 6, device=device), torch.tensor(2, device=device)

    def guide(x):
        logits, pull_back = torch.func.vjp(torch.sin, x)
        _, dlogits = entropy_and_grad(logits)
        return guided_step(x, x, None, pull_back(dlogits)[0], table, step, cfg_scale=1.0, omega=0.1)

    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(
        torch.compile(guide, fullgraph=True, backend="aot_eager")(x), guide(x)
    )


def test_what_has_no_derivative_counts_as_constant_in_function_transforms(device):
    table, ids = torch.rand(7, 6, device=device), torch.arange(3, device=device)

    def total(x):
        stepped = guided_step(
            x, x, None, x, table, 2, cfg_scale=1.0, omega=x.mean(), sample_ids=ids
        )
        return (x * (stepped + normal(ids, (8,), seed=1, stream=0))).sum()

    x = torch.randn(3, 8, device=device)
    constant = guided_step(x, x, None, x, table, 2, cfg_scale=1.0, omega=x.mean(), sample_ids=ids)
    expected = constant + normal(ids, (8,), seed=1, stream=0)
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(
        torch.compile(torch.func.grad(total), fullgraph=True, backend="aot_eager")(x), expected
    )


@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_noise_and_batches_under_vmap(device):
    ids = torch.tensor([[0, 5], [3, 1]], device=device)
    store = torch.randint(0, 256, (6, 3, 5, 6), dtype=torch.uint8, device=device)
    options = {"mean": [0.5] * 3, "std": [0.2] * 3, "dtype": torch.float32, "channels_last": False}
    for call in (
        lambda i: normal(i, (7,), seed=1, stream=0),
        lambda i: gather_batch(store, i, **options),
    ):
        assert torch.equal(torch.func.vmap(call)(ids), torch.stack([call(row) for row in ids]))
