"""Both loaders: the same batches, exact positions, appends in the next batch, errors that
arrive.
"""

import math
import threading

import numpy as np
import pytest
import torch

from dpfast import feed
from dpfast.errors import InputError
from dpfast.feed import choose_loader, dali_installed, make_loader
from dpfast.feed.augment import Augment
from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import LoaderError, Made, PoolLoader
from dpfast.feed.torch_loader import TorchLoader
from dpfast.pool.batch import BatchFormat
from dpfast.pool.pool import SamplePool
from dpfast.pool.snapshot import PoolSnapshot
from tests.pool.helpers import Batch

DALI = pytest.param(
    "dali", marks=pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
)
KINDS = ["torch", DALI]
EVERYTHING = Augment(flip=True, shift=1, crop=0.3, size=(12, 10), mixup=0.2, cutmix=1.0)


def pool_of(count=30, shape=(3, 14, 16), codec="pixels", **options):
    pool = SamplePool(codec, **options)
    grow(pool, count, shape)
    return pool


def batch_of(first, images):
    ids = torch.arange(first, first + len(images))
    return Batch(images, ids, ids, torch.zeros(len(images)))


def grow(pool, count, shape=(3, 14, 16)):
    """Appends images of which all pixels of sample i are near 5 i; its label is its place."""
    first = len(pool)
    generator = torch.Generator().manual_seed(first)
    base = 5 * (torch.arange(first, first + count) % 50)[:, None, None, None]
    images = (base + torch.randint(0, 5, (count, *shape), generator=generator)).to(torch.uint8)
    pool.append(batch_of(first, images), round=int(first > 0), omega=0.0)


@pytest.fixture
def make():
    made = []

    def new(kind, pool, **options):
        made.append(
            make_loader(kind, pool, **{"batch_size": 8, "seed": 3, "classes": 100} | options)
        )
        return made[-1]

    yield new
    for loader in made:
        loader.close()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def take_after(loader, skipped, count):
    take(loader, skipped)
    return take(loader, count)


def same(a, b):
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_three_epochs_with_an_append_in_between_show_every_sample_once_each(kind, make):
    pool = pool_of(24)
    loader = make(kind, pool)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in take(loader, 3)])
        assert torch.equal(labels.sort().values, torch.arange(24))
    grow(pool, 16)
    labels = torch.cat([labels for _, labels in take(loader, 5)])
    # the new ones are in the batches right after
    assert torch.equal(labels.sort().values, torch.arange(40))


@pytest.mark.parametrize("kind", KINDS)
def test_preparation_is_invisible(kind, make):
    """However far ahead, in bursts or not, appends in between: the batches of a loader that draws
    at each call.
    """

    def run(**ahead):
        pool, batches = pool_of(20), []
        loader = make(kind, pool, augment=EVERYTHING, **ahead)
        for step in range(25):
            if step in (3, 4, 23):
                grow(pool, 5)
            batches.append(next(loader))
        return batches

    one = run(ahead=1)
    assert same(one, run(ahead=4))
    assert same(one, run())


def test_small_batches_come_in_bursts_and_large_ones_from_a_thread(make):
    pool = pool_of()
    small, large = make("torch", pool), make("torch", pool, augment=Augment(size=(1200, 1200)))
    assert (small.ahead, large.ahead) == (16, 2)
    images = [images for images, _ in take(small, 17)]
    # of sixteen, and of the next
    assert len({batch.untyped_storage().data_ptr() for batch in images}) == 2
    del images
    for images, _ in take(small, 64):
        images.zero_()  # a caller may write to its batch
    assert same(take(small, 8), take_after(make("torch", pool, ahead=1), 81, 8))
    assert len(small._buffers) <= 6


def test_latents_are_decoded_by_the_threads_of_the_caller(make):
    """A decoder in another thread would leave a second team of OpenMP threads behind."""
    decoded_in = []

    def decode(latents):
        decoded_in.append(threading.current_thread())
        return latents.tanh()

    pool = SamplePool("latents", decode=decode)
    latents = torch.randn(30, 3, 7, 8, generator=torch.Generator().manual_seed(0)).half()
    pool.append(batch_of(0, latents), payload=latents, round=0, omega=0.0)
    by_caller = take(make("torch", pool), 5)
    assert set(decoded_in) == {threading.main_thread()}
    assert same(by_caller, take(make("torch", pool, ahead=2), 5))
    assert set(decoded_in) > {threading.main_thread()}


