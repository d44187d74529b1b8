"""Saving: only what is new, exact when opened again, and every damage named, with its sample
ids.
"""

import errno
import json
import tarfile
import warnings

import pytest
import torch
import webdataset

from dpfast.errors import SaveWarning
from dpfast.pool import shards, tars
from dpfast.pool.owner import OwnedError
from dpfast.pool.pool import SamplePool
from dpfast.pool.reader import open_pool
from dpfast.pool.record import COLUMNS
from dpfast.pool.saver import Saver, copy_saved
from dpfast.pool.shards import DamagedPoolError, LostSamplesWarning
from tests.pool.helpers import ORIGIN, batch, check_prefix, latents


def append(pool, count, round=0):
    payload = (
        latents(torch.arange(len(pool), len(pool) + count)) if pool.codec == "latents" else None
    )
    pool.append(batch(len(pool), count), payload=payload, round=round, **ORIGIN)


def saved(folder, *counts, codec="pixels", **options):
    pool = SamplePool(codec)
    with Saver(pool, folder, shard_samples=20, **options) as saver:
        for number, count in enumerate(counts):
            append(pool, count, number)
            saver.save()
            assert saver.wait() == len(pool)
    return pool


@pytest.mark.parametrize(
    ("codec", "images"), [("pixels", "npy"), ("pixels", "png"), ("latents", "npy"), ("jpeg", "npy")]
)
def test_a_saved_pool_opens_exactly(codec, images, tmp_path):
    pool = saved(tmp_path, 33, 1, 20, codec=codec, images=images)
    again = open_pool(tmp_path)
    assert again.records().tobytes() == pool.records().tobytes()
    everything = torch.arange(54)
    before, after = pool.payload(everything), again.payload(everything)
    assert before == after if codec == "jpeg" else torch.equal(before, after)
    assert again.fresh == 20
    first = open_pool(tmp_path, limit=25)
    assert first.column("sample_id").tolist() == list(range(25))


def test_only_what_is_new_is_written(tmp_path):
    pool = saved(tmp_path, 25)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert sorted(stamps) == [
        f"shard-00000{i}{end}" for i in (0, 1) for end in (".columns.npy", ".tar")
    ]
    again = open_pool(tmp_path)
    with Saver(again, tmp_path) as saver:
        assert saver.saved == 25
        append(again, 10)
        saver.save()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in stamps} == stamps
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [s["ids"] for s in manifest["shards"]] == [[[0, 19]], [[20, 24]], [[25, 34]]]
    check_prefix(open_pool(tmp_path), 35)
    assert len(pool) == 25


def test_saving_goes_on_beside_appends(tmp_path):
    pool = SamplePool(chunk_bytes=4096)
    with Saver(pool, tmp_path, shard_samples=50) as saver:
        for _ in range(40):
            append(pool, 17)
            saver.save()
        assert saver.wait(30) == 680
    check_prefix(open_pool(tmp_path), 680)


def test_webdataset_reads_the_shards(tmp_path):
    saved(tmp_path, 30, images="png")
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False)
        .decode("rgb8")
        .to_tuple("png", "cls", "json")
    )
    assert [label for _, label, _ in samples] == [i % 10 for i in range(30)]
    assert [columns["sample_id"] for *_, columns in samples] == list(range(30))
    assert (samples[7][0].transpose(2, 0, 1) == batch(7, 1).images[0].numpy()).all()
    assert set(samples[0][2]) == set(COLUMNS)


