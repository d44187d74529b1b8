"""A part of a saved pool: the same few samples of each round however it was saved, and no more
bytes than were asked for.
"""

import warnings

import numpy as np
import pytest
import torch

from dpfast.errors import InputError
from dpfast.parallel import Ranks
from dpfast.pool import shards, subset
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import rank_folder
from dpfast.pool.saver import Saver
from dpfast.pool.subset import choose, read_chosen
from tests.pool.helpers import ORIGIN, SHAPE, Batch, batch, latents

ROUNDS = (40, 25, 30)
SIZE = int(np.prod(SHAPE))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(subset, "PER_ROUND", 6)
    monkeypatch.setattr(subset, "CLASSES", 3)
    monkeypatch.setattr(subset, "PER_CLASS", 2)


def save(folder, *rounds, ranks=1, codec="pixels", shard_samples=7, images="npy"):
    """The samples of all rounds, by several ranks each of which has every so many-th of them."""
    for rank in range(ranks):
        pool, first = SamplePool(codec), 0
        for number, count in enumerate(rounds):
            made = batch(first, count)
            columns = (made.images, made.labels, made.sample_ids, made.entropy)
            made = Batch(*(column[rank::ranks] for column in columns))
            payload = latents(made.sample_ids) if codec == "latents" else None
            pool.append(made, round=number, payload=payload, **ORIGIN)
            first += count
        where = rank_folder(folder, Ranks(rank=rank, size=ranks))
        with Saver(pool, where, shard_samples=shard_samples, images=images) as saver:
            saver.save()
    return folder


def ids(chosen):
    return sorted(chosen["sample_id"].tolist())


@pytest.mark.parametrize("columns", [1 << 20, 10], ids=["at once", "in parts"])
def test_the_choice_is_of_ids_and_rounds_however_the_pool_was_saved(columns, tmp_path, monkeypatch):
    one = choose(save(tmp_path / "one", *ROUNDS))
    monkeypatch.setattr(subset, "COLUMNS", columns)
    three = choose(save(tmp_path / "three", *ROUNDS, ranks=3, shard_samples=5))
    for choice in (one, three):
        assert (choice.total, choice.lost, choice.top) == (sum(ROUNDS), 0, 9)
        assert np.bincount(choice.looked["round"]).tolist() == [6, 6, 6]
        assert set(choice.shown["label"].tolist()) == {0, 1, 2}
        for number in range(3):
            labels = choice.shown["label"][choice.shown["round"] == number]
            assert np.bincount(labels).tolist() == [2, 2, 2]
    assert ids(one.looked) == ids(three.looked)
    assert ids(one.shown) == ids(three.shown)
    assert ids(one.looked) != list(range(6)) + list(range(40, 46)) + list(range(65, 71))
    # those of earlier rounds stay as the pool grows
    grown = choose(save(tmp_path / "grown", *ROUNDS, 20))
    assert ids(grown.looked)[:18] == ids(one.looked)


@pytest.mark.parametrize(
    ("codec", "images"), [("pixels", "npy"), ("pixels", "png"), ("latents", "npy"), ("jpeg", "npy")]
)
def test_what_is_read_is_what_was_saved(codec, images, tmp_path):
    choice = choose(save(tmp_path, *ROUNDS, ranks=2, codec=codec, images=images))

    def decode(z):
        return z[:, :3].mul(0.25).clamp(-1, 1)

    pool = read_chosen(choice, choice.looked, 1 << 20, decode=decode)
    found = pool.column("sample_id")
    assert sorted(found.tolist()) == ids(choice.looked)
    assert torch.equal(pool.column("label"), found % 10)
    expected = SamplePool(codec, decode=decode)
    made = batch(0, sum(ROUNDS))
    every = latents(made.sample_ids) if codec == "latents" else None
    expected.append(made, round=0, payload=every, **ORIGIN)
    assert torch.equal(pool.images(torch.arange(len(pool))), expected.images(found))
    if codec == "latents":
        assert pool.codec == "pixels"  # decoded once
        with pytest.raises(InputError, match="has no decode function"):
            read_chosen(choice, choice.looked, 1 << 20)