def test_a_loader_goes_on_where_the_pool_has_moved(make):
    """A view that the kernels cannot read in place is read without them."""
    pool = pool_of()
    loader, twin = make("torch", pool, augment=EVERYTHING), make("torch", pool, augment=EVERYTHING)
    take(loader, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolSnapshot, "in_place", lambda view, device: False)
        loader.load_state_dict(loader.state_dict())
        moved = take(loader, 2)
    for (a, targets), (b, same_targets) in zip(moved, take_after(twin, 2, 2), strict=True):
        assert torch.equal(targets, same_targets)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["plain", "augmented"])
def test_a_position_restores_the_next_batch_exactly(kind, augment, make):
    pool = pool_of()
    first, again = (make(kind, pool, augment=augment) for _ in range(2))
    take(first, 5)
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    rest = take(first, 6)
    take(again, 2)
    again.load_state_dict(state)
    assert same(take(again, 6), rest)
    first.load_state_dict(state)
    assert same(take(first, 6), rest)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_belong_to_their_images_and_held_batches_stay(kind, make):
    loader = make(
        kind,
        pool_of(50),
        augment=Augment(flip=True, shift=2, crop=0.5),
        form=BatchFormat(mean=0.0, std=1 / 255),
    )
    held = take(loader, 12)
    for images, labels in held:
        assert images.shape == (8, 3, 14, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images, labels.tolist(), strict=True):
            assert 5 * label - 0.001 < float(image.min()) <= float(image.max()) < 5 * label + 4.001


@pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
@pytest.mark.parametrize("codec", ["pixels", "jpeg", "latents"])
@pytest.mark.parametrize("channels", [1, 3])
def test_dali_and_torch_show_the_same_pixels(codec, channels, make):
    """Without augmentation the same bytes, normalised to within the last bits; with it the same
    crops and flips.
    """
    shape = (channels, 14, 16)
    if codec == "latents":
        pool = SamplePool(
            "latents",
            decode=lambda z: torch.tanh(z).repeat_interleave(2, 2).repeat_interleave(2, 3),
        )
        latents = torch.randn(30, channels, 7, 8, generator=torch.Generator().manual_seed(0)).half()
        pool.append(batch_of(0, latents), payload=latents, round=0, omega=0.0)
    else:
        pool = pool_of(30, shape, codec)
    for augment in (Augment(), Augment(flip=True, shift=3, crop=0.2, size=(9, 21))):
        for form in (
            None,
            BatchFormat(channels_last=False, mean=[0.4] * channels, std=[0.2] * channels),
        ):
            ours, dali = (
                make(kind, pool, augment=augment, form=form) for kind in ("torch", "dali")
            )
            for (a, labels), (b, same_labels) in zip(take(ours, 5), take(dali, 5), strict=True):
                assert torch.equal(labels, same_labels)
                assert a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # 5.1e-6 measured
                if form is None and augment == Augment() and codec != "latents":
                    assert torch.equal(a.add(1).mul(127.5).round(), b.add(1).mul(127.5).round())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_the_rounded_batch(kind, make):
    pool = pool_of()
    full, half = (
        make(kind, pool, augment=EVERYTHING, form=BatchFormat(dtype=dtype))
        for dtype in (torch.float32, torch.float16)
    )
    for (a, targets), (b, same_targets) in zip(take(full, 3), take(half, 3), strict=True):
        assert torch.equal(targets, same_targets)
        assert b.dtype == torch.float16
        torch.testing.assert_close(a, b.float(), rtol=2e-3, atol=1e-3)


class Interrupted(SamplePool):
    """A pool whose readers are interrupted: ``on_fetch`` is called before each of them."""

    on_fetch = staticmethod(lambda: None)

    def fetch(self, indices, **options):
        self.on_fetch()
        return super().fetch(indices, **options)


