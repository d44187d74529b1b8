"""A run's pool as its recipe asks for it: every codec and tier from the generator to the learner
and back.
"""

import contextlib
import errno
import resource
import shutil

import pytest
import torch

from dpfast.errors import InputError, RecipeError, SaveWarning
from dpfast.generate.from_recipe import decoder_of_run, new_sampler
from dpfast.logs import logged
from dpfast.pool import shards
from dpfast.pool.importing import import_pool
from dpfast.pool.pool import SamplePool
from dpfast.pool.reader import open_pool
from dpfast.practice import disk
from dpfast.practice.branch import prepare_branch
from dpfast.practice.callbacks import Callback, LogCallback
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_paths import check_saving, check_vacant
from dpfast.practice.run_writer import RunWriter
from tests.practice.small import REAL
from tests.practice.test_loop import with_

EVERYTHING = torch.arange(45)


@pytest.fixture
def short(recipe):
    return with_(recipe, "practice", iterations=40, maximum_samples=45, sources=("dp",))


def run(recipe, path, **options):
    with RunWriter(path, recipe, **options) as folder:
        return DeliberatePractice(recipe, real=REAL).run(folder, progress=False)


@pytest.mark.parametrize(
    ("section", "tier"),
    [
        ({"codec": "jpeg"}, "host"),
        ({"device_gib": 1.0}, "device"),
        ({"host_gib": 3000 / (1 << 30), "mapped": True}, "file"),
    ],
)
def test_a_run_keeps_its_samples_where_the_recipe_says(short, section, tier, tmp_path, monkeypatch):
    reserve, reserved = SamplePool.reserve, []

    def recorded(pool, samples, **options):
        reserved.append((len(pool), samples))
        reserve(pool, samples, **options)

    monkeypatch.setattr(SamplePool, "reserve", recorded)
    recipe = with_(short, "pool", **section)
    (dp,) = run(recipe, tmp_path / "run")
    assert dp.pool.in_tier()[tier] == len(dp.pool) == 45
    assert reserved == [(0, 30), (30, 15)]
    (again,) = run(recipe, tmp_path / "run", resume=True)
    assert again.pool.in_tier() == dp.pool.in_tier()
    assert torch.equal(again.pool.images(EVERYTHING), dp.pool.images(EVERYTHING))
    assert len(reserved) == 2


def test_latents_of_every_source_are_those_that_the_images_come_from(short, pipeline, tmp_path):
    recipe = with_(
        with_(short, "pool", codec="latents"), "practice", sources=("dp", "static", "prune")
    )
    results = run(recipe, tmp_path / "run")
    made = new_sampler(recipe, pipeline, None).generate(EVERYTHING % 3)
    for result in results:
        assert len(result.pool) == 45
        payload = result.pool.payload(EVERYTHING[:30])
        # other batches, rounded to fp16
        torch.testing.assert_close(payload, made.latents[:30], rtol=2e-3, atol=2e-3)
        with torch.no_grad():
            decoded = pipeline.guidance_decoder(payload.float())
        torch.testing.assert_close(
            result.pool.gather(EVERYTHING[:30])[0], decoded, rtol=0, atol=1e-5
        )
    decode = decoder_of_run(tmp_path / "run", "cpu")  # as the report does
    pool, _ = import_pool(tmp_path / "run", decode=decode)
    assert torch.equal(pool.images(EVERYTHING), results[0].pool.images(EVERYTHING))


def test_a_run_and_its_branch_resume_from_latents(short, tmp_path):
    recipe = with_(with_(short, "pool", codec="latents"), "practice", keep_rounds=True)
    (dp,) = run(recipe, tmp_path / "run")
    prepare_branch(tmp_path / "run", 0, tmp_path / "branch", recipe)
    (branch,) = run(recipe, tmp_path / "branch", resume=True)
    assert (len(branch.pool), branch.iterations) == (30, 40)
    assert torch.equal(branch.pool.payload(EVERYTHING[:30]), dp.pool.payload(EVERYTHING[:30]))


