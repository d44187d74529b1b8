"""A GPU or a skip; fp32 products are fp32, so that results can be compared with a CPU's."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def on_gpu():
    """A pipeline folder's pipeline on the GPU."""
    from dpfast.generate.pipelines import Pipeline

    return lambda folder, **options: Pipeline.from_pretrained(folder, device="cuda", **options)


@pytest.fixture
def gpu_learner(learner):
    return learner.cuda()