@pytest.mark.parametrize("dies", [OSError("disk gone"), SystemExit(3)])
@pytest.mark.parametrize("options", [{}, {"ahead": 2}], ids=["burst", "thread"])
def test_a_reader_that_dies_is_reported_and_the_position_stays(dies, options, make):
    pool = Interrupted()
    grow(pool, 30)
    loader, twin = make("torch", pool, **options), make("torch", pool_of())
    take(loader, 2)

    def die():
        assert (threading.current_thread() is threading.main_thread()) == (not options)
        raise dies

    pool.on_fetch = die
    with pytest.raises(LoaderError, match="could not be made") as caught:
        take(loader, 20)
    assert caught.value.__cause__ is dies
    pool.on_fetch = lambda: None
    twin.load_state_dict(loader.state_dict())
    assert same(take(loader, 3), take(twin, 3))


def test_waiting_is_measured(make):
    pool = Interrupted()
    grow(pool, 30)
    loader = make("torch", pool, ahead=2)
    pool.on_fetch = lambda: threading.Event().wait(0.05)
    take(loader, 4)
    assert 0.15 < loader.waited < 2


def test_buffers_are_used_again_when_nobody_holds_them():
    buffers = BufferPool()
    first = buffers.batch((2, 3, 4, 5), BatchFormat())
    view = first[1:]
    address = first.data_ptr()
    del first
    second = buffers.batch((2, 3, 4, 5), BatchFormat())
    assert second.data_ptr() != address  # a view still holds the first
    del view
    assert buffers.batch((2, 3, 4, 5), BatchFormat(channels_last=False)).data_ptr() == address
    graph = torch.nn.Parameter(torch.ones(1)) * buffers.batch((1, 1, 1, 120), BatchFormat())
    buffers.batch((1, 1, 1, 120), BatchFormat())
    assert len(buffers) == 3  # of the second, of the graph, and a free one
    del graph, second


def test_a_loader_may_be_of_the_caller_s_own():
    """It gets the pool and all options, and need not be known by a name."""
    pool = pool_of(10)

    class InOrder(PoolLoader):
        def start(self, drawn):
            for number, pending in enumerate(drawn):
                pending.work = Made(self.pool.gather(torch.arange(4) + number))

    loader = make_loader(InOrder, pool, batch_size=4, seed=0)
    assert [labels.tolist() for _, labels in take(loader, 2)] == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_the_choice_is_checked(monkeypatch):
    assert choose_loader("torch") == "torch"
    with pytest.raises(InputError, match="loader = 'tf'"):
        choose_loader("tf")
    monkeypatch.setattr(feed, "dali_installed", lambda: False)
    assert choose_loader("auto", "jpeg") == "torch"
    with pytest.raises(InputError, match="DALI is not installed"):
        choose_loader("dali")
    with pytest.raises(ValueError, match="classes"):
        make_loader("torch", SamplePool(), batch_size=2, seed=0, augment=Augment(mixup=0.1))
    with pytest.raises(ValueError, match="ahead = 0"):
        make_loader("torch", SamplePool(), batch_size=2, seed=0, ahead=0)


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"kind": 3}, TypeError, "loader must be a name"),
        ({"pool": 3}, TypeError, "pool = 3"),
        ({"pool": SamplePool()}, InputError, "the pool is empty"),
        ({"pool": SamplePool(shape=(3, 4, 4))}, InputError, "the pool is empty"),
        ({"augment": 3}, TypeError, "augment = 3: expected of type Augment"),
        ({"form": 3}, TypeError, "form = 3: expected of type BatchFormat"),
        ({"form": BatchFormat(mean=(0, 0))}, InputError, "mean has 2 values"),
        ({"device": "foo"}, InputError, "device = 'foo'"),
        ({"device": "cuda:99"}, InputError, "device = 'cuda:99': torch .* finds"),
        ({"device": None}, TypeError, "device = None"),
        ({"seed": -1}, InputError, "seed = -1"),
        ({"fresh_weight": "x"}, TypeError, "fresh_weight must be a number"),
        ({"ahead": "x"}, TypeError, "ahead must be an integer"),
        ({"classes": 3, "augment": Augment(mixup=1.0)}, InputError, "classes = 3: .* label"),
    ],
)
def test_what_a_loader_cannot_use_is_named_at_the_latest_with_its_first_batch(options, kind, named):
    with pytest.raises(kind, match=named):
        next(
            make_loader(
                **{"kind": "torch", "pool": pool_of(), "batch_size": 8, "seed": 0} | options
            )
        )


