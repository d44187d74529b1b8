"""The pool: what goes in comes out, growing copies once and moves nothing, chunks obey budgets, bad
input is named.
"""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.pool import codecs
from dpfast.pool.batch import BatchFormat
from dpfast.pool.memory_tiers import MemoryTiers, PoolFullError
from dpfast.pool.pool import SamplePool
from tests.pool.helpers import ORIGIN, SHAPE, batch, check_prefix, latents, pixels

ROW = 3 * 6 * 6
CPU = torch.device("cpu")


def small(**options):
    """A pool of ten samples a chunk."""
    return SamplePool(chunk_bytes=10 * ROW + 7, **options)


def filled(*counts, pool=None, **options):
    pool = pool or small(**options)
    for number, count in enumerate(counts):
        pool.append(batch(len(pool), count), round=number, **ORIGIN)
    return pool


def test_samples_and_columns_survive_chunk_borders():
    pool = filled(5, 13, 1, 40)
    check_prefix(pool, 59)
    indices = torch.tensor([58, 0, 9, 10, 9, 19, 20])
    assert torch.equal(pool.images(indices), pixels(indices))
    assert pool.column("round").tolist() == [0] * 5 + [1] * 13 + [2] + [3] * 40
    assert pool.column("learner_step").tolist() == [0] * 5 + [5] * 13 + [18] + [19] * 40
    for name, value in ORIGIN.items():
        assert pool.column(name).tolist() == pytest.approx([value] * 59)
    assert pool.fresh == 40