@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_a_damaged_shard_is_named_quarantined_and_reported_every_time(tmp_path, damage):
    saved(tmp_path, 50)
    path = tmp_path / "shard-000001.tar"
    if damage == "torn":
        with path.open("r+b") as file:
            file.truncate(5000)
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    for _ in range(2):
        with pytest.warns(
            LostSamplesWarning, match=r"20 samples are lost\. shard-000001\.tar: ids 20-39 \("
        ):
            pool = open_pool(tmp_path)
        assert pool.column("sample_id").tolist() == [*range(20), *range(40, 50)]
        assert not path.exists()
    assert (tmp_path / "quarantine" / "shard-000001.tar").exists() == (damage != "missing")
    with (
        pytest.warns(LostSamplesWarning),
        pytest.raises(DamagedPoolError, match="30 intact samples, 31 are needed"),
    ):
        open_pool(tmp_path, limit=31)
    with Saver(pool, tmp_path) as saver:  # saving goes on, under a number that was never used
        append(pool, 1)
        saver.save()
    assert (tmp_path / "shard-000003.tar").exists()


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_columns_come_from_the_tar(tmp_path, damage):
    pool = saved(tmp_path, 20)
    path = tmp_path / "shard-000000.columns.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x") if damage == "flipped" else path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = open_pool(tmp_path)
    assert again.records().tobytes() == pool.records().tobytes()
    check_prefix(again, 20)


@pytest.mark.parametrize(
    "text", [None, "{", '{"format": "other", "version": 1}', '{"format": "dpfast-pool"}']
)
def test_a_folder_without_a_readable_manifest_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DamagedPoolError, match=r"manifest\.json"):
        open_pool(tmp_path)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    saved(tmp_path, 5)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("shard-000000.tar", "../000000.tar"))
    with pytest.raises(ValueError, match=r"'\.\./000000\.tar'"):
        open_pool(tmp_path)


KINDS = {
    "symbolic": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
}


@pytest.mark.parametrize("name", ["/etc/x.cls", "../x.cls", "a/../../x.cls", *KINDS])
def test_tar_members_that_lead_elsewhere_are_refused(tmp_path, name):
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("folder/x.cls"))
        member = tarfile.TarInfo(name)
        if name in KINDS:
            member.type, member.linkname = KINDS[name], "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(
        ValueError, match="is a link or a device" if name in KINDS else "absolute path"
    ):
        list(tars.read_tar(path))


def test_a_tar_that_ends_between_two_members_is_torn(tmp_path):
    saved(tmp_path, 5)
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6].offset
    with path.open("r+b") as file:
        file.truncate(third)
    with pytest.raises(ValueError, match=r"shard-000000\.tar is torn"):
        list(tars.read_tar(path))


def test_the_folders_of_a_foreign_tar_are_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.CLS").write_text("3")
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
    (sample,) = tars.read_tar(tmp_path / "foreign.tar")
    assert (sample.key, sample.read("cls")) == ("a/x", b"3")