def test_a_pool_that_does_not_fit_its_own_budget_is_refused_before_any_work(short, tmp_path):
    small = with_(short, "pool", host_gib=3000 / (1 << 30))
    with pytest.raises(
        RecipeError, match=r"maximum_samples = 45: the pool needs .* host 2\.93 KiB"
    ):
        DeliberatePractice(small, real=REAL)
    with pytest.raises(RecipeError, match=r"45 samples of 512 \+ 56 bytes"):
        DeliberatePractice(with_(small, "pool", codec="latents"), real=REAL)


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel refuses what would make any file of the process larger, shards, checkpoints and
    weights alike.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", ["between two shards", "for all large files"])
def test_a_full_disk_stops_saving_and_changes_nothing_else(full, short, tmp_path, monkeypatch):
    (dp,) = run(short, tmp_path / "whole")
    write_shard = shards.write_shard

    def refusing(folder, name, *arguments, **options):
        if name > "shard-000000.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(folder, name, *arguments, **options)

    room = contextlib.nullcontext() if full == "between two shards" else files_of_at_most(16 << 10)
    if full == "between two shards":
        monkeypatch.setattr(shards, "write_shard", refusing)
    with room, pytest.warns(SaveWarning) as caught:
        (again,) = run(short, tmp_path / "full")
    said = "\n".join(str(warning.message) for warning in caught)
    assert torch.equal(again.pool.images(EVERYTHING), dp.pool.images(EVERYTHING))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "full")]
    assert metrics[0] == metrics[1]
    assert not list((tmp_path / "full").rglob("*.tmp"))
    if full == "between two shards":
        assert "No space left on device" in said
        assert "30 of 45 samples are on the disk" in said
        assert len(open_pool(tmp_path / "full" / "pool_dp")) == 30
    else:
        for what in ("saving the pool", "the checkpoint was not written"):
            assert what in said
        assert "File too large" in said


class FullAt(Callback):
    """From a step on the kernel refuses whatever makes a file of the process larger."""

    def __init__(self, step, room):
        self.step, self.room = step, room

    def on_step(self, progress):
        if progress.step == self.step:
            self.room.enter_context(files_of_at_most(1))


def test_a_disk_that_fills_while_the_learner_trains_costs_lines_and_one_warning_of_each_file(
    short, tmp_path, capsys
):
    (dp,) = run(short, tmp_path / "whole")
    path = tmp_path / "full"
    with (
        pytest.warns(SaveWarning) as caught,
        contextlib.ExitStack() as room,  # until all is closed
        RunWriter(path, short) as folder,
        logged(path),
    ):
        (again,) = DeliberatePractice(short, real=REAL).run(
            folder, progress=False, callbacks=[LogCallback(), FullAt(7, room)]
        )
    assert torch.equal(again.pool.images(EVERYTHING), dp.pool.images(EVERYTHING))
    assert again.test.top1 == dp.test.top1
    said = [str(warning.message) for warning in caught]
    for what in ("TensorBoard's events end here", "logs/rank-00000.jsonl lags behind"):
        assert len([line for line in said if line.startswith(what)]) == 1, what
    assert any("metrics.jsonl lags behind" in line for line in said)
    assert "metrics.jsonl is not complete" in said[-2]
    assert not any("unclosed" in line for line in said)
    assert "Traceback" not in capsys.readouterr().err
    assert not any("goes on in memory" in line for line in said[-2:])


@pytest.mark.filterwarnings("ignore::dpfast.errors.SaveWarning")
def test_lines_that_a_disk_has_refused_are_written_once_there_is_room(short, tmp_path):
    run(short, tmp_path / "whole")

    class RoomAgain(Callback):
        def on_step(self, progress):
            if progress.step == 23:
                room.close()

    with (
        contextlib.ExitStack() as room,
        pytest.warns(SaveWarning, match=r"metrics\.jsonl lags behind"),
        RunWriter(tmp_path / "full", short) as folder,
    ):
        DeliberatePractice(short, real=REAL).run(
            folder, progress=False, callbacks=[FullAt(7, room), RoomAgain()]
        )
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "full")]
    assert metrics[0] == metrics[1]


