"""The source "prune": which candidates a round keeps, on any number of ranks, and after a kill."""

import contextlib
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from dpfast.errors import InputError, SaveWarning
from dpfast.generate.pipelines import Pipeline
from dpfast.parallel import ALONE, Ranks
from dpfast.practice.callbacks import Callback
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from dpfast.sources import prune
from dpfast.sources.best import Best
from dpfast.sources.guided_methods import joined
from dpfast.sources.held import HeldSamples
from dpfast.sources.prune import PruneSource, held_bytes
from dpfast.sources.source import RoundRequest
from dpfast.sources.unguided import UnguidedSamples
from tests.practice.small import CLASSES, REAL
from tests.practice.test_loop import run, with_
from tests.ranks import spawned

COUNT = 50  # kept of 175 candidates in batches of 20


def highest(scores, labels, count, within):
    """All candidates at once: every class's best, then every class's second, ...; of equal scores
    the first.
    """
    order = scores.argsort(descending=True, stable=True)
    if within == "class":
        seen, ranks = {}, []
        for label in labels[order].tolist():
            ranks.append(seen.setdefault(label, 0))
            seen[label] += 1
        order = order[torch.tensor(ranks).argsort(stable=True)]
    return order[:count].sort().values


@pytest.mark.parametrize("within", ["class", "overall"])
@pytest.mark.parametrize("kind", ["normal", "equal", "few values", "not a number"])
def test_the_best_so_far_are_the_best_of_all(within, kind):
    """In parts of any size, in any order, of classes of any size; equal scores by number."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(90, generator=generator)
        labels = (torch.rand(90, generator=generator) ** 2 * 5).long()
        if kind == "equal":
            scores = torch.zeros(90).where(scores > 0, torch.tensor(-0.0))
        elif kind == "few values":
            scores = scores.round()
        elif kind == "not a number":
            scores[scores > 1] = float("nan")
            scores[scores < -1] = float("-inf")
        for count in (1, 7, 40, 90, 100):
            best = Best(count, 5 if within == "class" else 1)
            order = torch.randperm(90, generator=generator)
            out = []
            for part in order.split(1 + seed):
                groups = labels[part] * (within == "class")
                out += best.add(scores[part], groups, part)
                assert best.size <= count
            wanted = highest(scores, labels, count, within)
            assert best.numbers().tolist() == wanted.tolist()
            assert sorted(out + wanted.tolist()) == list(range(90))


def test_classes_are_even_and_equal_scores_go_by_number():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.2])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    def kept(count, within):
        best = Best(count, 2)
        best.add(scores, labels * (within == "class"), torch.arange(6))
        return best.numbers().tolist()

    assert kept(3, "overall") == [0, 1, 2]
    assert kept(4, "class") == [0, 1, 4, 5]
    assert kept(3, "class") == [0, 1, 4]
    assert kept(1, "class") == [0]


def test_what_decides_is_small_at_imagenets_size():
    """9 million kept of 72 million candidates of 1,000 classes, on 32 ranks: what each rank knows
    of all of them is a percent of the pixels that it holds of its own.
    """
    best = Best(9_000, 1_000)
    for start in range(0, 72_000, 512):
        numbers = torch.arange(start, min(start + 512, 72_000))
        best.add(torch.rand(len(numbers)), numbers % 1_000, numbers)
    assert best.size == 9_000
    each = sum(map(sys.getsizeof, best._heaps)) + sum(
        sys.getsizeof(key) for heap in best._heaps for key in heap
    )
    pixels = held_bytes((3, 224, 224), None) * 9_000_000 // 32
    assert each / 9_000 * 9_000_000 < 0.02 * pixels
    assert pixels == 42_337_125_000


class Counted(HeldSamples):
    """Counts what is held at most, by all ranks of a process."""

    most = 0

    def put(self, numbers, scores, records):
        super().put(numbers, scores, records)
        Counted.most = max(Counted.most, len(self))


def request(**changes):
    given = RoundRequest(number=2, start=60, count=COUNT, learner_step=15, turn=1)
    return replace(given, **changes)


def source(recipe, ranks, folder=None):
    pipeline = Pipeline.from_pretrained(recipe.generator.pipeline)
    torch.manual_seed(1)
    learner = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.Flatten(), torch.nn.LazyLinear(len(CLASSES))
    )
    learner(torch.zeros(1, 1, 16, 16))
    made = UnguidedSamples(recipe, pipeline, ranks)
    return PruneSource(recipe, made, learner.eval(), folder=folder)


@pytest.fixture
def small(recipe):
    return with_(recipe, "practice", sources=("prune",), oversample=3.5)


def made(source, asked):
    with torch.no_grad():
        return list(source.make(asked))


def one(batches):
    """What is stored of batches."""
    whole = joined(batches)
    return {name: getattr(whole, name) for name in ("sample_ids", "labels", "entropy", "images")}


def reference(recipe, within):
    """All candidates, the highest of them, without any of what is under test."""
    alone = source(recipe, ALONE)
    candidates = alone.unguided.stream(30 + 105, 175, alone.cost, cfg_scale=1.5)
    batches = [alone._judged(batch, request()) for batch in candidates]
    whole = joined(batches)
    return one([whole.take(highest(whole.entropy, whole.labels, COUNT, within))])


def same(found, wanted):
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("within", ["class", "overall"])
def test_a_round_keeps_the_highest_of_its_candidates_and_never_more_than_a_batch_besides(
    small, within, tmp_path, monkeypatch
):
    monkeypatch.setattr(prune, "HeldSamples", Counted)
    small = with_(small, "practice", prune_within=within)
    wanted = reference(small, within)
    for folder in (None, tmp_path):
        Counted.most = 0
        alone = source(small, ALONE, folder)
        batches = made(alone, request())
        same(one(batches), wanted)
        assert [len(batch) for batch in batches] == [20, 20, 10]
        assert all(batch.learner_step == 15 for batch in batches)
        assert alone.cost.samples == 175
        assert Counted.most == COUNT


def killed(source, turns):
    """A source that dies when it has made its batch after ``turns`` turns."""
    judged, left = source._judged, [turns]

    def dies(batch, asked):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return judged(batch, asked)

    source._judged = dies
    return source


def on_ranks(ranks, recipe, folder, out, turns=None):
    """This rank's part of a round; of one that was killed after ``turns`` turns and goes on."""
    prune.SAVED_SECONDS = 0.0
    if turns is not None:
        with pytest.raises(KeyboardInterrupt):
            made(killed(source(recipe, ranks, folder), turns), request())
        newest = sorted(folder.rglob(f"rank-{ranks.rank:03d}-of-*/kept-*"))[-1]
        if ranks.rank == 1:  # killed before it could save what the others have
            newest.unlink()
    mine = source(recipe, ranks, folder)
    torch.save((one(made(mine, request())), mine.cost.samples), out / f"{ranks.rank}")