def test_a_full_disk_stops_saving_and_nothing_else(tmp_path, monkeypatch):
    """ENOSPC in the middle of the second shard: the first stays promised, memory goes on, space
    lets saving resume.
    """
    pool, writes = SamplePool(), shards.tar_header

    def full(name, size):
        if name.startswith("000001-000007"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return writes(name, size)

    monkeypatch.setattr(shards, "tar_header", full)
    saver = Saver(pool, tmp_path, shard_samples=20)
    append(pool, 50)
    saver.save()
    with pytest.warns(
        SaveWarning, match=r"No space left on device.*20 of 50 samples are on the disk"
    ):
        saver.wait(20)
    assert saver.saved == 20
    assert saver.error.errno == errno.ENOSPC
    assert not list(tmp_path.glob(".*.tmp"))
    append(pool, 10)
    check_prefix(pool, 60)
    check_prefix(open_pool(tmp_path), 20)
    monkeypatch.undo()
    saver.save()
    assert saver.close() == 60
    check_prefix(open_pool(tmp_path), 60)


@pytest.mark.filterwarnings("error::dpfast.errors.SaveWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_saving_thread_that_dies_is_reported_and_not_waited_for(tmp_path, monkeypatch):
    pool = SamplePool()
    saver = Saver(pool, tmp_path)
    append(pool, 5)
    monkeypatch.setattr(shards, "write_shard", lambda *_: 1 / 0)
    saver.save()  # the warning is an error here, and ends the thread
    assert saver.wait(20) == 0
    assert isinstance(saver.error, ZeroDivisionError)
    saver._thread.join(20)
    saver.save()
    assert saver.wait(20) == 0
    assert "has died" in str(saver.error)
    assert saver.close() == 0


def test_two_savers_and_foreign_samples_are_refused(tmp_path):
    pool = saved(tmp_path, 20)
    with Saver(pool, tmp_path), pytest.raises(OwnedError, match=r"process \d+ on .* writes in"):
        Saver(pool, tmp_path)
    other = SamplePool()
    other.append(batch(100, 30), round=0, **ORIGIN)
    with pytest.raises(ValueError, match="20 samples that are not the first ones"):
        Saver(other, tmp_path)
    with pytest.raises(ValueError, match="20 samples that are not the first ones"):
        Saver(SamplePool(), tmp_path)
    with Saver(SamplePool(), tmp_path, truncate=True) as saver:
        assert saver.saved == 0
    with pytest.raises(ValueError, match="images = 'gif'"):
        Saver(pool, tmp_path, images="gif")


def test_a_copy_has_the_shards_of_the_first_samples_and_touches_nothing(tmp_path):
    saved(tmp_path / "whole", 20, 30)
    copy_saved(tmp_path / "whole", tmp_path / "part", 30)
    assert sorted(path.name for path in (tmp_path / "part").glob("*.tar")) == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    check_prefix(open_pool(tmp_path / "part", limit=30), 30)
    with pytest.raises(DamagedPoolError, match="holds 50 samples, 51 are needed"):
        copy_saved(tmp_path / "whole", tmp_path / "more", 51)
    (tmp_path / "whole" / "shard-000001.tar").unlink()
    with pytest.raises(DamagedPoolError, match=r"shard-000001\.tar is missing"):
        copy_saved(tmp_path / "whole", tmp_path / "torn", 30)
    assert not (tmp_path / "whole" / "quarantine").exists()


def test_a_copy_shares_the_files_and_copies_where_links_are_refused(tmp_path, monkeypatch):
    saved(tmp_path / "whole", 20, 30)
    copy_saved(tmp_path / "whole", tmp_path / "linked", 30)
    assert all(path.stat().st_nlink == 2 for path in (tmp_path / "linked").glob("shard-*"))

    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    copy_saved(tmp_path / "whole", tmp_path / "copied", 30)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "copied").glob("shard-*"))
    for name in ("linked", "copied"):
        check_prefix(open_pool(tmp_path / name, limit=30), 30)


def test_a_pool_of_pixels_holds_what_its_jpeg_files_give_back(tmp_path):
    pool, rows = SamplePool(), torch.arange(30)
    with Saver(pool, tmp_path, images="jpeg", shard_samples=20) as saver:
        made = batch(0, 30)
        pool.append(made, payload=saver.encoded(made.images), round=0, **ORIGIN)
        saver.save()
        assert saver.wait() == 30
        assert not saver._files
    assert not torch.equal(pool.payload(rows), made.images)
    again = open_pool(tmp_path)
    assert torch.equal(again.payload(rows), pool.payload(rows))
    assert again.records().tobytes() == pool.records().tobytes()
    assert len(list(tmp_path.glob("*.tar"))) == 2


def test_no_shard_takes_what_is_left_for_checkpoints(tmp_path, monkeypatch):
    pool, free = SamplePool(), 300_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    with Saver(pool, tmp_path, reserve=250_000) as saver:
        append(pool, 10)
        saver.save()
        assert saver.wait(20) == 10
        free = 260_000
        append(pool, 10)
        saver.save()
        with pytest.warns(
            SaveWarning,
            match=r"253.9 KiB are free, .* up to .* and 244.1 KiB are left for checkpoints",
        ):
            assert saver.wait(20) == 10
        free = 300_000
        saver.save()
        assert saver.wait(20) == 20