def test_a_pool_of_decoded_jpeg_resumes_to_the_same_bits_and_the_learner_sees_what_is_kept(
    short, tmp_path
):
    jpeg = with_(short, "pool", save_samples="jpeg")
    (exact,), (dp,) = run(short, tmp_path / "png"), run(jpeg, tmp_path / "jpeg")
    assert next((tmp_path / "png" / "pool_dp").glob("*.tar")).read_bytes().find(b"\x89PNG") > 0
    assert not torch.equal(dp.pool.images(EVERYTHING), exact.pool.images(EVERYTHING))
    assert torch.equal(
        open_pool(tmp_path / "jpeg" / "pool_dp").images(EVERYTHING),
        dp.pool.images(EVERYTHING),
    )
    (again,) = run(jpeg, tmp_path / "jpeg", resume=True)
    assert torch.equal(again.pool.images(EVERYTHING), dp.pool.images(EVERYTHING))


def test_a_run_without_saved_samples_ends_and_says_what_it_cannot_do(short, tmp_path, monkeypatch):
    nothing = with_(short, "pool", save_samples="none")
    (dp,) = run(nothing, tmp_path / "run")
    assert len(dp.pool) == 45
    assert not list((tmp_path / "run").glob("pool_*")) + list(
        (tmp_path / "run").glob("checkpoints_*")
    )
    with pytest.raises(InputError, match=r"resume: .* has kept no samples"):
        run(nothing, tmp_path / "run", resume=True)
    with pytest.warns(SaveWarning, match="cannot be resumed, branched or exported"):
        check_saving(nothing, resume=False, branch=False)
    with pytest.raises(RecipeError, match="nothing is kept that --branch-at could go on from"):
        check_saving(nothing, resume=False, branch=True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(RecipeError, match="--max-restarts 3 of torchrun"):
        check_saving(nothing, resume=False, branch=False)
    with pytest.raises(
        RecipeError, match="keep_rounds = True: expected false with save_samples = 'none'"
    ):
        with_(nothing, "practice", keep_rounds=True)
    with pytest.raises(
        RecipeError, match="save_samples = 'jpeg': expected 'png' unless codec = 'pixels'"
    ):
        with_(short, "pool", codec="latents", save_samples="jpeg")


@pytest.mark.parametrize("when", ["the run", "round 1"])
def test_a_disk_without_room_is_named_before_samples_are_made_that_it_cannot_take(
    short, tmp_path, monkeypatch, when
):
    """45 samples of some 4 kB each, and five checkpoints of about 22 kB; the state before the round
    is kept.
    """
    usage, folder = shutil.disk_usage, tmp_path / "run"

    def little(path):
        full = when == "the run" or (folder / "metrics.jsonl").stat().st_size
        return usage(path)._replace(free=40_000 if full else 1 << 30)

    words = rf"{when} needs .* of disk \(\d+ samples .* checkpoints .*\), 39\.06 KiB are free"
    with monkeypatch.context() as patched:
        patched.setattr(disk.shutil, "disk_usage", little)
        with pytest.raises(InputError, match=words) as refused:
            run(short, folder)
    assert "make room and go on with --resume" in str(refused.value)
    jpeg = with_(short, "pool", save_samples="jpeg")
    if when == "the run":  # what the message says
        assert "or begin anew without it and with other fields, as --save-samples jpeg" in str(
            refused.value
        )
        assert check_vacant(folder, jpeg) == jpeg
        (folder / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds another run"):
        check_vacant(folder, jpeg)
    assert bool(list(folder.glob("pool_dp/*.tar"))) == (when == "round 1")
    (dp,) = run(short, folder, resume=True)
    assert len(dp.pool) == 45
