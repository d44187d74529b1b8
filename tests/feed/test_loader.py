"""Order and loader: every sample once a pass, growth at once, exact restore."""

import torch

from dpfast.feed.augment import random_shift
from dpfast.feed.order import Order
from dpfast.feed.torch_loader import TorchLoader
from dpfast.generate.sampler import SampleBatch
from dpfast.pool.pool import SamplePool


def pool_of(count, pool=None):
    pool = pool or SamplePool()
    ids = torch.arange(len(pool), len(pool) + count)
    images = (ids % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    pool.append(SampleBatch(images=images, labels=ids, sample_ids=ids, entropy=ids.float()), round=0, omega=0.0)
    return pool


def test_a_pass_covers_every_sample_once():
    order = Order(seed=0, batch_size=7)
    seen = torch.cat([order.next(50) for _ in range(50)])  # 350 indices: seven passes
    assert [sorted(part.tolist()) == list(range(50)) for part in seen.split(50)] == [True] * 7
    assert not torch.equal(seen[:50], seen[50:100])


def test_growth_starts_a_pass_over_everything_at_once():
    order = Order(seed=0, batch_size=10)
    order.next(20)
    seen = torch.cat([order.next(60) for _ in range(6)])
    assert sorted(seen.tolist()) == list(range(60))


def test_order_restores_from_its_state():
    order, twin = Order(seed=3, batch_size=9), Order(seed=3, batch_size=9)
    for _ in range(11):
        order.next(40)
    twin.restore(order.state())
    assert all(torch.equal(order.next(size), twin.next(size)) for size in (40, 40, 40, 55, 55))


def test_loader_repeats_exactly_from_its_state():
    loader = TorchLoader(pool_of(30), batch_size=8, seed=1, flip=True, shift=2)
    for _ in range(5):
        next(loader)
    twin = TorchLoader(loader.pool, batch_size=8, seed=1, flip=True, shift=2)
    twin.restore(loader.state())
    for _ in range(5):
        (images, labels), (images_twin, labels_twin) = next(loader), next(twin)
        assert torch.equal(images, images_twin)
        assert torch.equal(labels, labels_twin)


def test_new_samples_are_in_the_batches_after_an_append():
    pool = pool_of(8)
    loader = TorchLoader(pool, batch_size=8, seed=0, flip=False)
    assert int(next(loader)[1].max()) < 8
    pool_of(8, pool)
    labels = torch.cat([next(loader)[1] for _ in range(2)])
    assert sorted(labels.tolist()) == list(range(16))


def test_shift_moves_each_image_by_its_own_whole_offset():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(20, 1, 8, 8)
    moved = random_shift(images, 2, torch.Generator().manual_seed(0))
    offsets = {(int(m[0, 4, 4]) // 8 - 4, int(m[0, 4, 4]) % 8 - 4) for m in moved}
    assert len(offsets) > 5
    assert all(max(abs(dy), abs(dx)) <= 2 for dy, dx in offsets)
    dy, dx = int(moved[0, 0, 4, 4]) // 8 - 4, int(moved[0, 0, 4, 4]) % 8 - 4
    assert torch.equal(moved[0, 0, 2:6, 2:6], images[0, 0, 2 + dy : 6 + dy, 2 + dx : 6 + dx])