def together(size, out):
    """The round of all ranks in the pool's order, and how many candidates they have paid for."""
    parts, costs = zip(*(torch.load(out / f"{rank}") for rank in range(size)), strict=True)
    whole = {name: torch.empty(COUNT, *v.shape[1:], dtype=v.dtype) for name, v in parts[0].items()}
    for rank, part in enumerate(parts):
        rows = Ranks(rank=rank, size=size).indices(COUNT, 20, turn=1)
        for name, value in part.items():
            whole[name][rows] = value
    return whole, sum(costs)


def test_ranks_keep_what_one_keeps_and_deal_it_as_the_pool_does(small, tmp_path):
    spawned(3, on_ranks, small, None, tmp_path)
    found, paid = together(3, tmp_path)
    same(found, reference(small, "class"))
    assert paid == 175


def test_ranks_go_on_after_a_kill_with_what_all_have_saved(small, tmp_path):
    """Of nine batches of two ranks six were made, and four of them saved by both."""
    held = tmp_path / "held"
    spawned(2, on_ranks, small, held, tmp_path, 3)
    found, paid = together(2, tmp_path)
    same(found, reference(small, "class"))
    assert paid == 175
    assert len(list(held.rglob("slots"))) == 2


def test_a_killed_round_goes_on_where_it_was_saved_and_ends_in_the_same_bits(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(prune, "SAVED_SECONDS", 0.0)
    wanted = reference(small, "class")
    for turns in (0, 1, 4, 8):
        folder = tmp_path / str(turns)
        with pytest.raises(KeyboardInterrupt):
            made(killed(source(small, ALONE, folder), turns), request())
        again = source(small, ALONE, folder)
        same(one(made(killed(again, 9 - turns), request())), wanted)  # nothing is scored twice
        assert again.cost.samples == 175, "what was paid for is known"
        # complete, and killed before its checkpoint
        last = source(small, ALONE, folder)
        monkeypatch.setattr(last, "_judged", None)
        same(one(made(last, request())), wanted)
        again.checkpointed(10, pending=False)
        again.checkpointed(15, pending=True)
        assert list(folder.iterdir())
        again.checkpointed(*((15,) if turns else (16,)), pending=not turns)
        assert not folder.exists()


@pytest.mark.parametrize("what", ["slots", "kept", "other round", "other ranks"])
def test_what_is_damaged_or_of_another_round_is_made_again(
    small, what, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(prune, "SAVED_SECONDS", 0.0)
    wanted = reference(small, "class")
    with pytest.raises(KeyboardInterrupt):
        made(killed(source(small, ALONE, tmp_path), 4), request())
    (place,) = tmp_path.glob("step-*/rank-*")
    if what == "slots":
        slots = place / "slots"
        slots.write_bytes(slots.read_bytes()[:-10] + bytes(10))
    elif what == "kept":
        sorted(place.glob("kept-*"))[-1].write_bytes(b"torn")
    elif what == "other ranks":
        place.rename(place.parent / "rank-000-of-002")
        (place.parent / "rank-001-of-002").mkdir()
        (place.parent / "rank-000-of-002.bak").mkdir()
    asked = request(turn=0) if what == "other round" else request()
    again = source(small, ALONE, tmp_path)
    same(one(made(again, asked)), wanted)
    assert again.cost.samples == 175
    said = "the candidates of round 2 are made again: " in caplog.text
    assert said == (what != "other ranks")
    backup = ["rank-000-of-002.bak"] if what == "other ranks" else []
    assert sorted(path.name for path in place.parent.iterdir()) == [place.name, *backup]


def rewritten(path, described=None, **columns):
    """A file of kept samples with other columns, or with other words about them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(save(kept | columns, metadata | ({} if described is None else described)))


ONE = {
    "number": torch.tensor([3]),
    "score": torch.tensor([0.5]),
    "check": torch.tensor([0]),
}


@pytest.mark.parametrize(
    ("described", "columns"),
    [
        ({"about": "3"}, {}),
        ({"about": "[]"}, {}),
        ({"about": '{"width": -4, "turn": 1}'}, {}),
        ({"about": '{"width": 99999999999, "turn": 1}'}, {}),
        ({"about": "not JSON", "checksum": "x"}, {}),
        ({"about": "[" * 10_000}, {}),
        ({}, {**ONE, "slot": torch.tensor([2**62])}),
        ({}, {**ONE, "slot": torch.tensor([-1])}),
        ({}, {"number": torch.tensor([3.0, 5.0])}),
        ({}, {"number": torch.tensor([[3, 5]])}),
        ({}, {"score": torch.zeros(2, dtype=torch.bfloat16)}),
    ],
)
def test_nothing_that_a_damaged_file_says_is_believed(tmp_path, described, columns):
    held = HeldSamples(tmp_path)
    held.put([3, 5], [0.5, 0.25], torch.arange(8, dtype=torch.uint8).view(2, 4))
    held.save(1)
    rewritten(tmp_path / "kept-00000001.safetensors", described, **columns)
    with pytest.raises(InputError, match=r"kept-00000001.safetensors (is damaged|cannot be read)"):
        HeldSamples(tmp_path).load(1)


def test_damage_is_told_once_and_a_file_under_another_turn_s_name_is_none(tmp_path):
    held = HeldSamples(tmp_path)
    held.put([3, 5], [0.5, 0.25], torch.arange(8, dtype=torch.uint8).view(2, 4))
    held.save(1)
    kept = tmp_path / "kept-00000001.safetensors"
    (tmp_path / "kept-00000009.safetensors").write_bytes(kept.read_bytes())
    with pytest.raises(InputError, match=r"kept-00000009.safetensors was saved under another name"):
        HeldSamples(tmp_path).load(9)
    (tmp_path / "slots").write_bytes(bytes(8))
    with pytest.raises(InputError, match=r"slots is damaged at candidate 3$") as said:
        HeldSamples(tmp_path).load(1)
    assert "cannot be read" not in str(said.value)


def test_names_that_others_gave_are_passed_over(small, tmp_path, monkeypatch, caplog):
    """Copies and backups in the folder of what is held are neither read nor removed."""
    monkeypatch.setattr(prune, "SAVED_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        made(killed(source(small, ALONE, tmp_path), 4), request())
    (place,) = tmp_path.glob("step-*/rank-*")
    newest = sorted(place.glob("kept-*"))[-1]
    for name in ("kept-00000001 (copy)", "kept-1", "kept-000000009", "kept-x", "kept-٠٠٠٠٠٠٠٩"):
        (place / f"{name}.safetensors").write_bytes(newest.read_bytes())
    others = [
        tmp_path / name for name in ("step-000000250.bak", "step-15", "step-", "step--00000015")
    ]
    for other in others:
        other.mkdir()
    again = source(small, ALONE, tmp_path)
    same(one(made(killed(again, 5), request())), reference(small, "class"))
    assert "made again" not in caplog.text
    again.checkpointed(16, pending=True)
    again.stepped(1, lambda: None)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_training_past_a_round_that_is_held_drops_it(small, tmp_path):
    """A run that goes on before it, from an older checkpoint, has another learner there."""
    made(source(small, ALONE, tmp_path), request())
    again = source(small, ALONE, tmp_path)
    again.stepped(15, lambda: None)
    assert not tmp_path.exists()
    made(again, request())
    again.stepped(16, lambda: None)
    assert list(tmp_path.iterdir())


def test_a_round_is_held_until_the_checkpoint_after_it(small, tmp_path):
    """Which is of the same step: two rounds are not held side by side."""
    told, held = [], {}

    class Looks(Callback):
        def on_step(self, progress):
            if progress.step == 21:  # time for the writing beside the training
                time.sleep(1.0)

        def on_checkpoint(self, progress, written):
            told.append((written.step, written.pending))

        def on_generation(self, progress, number, count, done):
            held[number] = [path.name for path in tmp_path.glob("run/held_prune/step-*")]

        def on_round(self, progress, addition):
            here = [path.name for path in tmp_path.glob("run/held_prune/step-*")]
            assert here == ([f"step-{progress.step:09d}"] if addition.number else [])

    # no checkpoint but those around rounds
    timed = {"checkpoint_share": 1e-9, "checkpoint_minutes": 60.0}
    small = with_(small, "practice", add_at=(20, 40), **timed)
    with RunWriter(tmp_path / "run", small) as folder:
        DeliberatePractice(small, real=REAL).run(folder, progress=False, callbacks=[Looks()])
    assert (20, False) in told
    assert held == {0: [], 1: [], 2: []}


def test_a_full_disk_leaves_a_round_in_memory(small, tmp_path, monkeypatch):
    """It is saved again as soon as the disk takes it."""
    monkeypatch.setattr(prune, "SAVED_SECONDS", 0.0)
    opened, full = HeldSamples._opened, [True]

    def refuses(held):
        if full[0]:
            raise OSError(28, "No space left on device")
        return opened(held)

    monkeypatch.setattr(HeldSamples, "_opened", refuses)
    with pytest.warns(SaveWarning, match="candidates were not written in .*No space left") as said:
        same(one(made(source(small, ALONE, tmp_path), request())), reference(small, "class"))
    assert len(said) == 1
    assert not list(tmp_path.rglob("kept-*"))
    held = HeldSamples(tmp_path / "held")
    with pytest.warns(SaveWarning):
        held.put([3, 5], [0.5, 0.25], torch.arange(8, dtype=torch.uint8).view(2, 4))
    full[0] = False
    held.save(1)
    numbers, scores = HeldSamples(tmp_path / "held").load(1)
    assert (numbers.tolist(), scores.tolist()) == ([3, 5], [0.5, 0.25])


def test_latents_are_held_beside_the_pixels(small):
    small = with_(small, "pool", codec="latents")
    whole = joined(made(source(small, ALONE), request()))
    alone = source(small, ALONE)
    again = alone.unguided.stream(int(whole.sample_ids[3]), 1, alone.cost, cfg_scale=1.5)
    assert whole.latents.dtype == torch.float16
    torch.testing.assert_close(next(again).latents[0], whole.latents[3], rtol=2e-3, atol=2e-3)
    assert alone.scratch(2) == 0


def test_a_run_that_is_killed_within_rounds_ends_in_the_bits_of_an_undisturbed_one(
    small, tmp_path, monkeypatch
):
    """Killed when each round has scored its first, second and third batch, and resumed."""
    monkeypatch.setattr(prune, "SAVED_SECONDS", 0.0)
    run(small, tmp_path / "whole")
    whole, killed_at = tmp_path / "whole", []
    judged = PruneSource._judged

    def dies(source, batch, asked):
        entropy = judged(source, batch, asked)
        moment = int(batch.sample_ids[0])
        if moment not in killed_at:
            killed_at.append(moment)
            raise KeyboardInterrupt
        return entropy

    monkeypatch.setattr(PruneSource, "_judged", dies)
    for attempt in range(30):
        with (
            contextlib.suppress(KeyboardInterrupt),
            RunWriter(tmp_path / "run", small, resume=attempt > 0) as folder,
        ):
            (result,) = DeliberatePractice(small, real=REAL).run(folder, progress=False)
            break
    assert result.additions == 3
    assert len(killed_at) == attempt == 8  # of 52, 53 and 35 candidates in batches of 20
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics == (whole / "metrics.jsonl").read_text()
    for path in whole.rglob("*.tar"):
        other = tmp_path / "run" / path.relative_to(whole)
        assert path.read_bytes() == other.read_bytes()
    assert result.cost.samples == 30 + 140
    assert not (tmp_path / "run" / "held_prune").exists()