class Copies(TorchDispatchMode):
    """Counts the bytes that torch and the native kernel copy, and the operations that make new
    storage.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.copied, self.made = 0, []
        if dispatch.native() is not None:
            monkeypatch.setattr(dispatch, "native_module", lambda: self)

    def rows(self, *arguments):
        """The native kernel; its fifth and seventh arguments are the bytes of a row and their
        number.
        """
        self.copied += arguments[4] * arguments[6]
        return dispatch.native().rows(*arguments)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.copy_.default:
            self.copied += args[0].nbytes
        elif isinstance(out, torch.Tensor) and out.nbytes >= ROW:
            inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in inputs:
                self.made.append(str(function))
        return out


def test_an_append_copies_each_sample_once(monkeypatch):
    pool, new = filled(10), batch(10, 25)
    with Copies(monkeypatch) as copies:
        pool.append(new, round=1, **ORIGIN)
    assert copies.copied == 25 * ROW
    assert copies.made == []
    check_prefix(pool, 35)


def test_an_append_of_channels_last_images_is_one_copy_too(monkeypatch):
    pool, new = filled(10), batch(10, 25)
    new.images = new.images.to(memory_format=torch.channels_last)
    with Copies(monkeypatch) as copies:
        pool.append(new, round=1, **ORIGIN)
    assert (copies.copied, copies.made) == (25 * ROW, [])
    check_prefix(pool, 35)


def test_growing_moves_no_sample_and_leaves_old_views_valid():
    pool = filled(10)
    view, address = pool.snapshot, pool.snapshot.chunks.chunks[0].data_ptr()
    filled(30, pool=pool)
    assert pool.snapshot.chunks.chunks[0].data_ptr() == address
    assert (view.size, len(view.chunks.chunks)) == (10, 1)


def test_readers_see_whole_appends_only_and_hold_nobody_up():
    """Four readers check everything that they see during 300 appends; one of them dies, which stops
    nobody.
    """
    pool, wrong, done = small(), [], threading.Event()

    def read(dies):
        while not done.is_set():
            size = len(pool)
            if size:
                indices = torch.randint(0, size, (32,))
                if not torch.equal(pool.images(indices), pixels(indices)) or size % 7:
                    wrong.append(size)
                if dies:
                    return

    readers = [threading.Thread(target=read, args=(i == 0,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        pool.append(batch(len(pool), 7), round=0, **ORIGIN)
    done.set()
    for reader in readers:
        reader.join(20)
    assert not any(reader.is_alive() for reader in readers)
    assert wrong == []
    check_prefix(pool, 2100)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_normalises_and_mirrors(backend, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", backend)
    pool, indices, flip = (
        filled(33),
        torch.tensor([29, 2, 2, 11]),
        torch.tensor([False, True, False, True]),
    )
    images, labels = pool.gather(
        indices, BatchFormat(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), dtype=dtype), flip=flip
    )
    expected = (pixels(indices) / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    expected = torch.where(flip[:, None, None, None], expected.flip(3), expected)
    torch.testing.assert_close(
        images.float(), expected, atol=1e-5 if dtype is torch.float32 else 0.02, rtol=0
    )
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [9, 2, 2, 1]


def test_latents_are_decoded_in_bounded_parts_that_halve_where_memory_runs_out(monkeypatch):
    monkeypatch.setattr(codecs, "DECODED", 5 * 16)  # latents have sixteen values
    sizes, most = [], 5

    def decode(z):
        sizes.append(len(z))
        if len(z) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z.repeat(1, 1, 3, 3)[:, :3].clamp(-1, 1)

    pool = SamplePool("latents", decode=decode)
    pool.append(batch(0, 12), payload=latents(torch.arange(12)), round=0, **ORIGIN)
    whole = pool.images(torch.arange(12))
    assert sizes == [5, 5, 2]
    most = 3
    assert torch.equal(pool.images(torch.arange(12)), whole)
    assert sizes[3:] == [5, 2, 2, 2, 2, 2, 2]
    pool.append(batch(12, 2), payload=latents(torch.arange(12, 14)), round=0, **ORIGIN)
    pool.gather(torch.arange(5))
    assert sizes[10:] == [2, 2, 1], "later views remember"


def test_latents_are_decoded_when_a_batch_is_made():
    pool = SamplePool(
        "latents", chunk_bytes=100, decode=lambda z: z.repeat(1, 1, 3, 3)[:, :3].clamp(-1, 1)
    )
    ids = torch.arange(17)
    pool.append(batch(0, 17), payload=latents(ids), round=0, **ORIGIN)
    check_prefix(pool, 17, "latents")
    decoded = pool.decode(latents(ids).float())
    images, labels = pool.gather(ids, flip=ids % 2 == 0)
    torch.testing.assert_close(
        images, torch.where((ids % 2 == 0)[:, None, None, None], decoded.flip(3), decoded)
    )
    assert labels.tolist() == (ids % 10).tolist()
    assert torch.equal(pool.images(ids), ((decoded + 1) * 127.5).round().to(torch.uint8))
    with pytest.raises(ValueError, match="no decode function"):
        SamplePool("latents").gather(torch.arange(0))


def test_latents_that_are_decoded_to_what_is_not_finite_make_no_black_images():
    """A batch shows them to the loss as they are; images of bytes cannot."""

    def decode(z):
        return z.repeat(1, 1, 3, 3)[:, :3].mul(1e5).half().float()

    pool = SamplePool("latents", decode=decode)
    payload = torch.full((3, 4, 2, 2), 0.5, dtype=torch.float16)
    payload[1] = 2.0
    pool.append(batch(0, 3), payload=payload, round=0, **ORIGIN)
    assert not bool(pool.gather(torch.arange(3))[0].isfinite().all())
    with pytest.raises(InputError, match=r"image that is not finite \(1 of 3\)"):
        pool.images(torch.arange(3))
    assert len(pool.images(torch.tensor([0, 2]))) == 2


def test_jpeg_files_are_kept_byte_for_byte_and_decoded_close_to_the_image():
    pool, ids = SamplePool("jpeg", chunk_bytes=4000), torch.arange(20)
    smooth = torch.linspace(0, 200, 64).view(1, 1, 8, 8).expand(20, 3, 8, 8) + ids.view(-1, 1, 1, 1)
    new = batch(0, 20)
    new.images = smooth.round().to(torch.uint8)
    pool.append(new, round=0, **ORIGIN)
    assert len(pool.snapshot.chunks.chunks) > 2
    files = pool.payload(ids)
    assert all(file[:2] == b"\xff\xd8" for file in files)
    assert int((pool.images(ids).int() - new.images.int()).abs().max()) < 12
    again = SamplePool("jpeg", chunk_bytes=4000)
    again.append(new, payload=files, round=0, **ORIGIN)
    assert again.payload(ids.flip(0)) == files[::-1]
    assert pool.gather(ids[:4])[0].shape == (4, 3, 8, 8)
    assert pool.in_tier()["host"] == 20


def test_chunks_fill_the_tiers_in_order_and_move_with_the_budgets(tmp_path):
    """A CPU stands in for the device: the tiers differ in how a chunk is allocated, not in how it
    is read.
    """
    chunk = 10 * ROW + 7
    tiers = MemoryTiers(
        device=CPU, device_bytes=2 * chunk, host_bytes=chunk, folder=tmp_path, file_bytes=3 * chunk
    )
    pool = filled(45, tiers=tiers)
    assert pool.in_tier() == {"device": 20, "host": 10, "file": 15}
    assert list(tmp_path.iterdir()) == []  # nothing to clean up, whatever happens
    check_prefix(pool, 45)
    old = pool.snapshot
    pool.move(MemoryTiers(host_bytes=chunk, folder=tmp_path, file_bytes=9 * chunk))
    assert pool.in_tier() == {"device": 0, "host": 10, "file": 35}
    check_prefix(pool, 45)
    assert old.records(torch.tensor([44]))["sample_id"] == 44
    filled(15, pool=pool)
    pool.move(MemoryTiers(host_bytes=9 * chunk))
    assert pool.in_tier() == {"device": 0, "host": 60, "file": 0}
    check_prefix(pool, 60)
    with pytest.raises(PoolFullError):
        pool.move(MemoryTiers(host_bytes=chunk))
    assert pool.in_tier()["host"] == 60


def test_reserved_chunks_are_the_next_ones():
    pool = filled(5, tiers=MemoryTiers(host_bytes=6 * (10 * ROW + 7)))
    pool.reserve(34, wait=True)  # five are in the first chunk already
    reserved = [spare.result().data_ptr() for _, spare in pool._spares]
    assert len(reserved) == 3
    pool.reserve(34)
    assert len(pool._spares) == 3
    filled(34, pool=pool)
    assert [chunk.data_ptr() for chunk in pool.snapshot.chunks.chunks[1:]] == reserved
    check_prefix(pool, 39)
    with pytest.raises(PoolFullError):
        pool.reserve(1000)
    with pytest.raises(ValueError, match="give the pool a shape"):
        SamplePool().reserve(1)


def test_a_full_pool_refuses_the_whole_batch_with_the_numbers():
    pool = filled(25, tiers=MemoryTiers(host_bytes=3 * (10 * ROW + 7)))
    with pytest.raises(
        PoolFullError, match=r"3 chunks of 1\.062 KiB.*host 3\.185 KiB.*latents or JPEG"
    ):
        filled(12, pool=pool)
    check_prefix(pool, 25)
    filled(5, pool=pool)
    check_prefix(pool, 30)


def test_the_disk_of_the_file_tier_is_reserved_before_it_is_written(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    pool = filled(
        10, tiers=MemoryTiers(host_bytes=10 * ROW + 7, folder=tmp_path, file_bytes=1 << 20)
    )
    with pytest.raises(OSError, match="No space left"):
        filled(1, pool=pool)
    monkeypatch.undo()
    filled(1, pool=pool)
    check_prefix(pool, 11)


def test_columns_cost_at_most_64_bytes_a_sample():
    pool = SamplePool(chunk_bytes=1 << 20)
    new = batch(0, 200_000, (1, 2, 2))
    pool.append(new, round=0, **ORIGIN)
    assert (pool.nbytes - new.images.nbytes) / 200_000 <= 64 + (
        1 << 20
    ) / 200_000  # and the last chunk's free end


def test_bad_input_is_named():
    pool = filled(3)
    with pytest.raises(IndexError, match="holds 3"):
        pool.images(torch.tensor([3]))
    with pytest.raises(IndexError, match=r"-1\.\.2"):
        pool.gather(torch.tensor([2, -1]))
    with pytest.raises(ValueError, match=r"\(3, 5, 5\).*\(3, 6, 6\)"):
        pool.append(batch(0, 3, (3, 5, 5)), round=0, **ORIGIN)
    with pytest.raises(ValueError, match="expected uint8"):
        pool.append(batch(0, 3), payload=torch.zeros(3, *SHAPE), round=0, **ORIGIN)
    with pytest.raises(ValueError, match="2 payloads for 3 samples"):
        pool.append(batch(0, 3), payload=pixels(torch.arange(2)), round=0, **ORIGIN)
    with pytest.raises(KeyError, match="entropy"):
        pool.column("hardness")
    with pytest.raises(ValueError, match="codec = 'webp'"):
        SamplePool("webp")
    with pytest.raises(ValueError, match="without a folder"):
        MemoryTiers(file_bytes=1)
    assert len(pool) == 3


def test_images_of_any_origin_are_numbered_and_each_call_is_a_round():
    pool = SamplePool()
    for count in (3, 2):
        pool.append_images(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), torch.arange(count))
    assert pool.fresh == 2
    assert pool.column("sample_id").tolist() == [0, 1, 2, 3, 4]
    assert pool.column("round").tolist() == [0, 0, 0, 1, 1]
    assert pool.column("label").tolist() == [0, 1, 2, 0, 1]
    assert pool.column("entropy").isnan().all()


def test_labels_may_be_any_integers_and_what_cannot_be_appended_is_named():
    pool, images = SamplePool(), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for labels in (torch.tensor([1, 2]), torch.tensor([1, 2]).numpy(), [1, 2]):
        pool.append_images(images, labels)
    assert pool.column("label").tolist() == [1, 2] * 3
    truths = torch.tensor([True, False])
    for labels in (torch.zeros(2), [1.0, 2.0], torch.arange(3), truths, [-1, 0], [0, 1 << 31]):
        with pytest.raises(InputError, match="append_images: label"):
            pool.append_images(images, labels)
    for labels in (["cat", "dog"], None):
        with pytest.raises(TypeError, match="labels must be"):
            pool.append_images(images, labels)
    with pytest.raises(InputError, match=r"images are .* expected uint8 \(B, C, H, W\)"):
        pool.append_images(images[:, 0, :, :], [1, 2, 3])
    with pytest.raises(TypeError, match="a pool of pixels takes a tensor, got list"):
        pool.append_images([1, 2], [1, 2, 3])
    assert len(pool) == 6