def test_memory_follows_the_limit_and_not_the_pool(tmp_path, monkeypatch):
    """Counted: the images that are held, the payloads that are read and the columns that are
    compared.
    """
    monkeypatch.setattr(subset, "COLUMNS", 40)
    folder = save(tmp_path, *ROUNDS, ranks=2)
    compared, read = [], []
    candidates, payload_of = subset._candidates, subset.payload_of
    monkeypatch.setattr(
        subset, "_candidates", lambda p: compared.append(sum(map(len, p))) or candidates(p)
    )

    def counted(part, records, manifest):
        read.append(len(records))
        return payload_of(part, records, manifest)

    monkeypatch.setattr(subset, "payload_of", counted)
    monkeypatch.setattr(shards, "verify", lambda *_: pytest.fail("a shard was read as a whole"))
    choice = choose(folder)
    kept = 3 * (6 + 10 * 2)  # of each round: so many, and of each label
    assert max(compared) <= 40 + 7 + kept
    for limit, each in ((3 * 4 * SIZE, 4), (3 * SIZE, 1), (1, 1), (1 << 20, 6)):
        read.clear()
        pool = read_chosen(choice, choice.looked, limit)
        assert torch.bincount(pool.column("round")).tolist() == [each] * 3
        assert sum(read) == 3 * each + 1  # one to see how large they are
        assert len(pool) * SIZE <= max(limit, 3 * SIZE)
    fewer = read_chosen(choice, choice.looked, 3 * 4 * SIZE).column("sample_id").tolist()
    assert set(fewer) < set(pool.column("sample_id").tolist())


def test_damaged_shards_are_passed_over_where_they_lie(tmp_path):
    folder = save(tmp_path, *ROUNDS, images="png")
    manifest = shards.Manifest.read(folder)
    whole = ids(choose(folder).looked)
    short, columns, torn, gone = (folder / shard.name for shard in manifest.shards[:4])
    short.write_bytes(short.read_bytes()[:-512])
    (folder / manifest.shards[1].columns).write_bytes(b"x")
    gone.unlink()
    with pytest.warns(UserWarning, match="is passed over: "):
        choice = choose(folder)
    assert choice.lost == 14
    assert choice.total == sum(ROUNDS)
    left = set(range(7, 21)) | set(range(28, sum(ROUNDS)))
    assert set(ids(choice.looked)) & set(whole) == set(whole) & left  # also of damaged columns
    data = bytearray(torn.read_bytes())
    part = choice.looked[choice.looked["shard"] == 2]
    for offset in part["offset"].tolist():
        data[offset : offset + 8] = b"not PNG!"
    torn.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match=f"{len(part)} samples are passed over: ") as told:
        pool = read_chosen(choice, choice.looked, 1 << 20)
    assert len(told) >= 1
    assert len(pool) == len(choice.looked) - len(part)
    assert columns.is_file()
    assert not (folder / "quarantine").exists()


def test_where_nothing_is_saved_nothing_is_chosen(tmp_path):
    assert choose(tmp_path) is None
    assert choose(tmp_path / "nowhere") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose(save(tmp_path / "empty", 0))
    if choice is not None:
        assert choice.total == len(read_chosen(choice, choice.looked, 100)) == 0


def test_ids_are_mixed_as_splitmix64_does():
    """The first outputs of the generator with seed 0, whose states are multiples of its step."""
    step = 0x9E3779B97F4A7C15
    states = np.array([0, step], np.uint64)
    assert [hex(v) for v in subset._hashed(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    negative = np.array([-1, 2**62], np.int64)
    assert len(set(subset._hashed(negative).tolist())) == 2
