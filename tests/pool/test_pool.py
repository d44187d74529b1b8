"""The pool: what goes in comes out, growing moves nothing, wrong input is named."""

import pytest
import torch

import dpfast.pool.pool as pool_module
from dpfast.generate.sampler import SampleBatch
from dpfast.pool.pool import SamplePool


def batch(count, first_id=0, size=6):
    images = torch.randint(0, 256, (count, 2, size, size), dtype=torch.uint8)
    ids = torch.arange(first_id, first_id + count)
    return SampleBatch(images=images, labels=ids % 3, sample_ids=ids, entropy=ids / 7.0, learner_step=4)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pool_module, "CHUNK", 8)


def test_samples_and_columns_survive_chunk_borders(small_chunks):
    pool, parts = SamplePool(), [batch(5), batch(13, 5), batch(1, 18)]
    for number, part in enumerate(parts):
        pool.append(part, round=number, omega=0.1 * number)
    assert len(pool) == 19
    images = torch.cat([p.images for p in parts])
    indices = torch.tensor([18, 0, 7, 8, 7, 15, 16])
    assert torch.equal(pool.images(indices), images[indices])
    assert pool.column("sample_id").tolist() == list(range(19))
    assert pool.column("label").tolist() == [i % 3 for i in range(19)]
    assert pool.column("round").tolist() == [0] * 5 + [1] * 13 + [2]
    torch.testing.assert_close(pool.column("entropy"), torch.arange(19) / 7.0)
    assert set(pool.column("learner_step").tolist()) == {4}


def test_growing_moves_no_sample(small_chunks):
    pool = SamplePool()
    pool.append(batch(8), round=0, omega=0.0)
    address = pool._chunks[0].images.data_ptr()
    pool.append(batch(30, 8), round=1, omega=0.0)
    assert pool._chunks[0].images.data_ptr() == address


def test_gather_normalises_and_mirrors(small_chunks):
    pool, part = SamplePool(), batch(11)
    pool.append(part, round=0, omega=0.0)
    indices, flip = torch.tensor([9, 2, 2]), torch.tensor([False, True, False])
    images, labels = pool.gather(indices, flip=flip)
    expected = part.images[indices].float() / 127.5 - 1
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(images, expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 2, 2]


def test_bad_input_is_named(small_chunks):
    pool = SamplePool()
    pool.append(batch(3), round=0, omega=0.0)
    with pytest.raises(IndexError, match="holds 3"):
        pool.images(torch.tensor([3]))
    with pytest.raises(ValueError, match=r"\(2, 5, 5\).*\(2, 6, 6\)"):
        pool.append(batch(3, size=5), round=0, omega=0.0)
    wrong = batch(3)
    with pytest.raises(ValueError, match="uint8"):
        pool.append(SampleBatch(**{**wrong.__dict__, "images": wrong.images.float()}), round=0, omega=0.0)
