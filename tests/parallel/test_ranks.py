"""What belongs to which rank, how ranks agree, and that the parts of several make what one
makes.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dpfast.config import Learner
from dpfast.errors import InputError, RecipeError
from dpfast.evaluate.measures import evaluate
from dpfast.feed.augment import Augment
from dpfast.feed.torch_loader import TorchLoader
from dpfast.learn.batch_norm import RanksBatchNorm, synchronised
from dpfast.learn.gradients import GradientBuckets
from dpfast.learn.trainer import Trainer
from dpfast.parallel import RankError, Ranks, process_group
from dpfast.parallel import ranks as parallel
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import rank_folder
from dpfast.pool.reader import open_pool, open_share
from dpfast.pool.record import RECORD
from dpfast.pool.saver import Saver
from dpfast.pool.sharded import ShardedPool, ShardLayout
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost, Price, slowest
from tests.learn import test_micro_batches as micro_batches
from tests.ranks import AGENT, environment, spawned

ROUNDS, BATCH = (50, 23, 31), 10
AUGMENT = Augment(flip=True, crop=0.3, mixup=0.5, cutmix=1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_has_one_rank_and_its_place_there(size):
    layout = ShardLayout(Ranks(size=size), BATCH, ROUNDS)
    rows = torch.arange(len(layout))
    owner, place = layout.locate(rows)
    for rank in range(size):
        mine = torch.cat([torch.arange(r.start, r.stop) for r in layout.rows(rank)])
        assert torch.equal(rows[owner == rank], mine)
        assert torch.equal(place[mine], torch.arange(layout.held(rank)))
    shares = [layout.held(rank) for rank in range(size)]
    assert sum(shares) == len(layout)
    assert max(shares) - min(shares) <= 2 * BATCH  # the turn goes on over rounds


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_done_of_a_rank_s_batches_is_left_out(size):
    for rank, done in itertools.product(range(size), (0, 4, 10, 25)):
        ranks = Ranks(rank=rank, size=size)
        whole = ranks.indices(73, BATCH, turn=1)
        assert len(whole) == ranks.share(73, BATCH, turn=1)
        assert torch.equal(ranks.indices(73, BATCH, turn=1, done=done), whole[done:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_holds_the_pairs_that_are_mixed(size):
    parts = [Ranks(rank=rank, size=size).part(32) for rank in range(size)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(32))
    for part in parts:
        assert torch.equal(part.flip(0), 31 - part)


def rows_of(codec, count):
    """Payloads and records of ``count`` samples; JPEG files of different lengths."""
    generator = torch.Generator().manual_seed(3)
    records = torch.zeros(count, RECORD.itemsize, dtype=torch.uint8).numpy().view(RECORD)[:, 0]
    records["sample_id"], records["label"] = range(100, 100 + count), torch.arange(count) % 7
    if codec == "latents":
        return torch.randn(count, 4, 4, 4, generator=generator).half(), records
    return torch.randint(
        0, 256, (count, 3, 16, 12), dtype=torch.uint8, generator=generator
    ), records


def pool_of(codec, layout, rank=None):
    """The pool of one rank, or of all as one."""
    pool = SamplePool(
        codec, decode=lambda latents: latents[:, :3].clamp(-1, 1), chunk_bytes=1 << 16
    )
    payload, records = rows_of(codec, len(layout))
    rows = torch.arange(len(layout))
    if rank is not None:
        rows = torch.cat([torch.arange(r.start, r.stop) for r in layout.rows(rank)])
    pool.append_records(payload[rows], records[rows.numpy()])
    return pool


def loader_of(pool):
    return TorchLoader(pool, batch_size=24, seed=5, augment=AUGMENT, classes=7)


def learner():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(7)
    )


def same_batches(ranks, folder):
    layout = ShardLayout(ranks, BATCH, ROUNDS)
    for codec in ("pixels", "latents", "jpeg"):
        one, union = pool_of(codec, layout), ShardedPool(pool_of(codec, layout, ranks.rank), layout)
        assert torch.equal(union.column("sample_id"), one.column("sample_id"))
        assert torch.equal(union.column("label", ROUNDS[0]), one.column("label", ROUNDS[0]))
        loader, mine = loader_of(one), loader_of(union)
        for number in range(6):
            if number == 3:
                # drops what was prepared, on all ranks alike
                mine.load_state_dict(loader.state_dict())
            (images, labels), (part, targets) = next(loader), next(mine)
            assert torch.equal(images[ranks.part(24)], part), (codec, number)
            assert torch.equal(labels[ranks.part(24)], targets)
        mine.close()
        with Saver(union.local, rank_folder(folder / codec, ranks)) as saver:
            saver.save()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_batches_of_one_pool_and_anyone_opens_what_they_saved(size, tmp_path):
    spawned(size, same_batches, tmp_path)
    saved = ShardLayout(Ranks(size=size), BATCH, ROUNDS)
    for codec in ("pixels", "latents", "jpeg"):
        one = pool_of(codec, saved)
        rows = torch.arange(len(one))
        everything = open_pool(tmp_path / codec, decode=one.decode)
        assert torch.equal(everything.images(rows), one.images(rows))
        for wanted in (Ranks(), Ranks(rank=1, size=3)):
            layout = ShardLayout(wanted, BATCH, ROUNDS)
            part, mine = (
                open_share(tmp_path / codec, saved, layout),
                pool_of(codec, layout, wanted.rank),
            )
            assert torch.equal(part.column("sample_id"), mine.column("sample_id"))
            stored, expected = (pool.payload(torch.arange(len(mine))) for pool in (part, mine))
            assert stored == expected if codec == "jpeg" else torch.equal(stored, expected)


def train(pool, ranks):
    model = learner()
    model(torch.zeros(2, 3, 16, 12))
    trainer = Trainer(
        model, Learner(lr=1e-2, clip_grad_norm=1.0, precision="fp32"), iterations=20, ranks=ranks
    )
    loader = loader_of(pool)
    losses = [float(ranks.all_gather(trainer.step(*next(loader))).mean()) for _ in range(12)]
    loader.close()
    return trainer, losses


def same_norm(ranks):
    """Batch norm on parts of a batch against torch's on all of it: outputs, gradients, running
    statistics.
    """
    torch.manual_seed(0)
    inputs, factors = torch.randn(8, 5, 6, 7) * 3 + 2, torch.randn(8, 5, 6, 7)
    norm, mine = nn.BatchNorm2d(5), torch.arange(8).chunk(ranks.size)[ranks.rank]
    nn.init.normal_(norm.weight)
    shared = nn.Sequential(nn.BatchNorm2d(5))
    shared[0].load_state_dict(norm.state_dict())
    synchronised(shared, ranks)
    whole, part = (value.clone().requires_grad_() for value in (inputs, inputs[mine]))
    expected, found = norm(whole), shared(part)
    (expected * factors).sum().backward()
    (found * factors[mine]).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(found, expected[mine])
    close(part.grad, whole.grad[mine])
    close(ranks.all_gather(shared[0].weight.grad).sum(0), norm.weight.grad)
    close(ranks.all_gather(shared[0].bias.grad).sum(0), norm.bias.grad)
    close(shared[0].running_var, norm.running_var)
    close(shared[0].running_mean, norm.running_mean)


def test_a_batch_norm_under_two_names_is_one_over_all_ranks():
    norm = nn.BatchNorm1d(4)
    block = nn.Sequential(norm)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), norm, block, block)
    names = list(model.state_dict())
    synchronised(model, Ranks(size=2))
    assert all(isinstance(each, RanksBatchNorm) for each in (model[1], model[4][0]))
    assert model[3] is model[1]
    assert model[5] is model[4]
    assert model[4][0].running_mean is model[1].running_mean
    assert list(model.state_dict()) == names


def in_halves(ranks, limit, *, norms=False):
    """A trainer after three steps, whose memory holds ``limit`` images in the backward pass; of
    this rank's part.
    """
    made = micro_batches.model(limit, "backward")
    made[3] = nn.BatchNorm1d(24) if norms else nn.Identity()
    trainer = Trainer(made, Learner(lr=1e-2, precision="fp32"), iterations=20, ranks=ranks)
    if not ranks.alone:
        trainer.gradients = GradientBuckets(trainer.parameters, ranks, bucket_bytes=500)
    images, labels = micro_batches.batch(24)
    for _ in range(3):
        trainer.step(images[ranks.part(24)], labels[ranks.part(24)])
    return trainer


def one_rank_out_of_memory(ranks):
    """The last rank alone runs out of memory, when it has sent its first buckets: what all learn
    stays the same.
    """
    last = ranks.rank == ranks.size - 1
    alone, shared = in_halves(Ranks(), 1000), in_halves(ranks, 2 if last else 1000)
    assert (shared.micro_batch is not None) == last
    for mine, whole in zip(shared.parameters, alone.parameters, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(mine, each) for each in ranks.all_gather(mine))
    shared = in_halves(ranks, 2 if last else 1000, norms=True)
    assert shared.micro_batch <= 2, (
        "batch norms over ranks wait for each other: all take what fits the last"
    )
    assert all(
        torch.equal(value, each) for value in shared.parameters for each in ranks.all_gather(value)
    )


def same_training(ranks):
    same_norm(ranks)
    one_rank_out_of_memory(ranks)
    layout = ShardLayout(ranks, BATCH, ROUNDS)
    (one, alone), (many, shared) = (
        train(pool_of("pixels", layout), Ranks()),
        train(ShardedPool(pool_of("pixels", layout, ranks.rank), layout), ranks),
    )
    assert shared == pytest.approx(alone, rel=1e-4)
    images, labels = (
        torch.randint(0, 256, (1203, 3, 16, 12), dtype=torch.uint8),
        torch.arange(1203) % 7,
    )
    images = images * 0 + torch.arange(1203).remainder(251).byte().view(-1, 1, 1, 1)
    mine = ranks.indices(1203, 500)
    for weights in ("raw", "ema"):
        theirs = many.weights(weights)
        for (name, value), other in zip(
            one.weights(weights).state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=name)
            assert all(torch.equal(other, each) for each in ranks.all_gather(other)), (
                f"{name} differs between ranks"
            )
        found, wanted = (
            evaluate(theirs, images[mine], labels[mine], ranks),
            evaluate(theirs, images, labels),
        )
        assert (found.top1, found.loss, found.calibration_error) == (
            wanted.top1,
            wanted.loss,
            wanted.calibration_error,
        )
        assert torch.equal(found.per_class, wanted.per_class)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_learn_and_evaluate_as_one(size):
    spawned(size, same_training)


def fail(ranks, error):
    with ranks.all_or_none():
        if ranks.rank == 1:
            raise error


def disagree(ranks):
    with pytest.raises(RecipeError, match=r"^rank 1: steps = 0: no$"):
        fail(ranks, RecipeError("steps = 0: no"))
    with pytest.raises(InputError, match=r"^rank 1: learner = 3: no$") as refused:
        fail(ranks, InputError("learner = 3: no"))
    assert type(refused.value) is InputError
    with pytest.raises(RankError if ranks.first else OSError, match="disk"):
        fail(ranks, OSError("disk"))
    with pytest.raises(InputError, match="versions: rank 1 has 2, rank 0 has 1"):
        ranks.same("versions", ranks.rank + 1)
    assert ranks.broadcast_object(["a", ranks.rank]) == ["a", 0]
    assert ranks.any(ranks.rank == 1)
    assert not ranks.any(False)
    assert ranks.total(ranks.rank + 0.5) == 2.0
    assert ranks.most(ranks.rank) == 1
    assert ranks.absent() == []
    ranks.heartbeat.timeout = 2
    for _ in range(16 * ranks.rank):  # twice the timeout, and no collective meanwhile
        time.sleep(0.25)
        ranks.beat()
    assert ranks.all_gather_object(ranks.rank) == [0, 1]


def test_an_error_of_one_rank_is_an_error_of_all():
    spawned(2, disagree)


def spend(ranks):
    before = Cost(samples=10, forwards=20.0, flops=30.0, seconds=40.0, skipped=50, retries=60)
    cost = dataclasses.replace(before)
    for batch in ([(4, 1, 2)], [(2, 0, 3), (3, 5, 0)])[ranks.rank]:
        samples, skipped, retries = batch
        made = dataclasses.replace(samples_of(samples), skipped=skipped, retries=retries)
        cost.take(made, Price(forwards=2.0, flops=3.0), seconds=1.0 + ranks.rank)
    cost.share(before, ranks)
    assert cost == Cost(samples=19, forwards=38.0, flops=57.0, seconds=44.0, skipped=56, retries=65)


def samples_of(count):
    ids = torch.arange(count)
    return SampleBatch(
        images=torch.zeros(count, 1, 2, 2), labels=ids, sample_ids=ids, entropy=torch.zeros(count)
    )


def test_a_rank_that_is_slower_than_the_others_is_found_by_its_seconds_a_sample():
    def of(*seconds):  # ranks with 5, 10, 15, ... samples
        return slowest(
            [{"samples": 5 * n, "seconds": 5 * n * each} for n, each in enumerate(seconds, 1)]
        )

    assert of(10, 10, 11, 10) == (2, pytest.approx(1.1))
    assert of(10, 10, 10.4, 10) is None
    assert of(12.5, 10) == (0, pytest.approx(1.25))
    # a small round
    assert slowest([{"samples": 5, "seconds": 50}, {"samples": 0, "seconds": 0.0}]) is None


def test_what_ranks_spend_adds_up_and_the_slowest_counts():
    spawned(2, spend)


def hang(ranks):
    parallel.ANSWER = 1.0
    layout = ShardLayout(ranks, BATCH, ROUNDS)
    pool = ShardedPool(pool_of("pixels", layout, ranks.rank), layout)
    ranks.heartbeat.timeout = 2  # after the start, which may take longer than that
    ranks.control, ranks.feed = parallel.side_groups(range(ranks.size), 2, ranks.learn, False)
    if ranks.rank == 1:
        ranks.store.wait(["done"])
        # rank 0 is about to leave: gloo says "Connection closed by peer", and rank 0 has said why
        with pytest.raises(RankError, match=r"^rank 1 of 2 did not answer"), ranks.watched():
            ranks.control.all_reduce(torch.zeros(1))
        os._exit(0)
    named = partial(pytest.raises, RankError, match=r"^rank 1 of 2 did not answer")
    started = time.monotonic()
    with named(), ranks.watched(), contextlib.closing(loader_of(pool)) as loader:
        next(loader)  # closing waits for the loader's thread as well
    with named(), ranks.watched():
        ranks.any(False)
    assert time.monotonic() - started < 120  # gloo alone waits for half an hour
    ranks.heartbeat.leave(RankError("rank 1 of 2 did not answer"))
    ranks.store.set("done", "")
    os._exit(0)  # the group is broken: nothing is left to say good-bye to


def test_a_rank_that_hangs_is_named_by_whoever_waits_for_it():
    spawned(2, hang)


def test_a_rank_that_never_comes_is_named(monkeypatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    for name, value in (environment(0, 2, agent.port) | AGENT).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            RankError, match=r"^rank 1 of 2 did not answer: dead, or without progress for 1 s"
        ),
        process_group(cuda=False, timeout=1),
    ):
        pass