def test_a_pool_of_a_known_shape_may_be_empty_until_the_first_batch(make):
    pool = SamplePool(shape=(3, 14, 16))
    loader = make("torch", pool)
    grow(pool, 8)
    assert next(loader)[0].shape == (8, 3, 14, 16)


@pytest.mark.parametrize("state", [{}, 3, {"batches": "x"}])
def test_what_is_no_position_is_named_and_the_loader_goes_on(state, make):
    loader, twin = make("torch", pool_of()), make("torch", pool_of())
    with pytest.raises(InputError, match=r"state = .*: expected the integers batches, epoch"):
        loader.load_state_dict(state)
    assert same(take(loader, 2), take(twin, 2))


@pytest.mark.parametrize(
    ("make_part", "kind", "named"),
    [
        (lambda: BatchFormat(mean="x"), TypeError, "mean must be a number"),
        (lambda: BatchFormat(std=0), InputError, "std = 0: expected numbers above 0"),
        (lambda: BatchFormat(std=(1, 0, 1)), InputError, "std = .*above 0"),
        (lambda: BatchFormat(std=1e-320), InputError, "std = 1e-320: expected numbers above 0"),
        (
            lambda: BatchFormat(std=np.float32(-1)),
            InputError,
            r"std = -1\.0: expected numbers above",
        ),
        (
            lambda: BatchFormat(std=()),
            InputError,
            r"std = \(\): expected a number, or one for each",
        ),
        (lambda: BatchFormat(std=math.nan), InputError, "std = nan"),
        (lambda: BatchFormat(mean=torch.tensor([0.5, math.inf])), InputError, "mean = inf"),
        (lambda: BatchFormat(channels_last="no"), TypeError, "channels_last must be True or False"),
        (lambda: Augment(shift=0.5), TypeError, "shift must be an integer, got 0.5"),
        (lambda: Augment(shift=-1), InputError, "shift = -1: expected at least 0 pixels"),
        (lambda: Augment(shift=10**30), InputError, "shift = 1.*: expected at most 65536 pixels"),
        (lambda: Augment(size=(True, True)), TypeError, "size must be"),
        (
            lambda: TorchLoader(pool_of(), batch_size=2, seed=0, threads=0),
            InputError,
            "threads = 0",
        ),
        (
            lambda: TorchLoader(pool_of(), batch_size=2, seed=0, background="no"),
            TypeError,
            "background must be None, True or False",
        ),
        (lambda: Augment(flip="x"), TypeError, "flip must be True or False"),
        (lambda: Augment(shift="x"), TypeError, "shift must be an integer"),
        (lambda: Augment(crop="x"), TypeError, "crop must be a number"),
        (lambda: Augment(mixup="x"), TypeError, "mixup must be a number"),
        (lambda: Augment(size=("x", "y")), TypeError, "size must be"),
    ],
)
def test_a_format_an_augmentation_and_a_loader_name_what_they_cannot_use(make_part, kind, named):
    with pytest.raises(kind, match=named):
        make_part()


def test_numbers_of_numpy_and_torch_are_numbers(make):
    pool = pool_of()
    plain = make("torch", pool, form=BatchFormat(mean=0.5, std=0.25), batch_size=4)
    for kind in (np.float32, np.float64, torch.tensor):
        form = BatchFormat(mean=kind(0.5), std=kind(0.25))
        given = make("torch", pool, form=form, batch_size=np.int64(4))
        assert same(take(given, 2), take(plain, 2))
        plain = make("torch", pool, form=BatchFormat(mean=0.5, std=0.25), batch_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_may_be_its_name(kind, make):
    pool = pool_of()
    named, given = (
        next(make(kind, pool, device=device)) for device in ("cpu", torch.device("cpu"))
    )
    assert torch.equal(named[0], given[0])
    assert torch.equal(named[1], given[1])
