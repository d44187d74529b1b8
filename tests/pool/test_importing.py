"""Other people's datasets: read as the libraries read them that they were made for, or refused with
the file, the sample and what is there; never another label, never a part of them.
"""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dpfast.cli.main import main
from dpfast.config import RECIPE_FILE
from dpfast.errors import InputError
from dpfast.pool import codecs
from dpfast.pool.export import export_pool
from dpfast.pool.importing import import_pool
from dpfast.pool.pool import SamplePool
from dpfast.pool.tars import read_tar
from tests.pool.helpers import ORIGIN, batch, pixels
from tests.pool.test_export import CLASSES, datasets, pool_of  # noqa: F401, a fixture

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(number: int, shape=(3, 6, 6)) -> bytes:
    return codecs.to_png(pixels(torch.tensor([number]), shape)[0].numpy())


def jpeg(number: int) -> bytes:
    return codecs.to_jpeg(pixels(torch.tensor([number]))[0])


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def write_tar(folder: Path, *members: tuple[str, bytes], name: str = "a.tar") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_bytes(*members))
    return folder


def sample(number: int, label: object | None = None) -> list[tuple[str, bytes]]:
    label = number if label is None else label
    return [(f"{number}.png", png(number)), (f"{number}.cls", str(label).encode())]


def images_of(count: int, path: str | None = None, data: bytes | None = None) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data or png(i), "path": path} for i in range(count)], kind)


def write_parquet(
    folder: Path, *, name="a.parquet", features=None, image="image", count=None, **columns
) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values()))) if columns else count
    table = pa.table({image: images_of(count), **columns})
    if features:
        about = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, folder / name)
    return folder


def write_images(folder: Path, names, rows=None, table="metadata.jsonl") -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    if rows is not None:
        (folder / table).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def labels(folder: Path, **options: str) -> list[int]:
    return import_pool(folder, **options)[0].column("label").tolist()


def named(*names: str) -> dict:
    return {"_type": "ClassLabel", "names": list(names)}


# parquet


def test_the_only_class_label_is_the_label_with_its_names(tmp_path):
    write_parquet(tmp_path / "a", labels=[1, 2], features={"labels": named("x", "y", "z")})
    pool, classes = import_pool(tmp_path / "a")
    assert (pool.column("label").tolist(), classes) == ([1, 2], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({"labels": [1, 2]}, None),
        ({"fine_label": [7, 9]}, None),
        ({"fine": [1, 0], "coarse": [0, 0]}, {"fine": named("a", "b"), "coarse": named("c")}),
        ({"tags": [[1], [0]]}, {"tags": {"_type": "Sequence", "feature": named("a", "b")}}),
        ({"text": ["a dog", "a cat"]}, None),
    ],
)
def test_without_a_label_that_is_clear_the_columns_are_listed(tmp_path, columns, features):
    write_parquet(tmp_path, features=features, **columns)
    listed = ", ".join(repr(name) for name in ("image", *columns))
    with pytest.raises(InputError, match=f"a.parquet: no label; it has {listed}; .*--label-column"):
        import_pool(tmp_path)


def test_the_column_that_is_asked_for_is_the_label(tmp_path):
    features = {"fine": named("a", "b"), "coarse": named("c")}
    write_parquet(tmp_path, fine=[1, 0], coarse=[0, 0], label=[0, 0], features=features)
    pool, classes = import_pool(tmp_path, label_column="fine")
    assert (pool.column("label").tolist(), classes) == ([1, 0], ["a", "b"])
    with pytest.raises(InputError, match="label_column = 'finer' is not there; it has 'image'"):
        import_pool(tmp_path, label_column="finer")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pa.array([1, None]), "row 1: the label is missing"),
        ([0.0, 2.7], "row 1: the label is 2.7"),
        ([3, -1], "row 1: the label is -1"),
        ([0, 1 << 31], "row 1: the label is 2147483648"),
        (["dog", "cat"], "row 0: the label is 'dog'"),
        ([True, False], "row 0: the label is True"),
        ([[1], [2]], r"row 0: the label is \[1\]"),
        ([0.0, float("nan")], "row 1: the label is nan"),
        (pa.array(["a", "b"]).dictionary_encode(), "row 0: the label is 'a'"),
    ],
)
def test_a_label_that_is_none_is_named_with_its_row(tmp_path, values, said):
    write_parquet(tmp_path, label=values)
    with pytest.raises(InputError, match=f"a.parquet, {said}, expected a whole number from 0"):
        import_pool(tmp_path)


def test_whole_floats_are_labels(tmp_path):
    assert labels(write_parquet(tmp_path, label=[1.0, 3.0])) == [1, 3]


def test_a_label_without_a_name_is_refused(tmp_path):
    write_parquet(tmp_path, label=[0, 2], features={"label": named("a", "b")})
    with pytest.raises(InputError, match=r"row 1: the label is 2, expected .* 0 to 1"):
        import_pool(tmp_path)


def test_what_datasets_writes_with_one_class_label_is_read(datasets, tmp_path):  # noqa: F811
    """As beans and cats_vs_dogs are on the Hub."""
    features = datasets.Features(
        {"img": datasets.Image(), "labels": datasets.ClassLabel(names=["cat", "dog", "emu"])}
    )
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    rows = {"img": images, "labels": ["emu", "cat", "dog"]}
    theirs = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "data").mkdir()
    theirs.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    pool, classes = import_pool(tmp_path)
    assert (pool.column("label").tolist(), classes) == (theirs["labels"][:], ["cat", "dog", "emu"])
    for image, other in zip(pool.images(torch.arange(3)), theirs["img"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(other))


def test_the_images_may_have_another_name(tmp_path):
    write_parquet(tmp_path / "a", image="img", label=[1, 2])
    assert labels(tmp_path / "a") == [1, 2]
    write_parquet(tmp_path / "b", image="left", label=[1, 2], right=images_of(2))
    with pytest.raises(InputError, match=r"several columns of images .*'left' .*'right'"):
        import_pool(tmp_path / "b")
    pq.write_table(pa.table({"pixels": [[1, 2]], "label": [1]}), tmp_path / "c.parquet")
    (tmp_path / "c").mkdir()
    (tmp_path / "c.parquet").rename(tmp_path / "c" / "c.parquet")
    with pytest.raises(InputError, match=r"no column of image files .*'pixels' \(list<"):
        import_pool(tmp_path / "c")


def test_a_row_without_the_bytes_of_its_image_is_named(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, (value, said) in enumerate(
        {
            ((None, "x/1.png"),): "holds the path 'x/1.png' of an image and not its bytes",
            ((None, None),): "has no image",
            None: "has no image",
            ((b"", None),): "cannot be read as an image",
        }.items()
    ):
        row = None if value is None else dict(zip(("bytes", "path"), value[0], strict=True))
        column = pa.array([{"bytes": png(0), "path": None}, row], kind)
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"image": column, "label": [0, 1]}), folder / "a.parquet")
        with pytest.raises(InputError, match=f"a.parquet, row 1: {said}"):
            import_pool(folder)


def test_the_columns_of_others_are_not_taken_for_ours(tmp_path):
    """A "seed" of text, or a "round" of a game, is none of the sampler's."""
    pool, _ = import_pool(write_parquet(tmp_path, label=[1, 2], seed=["a", "b"], round=[4, 5]))
    assert pool.column("sample_id").tolist() == [0, 1]
    assert pool.column("round").tolist() == [0, 0]


def test_files_that_name_other_classes_are_refused(tmp_path):
    for number, names in enumerate((("a", "b"), ("b", "a"))):
        name = f"train-0000{number}-of-00002.parquet"
        write_parquet(tmp_path, name=name, label=[0, 1], features={"label": named(*names)})
    with pytest.raises(InputError, match=r"00001-of-00002.parquet names other classes than"):
        import_pool(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [b"[]", b"{", b"\xff", b'{"info": []}', b'{"info": {"features": {"label": 3}}}', b"[" * 9999],
)
def test_metadata_that_is_none_is_named_or_passed_over(tmp_path, metadata):
    table = pa.table({"image": images_of(1), "label": [3]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    try:
        assert labels(tmp_path) == [3]
    except InputError as error:
        assert "a.parquet" in str(error)  # noqa: PT017, either is right
    pq.write_table(table.replace_schema_metadata({"dpfast": metadata}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: its metadata 'dpfast'"):
        import_pool(tmp_path)


# splits


def test_splits_are_never_merged_without_being_asked(tmp_path, capsys):
    write_parquet(tmp_path, name="train-00000-of-00001.parquet", label=[1, 2])
    write_parquet(tmp_path, name="test-00000-of-00001.parquet", label=[-1, -1])
    with pytest.raises(InputError, match=r"splits 'test' \(1 files\), 'train' \(1 files\)"):
        import_pool(tmp_path)
    assert labels(tmp_path, split="train") == [1, 2]
    with pytest.raises(InputError, match="row 0: the label is -1"):
        import_pool(tmp_path, split="test")
    with pytest.raises(InputError, match=r"split = 'dev': .* holds the splits 'test'"):
        import_pool(tmp_path, split="dev")
    out = ["--format", "webdataset", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path), *out]) == 2
    assert "choose by --split" in capsys.readouterr().err
    assert main(["export", str(tmp_path), *out, "--split", "train"]) == 0
    assert labels(tmp_path / "out") == [1, 2]


def test_the_command_takes_the_label_column(tmp_path):
    features = {"fine_label": named("a", "b"), "coarse_label": named("c")}
    write_parquet(tmp_path / "in", fine_label=[1, 0], coarse_label=[0, 0], features=features)
    command = [
        "export",
        str(tmp_path / "in"),
        "--format",
        "parquet",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert main([*command, "--label-column", "fine_label"]) == 0
    pool, classes = import_pool(tmp_path / "out")
    assert (pool.column("label").tolist(), classes) == ([1, 0], ["a", "b"])


def test_splits_are_merged_in_the_order_asked_for(tmp_path):
    write_parquet(tmp_path, name="data/train-00000-of-00001.parquet", label=[1])
    write_parquet(tmp_path, name="data/validation-00000-of-00001.parquet", label=[2])
    write_parquet(tmp_path, name="data/test-00000-of-00001.parquet", label=[3])
    assert labels(tmp_path, split="val + train") == [2, 1]


NAMES = {
    "data/train-00000-of-00001.parquet": "train",
    "train.parquet": "train",
    "imagenet12k-train-0003.parquet": "train",
    "train/0000.parquet": "train",
    "training/a.parquet": "train",
    "my_val/a.parquet": "validation",
    "dev.parquet": "validation",
    "valid-0.parquet": "validation",
    "data/unsupervised-00000-of-00001.parquet": "unsupervised",
    "eval.parquet": "test",
    "trainers.parquet": "",
    "0.parquet": "",
}


@pytest.mark.parametrize(("name", "split"), NAMES.items())
def test_the_split_of_a_file_is_the_one_that_datasets_sees(datasets, tmp_path, name, split):  # noqa: F811
    write_parquet(tmp_path, name=name, label=[5])
    (theirs,) = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert theirs == (split or "train")
    write_parquet(
        tmp_path, name="test/0.parquet" if split != "test" else "train/0.parquet", label=[6]
    )
    if split:
        assert labels(tmp_path, split=split) == [5]
    with pytest.raises(InputError, match="holds the splits"):
        import_pool(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("Train.parquet", "Test.parquet"),
        ("TRAIN-0.parquet", "VAL-0.parquet"),
        ("mnist_Train.parquet", "mnist_Test.parquet"),
        ("trainset.parquet", "testset.parquet"),
        ("Train/0.parquet", "Eval/0.parquet"),
    ],
)
def test_splits_are_told_apart_in_any_case_of_letters(tmp_path, names):
    """``datasets`` merges those that lie beside each other."""
    for label, name in enumerate(names):
        write_parquet(tmp_path, name=name, label=[label])
    with pytest.raises(InputError, match=r"holds the splits .*'train'"):
        import_pool(tmp_path)
    assert labels(tmp_path, split="Train") == [0]


@pytest.mark.parametrize("names", [("mnisttrain", "mnisttest"), ("mnistTrain", "mnistVal")])
def test_files_that_may_be_of_several_splits_are_not_merged(tmp_path, names):
    for label, name in enumerate(names):
        write_parquet(tmp_path, name=f"{name}.parquet", label=[label])
    with pytest.raises(InputError, match=r"mnist\w+\.parquet and .* may be of several splits"):
        import_pool(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "data/train-00001-of-00003 is missing"),
        (["train-00001-of-00002-ab12"], "train-00000-of-00002 is missing"),
        (["train-00000-of-00001", "train-00001-of-00002"], "train-00000-of-00002 is missing"),
        (["train-00000-of-00001-a", "train-00000-of-00001-b"], "00000-of-00001 stands in it twice"),
        (["train-00000-of-00001", "train-00007-of-00001"], "00007-of-00001 .* is none of them"),
        (["a-0-of-3", "a-1-of-3"], "data/a-2-of-3 is missing"),
    ],
)
def test_a_shard_that_is_missing_is_named(tmp_path, names, said):
    for name in names:
        write_parquet(tmp_path, name=f"data/{name}.parquet", label=[1])
    with pytest.raises(InputError, match=said):
        import_pool(tmp_path)


def test_shards_are_complete_from_one_on_too_and_those_of_other_splits_do_not_matter(tmp_path):
    for label in (1, 2):
        write_parquet(tmp_path, name=f"train-{label}-of-2.parquet", label=[label])
    write_parquet(tmp_path, name="test-00003-of-00009.parquet", label=[5])
    assert labels(tmp_path, split="train") == [1, 2]


def test_two_datasets_in_one_folder_are_not_one(tmp_path):
    for name in ("cola", "mnli"):
        write_parquet(tmp_path / "a", name=f"{name}/train-00000-of-00001.parquet", label=[1])
    with pytest.raises(InputError, match=r"several folders: .*cola, .*mnli; name one"):
        import_pool(tmp_path / "a")
    assert labels(tmp_path / "a" / "cola") == [1]
    write_tar(write_parquet(tmp_path / "b", label=[1]), *sample(1))
    with pytest.raises(InputError, match="holds several datasets: parquet, tar"):
        import_pool(tmp_path / "b")


def test_what_is_packed_is_named_and_not_left_out(tmp_path):
    write_tar(tmp_path, *sample(1))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar_bytes(*sample(2))))
    with pytest.raises(InputError, match=r"b\.tar\.gz: unpack it first"):
        import_pool(tmp_path)
    (tmp_path / "b.tar.gz").rename(tmp_path / "data-00000-of-00001.arrow")
    with pytest.raises(InputError, match=r"arrow: write it by to_parquet of datasets first"):
        import_pool(tmp_path)


def test_a_pool_of_ours_has_no_splits_and_no_other_label(tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "out", "webdataset")
    for option in ({"split": "train"}, {"label_column": "round"}):
        with pytest.raises(InputError, match="is a pool of dpfast, which has labels and no splits"):
            import_pool(tmp_path / "out", **option)


def test_pictures_in_the_folder_of_a_run_are_no_dataset(tmp_path):
    write_images(tmp_path, ["a/0.png", "b/1.png"])
    (tmp_path / RECIPE_FILE).write_text("{}")
    with pytest.raises(InputError, match="the run has saved no samples"):
        import_pool(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        import_pool(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is no folder"):
        import_pool(tmp_path / "a" / "0.png")


# tars


def test_all_tars_that_lie_behind_each_other_in_a_file_are_read(tmp_path):
    first, second = tar_bytes(*sample(1)), tar_bytes(*sample(2), *sample(3))
    for name, data in {
        "two": first + second,
        "tight": first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512 + 512) + second,
        "far": first + bytes(3 << 20) + second,
        "same keys": first + first,
        "empty between": first + tar_bytes() + second,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(data)
        assert labels(tmp_path / name) == ([1, 1] if name == "same keys" else [1, 2, 3])


def test_a_damaged_header_is_not_the_end(tmp_path):
    """tarfile takes it for the end mark, and the samples behind it are lost without a word."""
    data = bytearray(tar_bytes(*sample(1), *sample(2)))
    place = data.index(b"2.png")
    data[place] = ord("x")
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match=f"a.tar is damaged: no member begins at byte {place}"):
        import_pool(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_bytes(*sample(1)) + b"\n" + bytes(511))
    with pytest.raises(InputError, match=r"a.tar"):
        import_pool(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.png", png(0)), ("0.txt", b"dog")], r"sample '0': no label; it has '\.png', '\.txt'"),
        ([("0.png", png(0)), ("0.label", b"3")], r"no label; it has '\.png', '\.label'"),
        ([("0.png", png(0)), ("0.json", b'{"fine": 3}')], r"it has '\.png', '\.json', 'fine'"),
        ([("0.png", png(0)), ("0.json", b'{"label": null}')], "no label"),
        ([("0.png", png(0)), ("0.json", b'{"label": 2.7}')], "the label is 2.7"),
        ([("0.png", png(0)), ("0.cls", b"-1")], r"sample '0', \.cls: the label is -1"),
        ([("0.png", png(0)), ("0.cls", b"2.7")], r"sample '0', \.cls: the label is '2.7'"),
        ([*sample(5), ("5.json", b'{"label": 4}')], r"its \.cls is 5, 'label' of its \.json is 4"),
        ([*sample(0), ("1.png", png(1))], "sample '1': no label"),
        ([*sample(0), ("1.jpg", jpeg(1)), ("1.cls", b"1")], r"1\.jpg is a JPEG file, .* none"),
        ([("1.jpg", jpeg(1)), ("1.cls", b"1"), *sample(0)], r"0\.png is no JPEG .* JPEG files"),
        ([*sample(0), ("1.npy", npy(np.zeros((3, 6, 6), np.float16))), ("1.cls", b"1")], "latents"),
        ([*sample(0), ("1.png", png(1, (3, 5, 6))), ("1.cls", b"1")], r"1\.png is of shape"),
        ([*sample(0), ("0.jpg", jpeg(0))], r"sample '0' has several of npy, png"),
        ([*sample(0), *sample(0)], r"member '0\.png' stands in it twice"),
        ([*sample(0), ("0.CLS", b"1")], r"member '0\.CLS' stands in it twice"),
        ([*sample(0), *sample(1), *sample(0)], "members of sample '0' stand in two places"),
        ([("0.json", b"[" * 9999), ("0.png", png(0))], r"0\.json: cannot be read as JSON"),
        ([("0.json", b"\xff\xfe"), ("0.png", png(0))], r"0\.json: its encoding is UTF-16"),
        (
            [("0.json", b'{"label": 4, "label": 5}'), ("0.png", png(0))],
            "'label' stands in it twice",
        ),
        ([*sample(2), ("2.json", b'{"label": "3"}')], r"its \.cls is 2, 'label' of its .* is '3'"),
        ([*sample(1), ("1.json", b'{"label": true}')], r"'label' of its \.json is True"),
        ([*sample(2), ("2.json", b'{"label": {"a": 1}}')], r"'label' of its \.json is {'a': 1}"),
        ([*sample(2), ("2.json", b'{"label": [2]}')], r"'label' of its \.json is \[2\]"),
        ([*sample(2), ("2.json", b'{"label": "NaN"}')], r"'label' of its \.json is 'NaN'"),
        ([("README", b"hello")], "sample 'README' has none of npy"),
    ],
)
def test_every_sample_of_a_tar_is_checked_and_named(tmp_path, members, said):
    write_tar(tmp_path, *members)
    with pytest.raises(InputError, match=f"a.tar.*{said}"):
        import_pool(tmp_path)


ARRAY = np.zeros((3, 4, 6), np.uint8)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (npy(np.zeros((4, 3, 6), np.uint8)), r"1\.npy holds pixels of shape \(4, 3, 6\)"),
        (npy(np.zeros((3, 4, 3), np.float16)), r"1\.npy holds latents of shape"),
        (npy(np.zeros((3, 4, 6), np.float32)), r"1\.npy: an array of float32"),
        (npy(np.asfortranarray(np.zeros((3, 4, 6), np.uint8))), r"1\.npy: an array .* in C order"),
        (npy(ARRAY)[:-1], r"1\.npy: 71 bytes of an array of uint8"),
        (npy(ARRAY) + b"x", r"1\.npy: 73 bytes of an array of uint8"),
        (npy(ARRAY)[:40], r"1\.npy: "),
        (npy(ARRAY).replace(b"(3, 4, 6)", b"(3, 4, 'x"), r"1\.npy: "),
    ],
)
def test_every_array_of_a_tar_is_checked_not_the_first_alone(tmp_path, array, said):
    """An array of as many bytes in another order, or of another type, was read as the first."""
    write_tar(tmp_path, ("0.npy", npy(ARRAY)), ("0.cls", b"0"), ("1.npy", array), ("1.cls", b"1"))
    with pytest.raises(InputError, match=said):
        import_pool(tmp_path)


def test_the_label_of_a_tar_is_the_member_or_the_key_asked_for(tmp_path):
    members = [("0.png", png(0)), ("0.label", b"3"), ("0.json", b'{"fine": 4, "label": null}')]
    write_tar(tmp_path, *members, ("0.cls", b"5"))
    assert labels(tmp_path) == [5]  # null is no label, and hides none
    assert labels(tmp_path, label_column="label") == [3]
    assert labels(tmp_path, label_column=".label") == [3]
    assert labels(tmp_path, label_column="fine") == [4]
    with pytest.raises(InputError, match=r"label_column = 'txt' is not there; it has '\.png'"):
        import_pool(tmp_path, label_column="txt")


@pytest.mark.parametrize("value", ["2", "2.0", 2, 2.0, None, "dog"])
def test_a_label_of_the_json_that_says_nothing_else_is_left_to_the_member(tmp_path, value):
    table = json.dumps({"label": value}).encode()
    assert labels(write_tar(tmp_path, *sample(2), ("2.json", table))) == [2]


def test_webdataset_and_datasets_see_the_same_samples_in_a_tar(datasets, tmp_path):  # noqa: F811
    """Hidden members, which a Mac writes, are no data there either."""
    webdataset = pytest.importorskip("webdataset")
    hidden = [("._0.png", b"x"), (".DS_Store", b"x")]
    last = [("./2.png", png(2)), ("./2.cls", b"7")]
    write_tar(tmp_path, *hidden, *sample(0, 4), *sample(1, 6), *last)
    file = str(tmp_path / "a.tar")
    theirs = list(webdataset.WebDataset([file], shardshuffle=False).decode("rgb8"))
    rows = datasets.load_dataset("webdataset", data_files=file, split="train")
    pool, _ = import_pool(tmp_path)
    assert [row["cls"] for row in theirs] == [row["cls"] for row in rows] == [4, 6, 7]
    assert pool.column("label").tolist() == [4, 6, 7]
    for ours, other in zip(pool.images(torch.arange(3)), theirs, strict=True):
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), other["png"])


def test_a_sparse_file_in_a_tar_is_refused(tmp_path):
    """Its data in the tar are not those of the file."""
    data = bytearray(tar_bytes(("0.png", png(0))))
    data[156] = ord("S")
    data[148:156] = b" " * 8
    data[148:155] = f"{sum(data[:512]):06o}\0".encode()
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"member '0.png' is a sparse file"):
        list(read_tar(tmp_path / "a.tar"))


def test_the_same_keys_in_two_tars_are_other_samples(tmp_path):
    write_tar(tmp_path, *sample(0, 1), name="a.tar")
    write_tar(tmp_path, *sample(0, 2), name="b.tar")
    assert labels(tmp_path) == [1, 2]


# image folders


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x1c", "\r", "x"])
def test_a_caption_may_hold_any_character(tmp_path, mark):
    row = {"file_name": "0.png", "label": 3, "text": f"a{mark}b"}
    assert labels(write_images(tmp_path, ["0.png"], [row])) == [3]


def test_images_in_class_folders_are_labelled_as_datasets_and_torchvision_do(datasets, tmp_path):  # noqa: F811
    names = ["train/10/a.png", "train/9/b.png", "train/Zebra/c.png", "train/dog/d.png"]
    write_images(tmp_path, [*names, "train/dog/._d.png", "train/.hidden/e.png"])
    pool, classes = import_pool(tmp_path)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / ".cache")
    )
    assert classes == theirs.features["label"].names == ["10", "9", "Zebra", "dog"]
    assert pool.column("label").tolist() == sorted(theirs["label"]) == [0, 1, 2, 3]


def test_captions_without_a_label_leave_it_to_the_class_folders(tmp_path):
    names = ["dog/0.png", "cat/1.png", "dog/2.png"]
    rows = [{"file_name": name, "text": "a pet"} for name in names]
    pool, classes = import_pool(write_images(tmp_path / "a", names, rows))
    assert (pool.column("label").tolist(), classes) == ([1, 0, 1], ["cat", "dog"])
    # which folder is the class, or whether it is one, nothing says
    for number, others in enumerate(
        (["dog/0.png"], ["0.png", "1.png"], ["a/dog/0.png", "b/cat/1.png"], ["dog/0.png", "1.png"])
    ):
        rows = [{"file_name": name, "text": "a pet"} for name in others]
        folder = write_images(tmp_path / str(number), others, rows)
        with pytest.raises(InputError, match=r"jsonl: no label; it has 'file_name', 'text', and"):
            import_pool(folder)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"file_name": "0.png", "label": 1}, {"file_name": "1.png"}],
            "1.png: the label is missing",
        ),
        ([{"file_name": "0.png", "label": "dog"}], "0.png: the label is 'dog'"),
        ([{"file_name": "0.png", "label": 2.7}], "0.png: the label is 2.7"),
        ([{"file_name": "0.png", "labels": 2}], "no label; it has 'file_name', 'labels'"),
        (
            [{"file_name": "0.png", "label": 1}] * 2,
            "line 2: the file_name '0.png' stands in it twice",
        ),
        ([{"file_name": "9.png", "label": 1}], "9.png: cannot be read"),
        ([{"file_name": "", "label": 1}], "line 1: it has no file_name"),
        ([{"image": "0.png", "label": 1}], "it has no file_name; its columns are image, label"),
        ([{"file_name": "/etc/passwd", "label": 1}], "has an absolute path"),
        ([{"file_name": "0.png\0", "label": 1}], "has an absolute path"),
        ([], "are empty"),
    ],
)
def test_every_line_of_a_table_is_checked(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        import_pool(write_images(tmp_path, ["0.png", "1.png"], rows))


def test_a_file_name_is_found_twice_however_far_apart(tmp_path):
    rows = [{"file_name": f"{i}.png", "label": 1} for i in range(1001)]
    write_images(tmp_path, [row["file_name"] for row in rows], [*rows, rows[0]])
    with pytest.raises(InputError, match=r"line 1002: the file_name '0.png' stands in it twice"):
        import_pool(tmp_path)


def test_a_folder_of_images_is_split_as_others_are(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "a", [f"{split}/cat/0.png", f"{split}/dog/1.png"])
    with pytest.raises(InputError, match="holds the splits 'test'"):
        import_pool(tmp_path / "a")
    assert labels(tmp_path / "a", split="train+test") == [0, 1, 0, 1]
    write_images(tmp_path / "b", ["test/0.png"], [{"file_name": "test/0.png", "label": 1}])
    assert labels(tmp_path / "b") == [1]  # a table above all speaks for them


def test_class_names_are_those_of_the_label_alone(tmp_path):
    """Another column of our own export is none of theirs."""
    for format in ("imagefolder", "parquet"):
        export_pool(pool_of("pixels"), tmp_path / format, format, CLASSES)
        pool, classes = import_pool(tmp_path / format, label_column="round")
        assert (pool.column("label").tolist(), classes) == ([i // 10 for i in range(30)], None)


def test_an_export_without_its_table_is_not_read_by_its_folders(tmp_path):
    """They would give the samples other labels."""
    export_pool(pool_of("pixels"), tmp_path, "imagefolder", CLASSES)
    (tmp_path / "train" / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"train/metadata\.jsonl is missing"):
        import_pool(tmp_path)


def test_images_beside_each_other_have_no_label(tmp_path):
    with pytest.raises(InputError, match=r"no label; its images do not .*: '0\.png' lies in none"):
        import_pool(write_images(tmp_path / "a", ["0.png", "1.png"]))
    for number, (names, said) in enumerate(
        [
            (["cat/0.png", "dog/1.png", "stray.png"], r"'stray\.png' lies in none"),
            (["train/0.png", "train/1.png"], r"train: no label; .* '0\.png' lies in none"),
            (["cat/a/0.png", "dog/b/1.png"], r"'cat/a/0\.png' lies deeper"),
            (["images/0.png", "images/1.png"], "all lie in 'images'; expected CLASS/IMAGE"),
        ]
    ):
        with pytest.raises(InputError, match=said):
            import_pool(write_images(tmp_path / str(number), names))


def test_classes_are_numbered_over_all_splits_as_datasets_does(datasets, tmp_path):  # noqa: F811
    names = ["train/bird/0.png", "train/cat/1.png", "train/dog/2.png"]
    write_images(tmp_path, [*names, "test/cat/3.png", "test/dog/4.png", "val/dog/5.png"])
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / ".cache")
    )
    for split, right in {"train": [0, 1, 2], "test": [1, 2], "validation": [2]}.items():
        pool, classes = import_pool(tmp_path, split=split)
        assert pool.column("label").tolist() == sorted(theirs[split]["label"]) == right
        assert classes == theirs[split].features["label"].names == ["bird", "cat", "dog"]
    write_images(tmp_path, ["test/ant/6.png"])
    pool, classes = import_pool(tmp_path, split="train+test")
    assert pool.column("label").tolist() == [1, 2, 3, 0, 2, 3]
    assert classes == ["ant", "bird", "cat", "dog"]


def test_a_split_without_class_folders_numbers_no_other(tmp_path):
    """As those of ImageNet's archives, and a folder that is called "images"."""
    names = ["train/cat/0.png", "train/zebra/1.png", "val/a.png", "test/images/b.png"]
    pool, classes = import_pool(write_images(tmp_path, names), split="train")
    assert (pool.column("label").tolist(), classes) == ([0, 1], ["cat", "zebra"])
    with pytest.raises(InputError, match="all lie in 'images'"):
        import_pool(tmp_path, split="test")


def test_captions_are_numbered_over_all_splits_too(tmp_path):
    for split, names in {"train": ["ant/0.png", "cat/1.png"], "test": ["cat/0.png"]}.items():
        rows = [{"file_name": name, "text": "a pet"} for name in names]
        write_images(tmp_path / split, names, rows)
    assert labels(tmp_path, split="test") == [1]


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "gif", "jfif", "jpe", "apng", "dib"])
def test_a_class_counts_whatever_its_images_are_called(datasets, tmp_path, suffix):  # noqa: F811
    """A class of .tif files vanished, and those behind it moved up."""
    write_images(tmp_path, ["cat/1.png", "dog/2.png", "bird/0." + suffix])
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / ".cache")
    )
    pool, classes = import_pool(tmp_path)
    assert classes == theirs.features["label"].names == ["bird", "cat", "dog"]
    assert pool.column("label").tolist() == sorted(theirs["label"]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["bird/0.ppm", "dog/3.HEIC", "bird/notes.md", "bird/deep/x.md"])
def test_no_class_and_no_image_is_left_out_unsaid(tmp_path, name):
    write_images(tmp_path, ["cat/1.png", "dog/2.png", name])
    said = "holds no image, and would be no class" if "md" in name else "kind are not read"
    with pytest.raises(InputError, match=said):
        import_pool(tmp_path)


def test_what_systems_leave_behind_is_no_class(tmp_path):
    rubbish = [f"{name}/a/0.png" for name in ("__MACOSX", "@eaDir", "lost+found", ".git")]
    write_images(tmp_path, ["cat/1.png", "dog/2.png", "dog/@eaDir/2.png", *rubbish])
    assert import_pool(tmp_path)[1] == ["cat", "dog"]


def test_a_table_above_all_that_names_splits_is_split(tmp_path):
    names = ["train/0.png", "train/1.png", "Test/0.png"]
    rows = [{"file_name": name, "label": label} for label, name in enumerate(names)]
    write_images(tmp_path / "a", names, rows)
    with pytest.raises(InputError, match=r"splits 'test' \(1 files\), 'train' \(2 files\)"):
        import_pool(tmp_path / "a")
    assert labels(tmp_path / "a", split="train") == [0, 1]
    assert labels(tmp_path / "a", split="test+train") == [2, 0, 1]
    names = ["bus/0.png", "train/1.png", "car/2.png"]  # a class, beside others
    rows = [{"file_name": name, "label": label} for label, name in enumerate(names)]
    assert labels(write_images(tmp_path / "b", names, rows)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["labels.csv", "metadata.json", "cat/annotations.xml", "y.tsv"])
def test_a_table_that_is_not_read_is_named(tmp_path, caplog, name):
    write_images(tmp_path, ["cat/0.png", "dog/1.png"])
    assert labels(tmp_path) == [0, 1]
    assert not caplog.messages
    (tmp_path / name).write_text("file,label\n")
    assert labels(tmp_path) == [0, 1]
    assert caplog.messages == [f"not read beside the images of {tmp_path}: {name}"]


def test_images_that_a_table_does_not_list_are_counted(tmp_path, caplog):
    names = [f"{i}.png" for i in range(4)]
    rows = [{"file_name": "./" + name, "label": 1} for name in names]
    for place in ("a", "b/train"):
        write_images(tmp_path / place, names, rows)
    assert labels(tmp_path / "a") == labels(tmp_path / "b") == [1] * 4
    assert not caplog.messages
    write_images(tmp_path / "a", ["metadata.png", "more/5.png"])
    write_images(tmp_path / "b/train", ["5.png"])
    assert labels(tmp_path / "a") == labels(tmp_path / "b") == [1] * 4
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "2 images are left out",
        "1 images are left out",
    ]
    assert "does not list: metadata.png, more/5.png" in caplog.messages[0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.JSONL", "Metadata.jsonl"])
def test_other_tables_are_named(tmp_path, name):
    write_images(tmp_path / "a", ["cat/0.png", "dog/0.png"], [], table=name)
    with pytest.raises(InputError, match=f"{name}: expected one metadata.jsonl for a split"):
        import_pool(tmp_path / "a")


def test_an_image_of_another_kind_is_named(tmp_path):
    rows = [{"file_name": name, "label": 1} for name in ("0.jpg", "1.jpg")]
    write_images(tmp_path, ["0.jpg", "1.jpg"], rows)
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    with pytest.raises(InputError, match=r"1\.jpg is no JPEG file, the samples before it are JPEG"):
        import_pool(tmp_path)


def test_links_are_followed_as_the_cache_of_hugging_face_has_them(tmp_path):
    write_parquet(tmp_path / "blobs", name="abc", label=[1, 2])
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet").symlink_to(
        tmp_path / "blobs" / "abc"
    )
    assert labels(tmp_path / "snapshot") == [1, 2]
    write_images(tmp_path / "real", ["cat/0.png", "dog/1.png"])
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "linked" / ".git").symlink_to(tmp_path / "linked")
    assert labels(tmp_path / "linked") == [0, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    write_tar(tmp_path, *sample(1))
    (tmp_path / "a.tar").chmod(0)
    with pytest.raises(InputError, match=r"a\.tar"):
        import_pool(tmp_path)


# our own columns


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("round", value) for value in (1.5, None, "2", True, 1 << 31, float("nan"))),
        *(("sample_id", value) for value in (None, "a", 0.5, 1 << 63)),
        *(("omega", value) for value in ("0.1", True, [0.1], 1e39, 10**400)),
    ],
)
def test_a_value_that_a_column_cannot_hold_is_named(tmp_path, column, value):
    """2.7 was 2, and null was 0."""
    export_pool(pool_of("pixels"), tmp_path, "imagefolder")
    table = tmp_path / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    rows[7][column] = value
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match=rf"0000000\d\d.png: column '{column}' is .*, expected"):
        import_pool(tmp_path)


# exports


def strict(text: str):
    """JSON as parsers other than Python's read it: NaN is no value."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def unguided_first(count: int = 30) -> SamplePool:
    """A pool as that of a run: the initial samples have no entropy."""
    pool = SamplePool()
    for number in range(3):
        made = batch(len(pool), count // 3)
        made.entropy[:] = float("nan") if number < 2 else 0.5 + torch.arange(count // 3)
        pool.append(made, round=number, **ORIGIN)
    return pool


def test_a_table_of_images_holds_no_value_that_strict_parsers_refuse(tmp_path):
    pool = unguided_first()
    export_pool(pool, tmp_path / "out", "imagefolder", CLASSES)
    table = (tmp_path / "out" / "train" / "metadata.jsonl").read_text(encoding="utf-8")
    rows = [strict(line) for line in table.splitlines()]
    assert sum(row["entropy"] is None for row in rows) == 20
    # the type of the column, which datasets takes from the first lines
    assert [row["sample_id"] for row in rows] == [20, *range(20), *range(21, 30)]
    again, _ = import_pool(tmp_path / "out")
    assert again.records().tobytes() == pool.records().tobytes()
    assert torch.equal(again.images(torch.arange(30)), pool.images(torch.arange(30)))


@pytest.mark.parametrize("format", ["imagefolder", "webdataset", "parquet"])
def test_datasets_reads_entropies_behind_samples_without(datasets, tmp_path, format):  # noqa: F811
    export_pool(unguided_first(), tmp_path / "out", format)
    files = {"imagefolder": "**", "webdataset": "*.tar", "parquet": "*.parquet"}[format]
    rows = datasets.load_dataset(
        format,
        data_files=str(tmp_path / "out" / files),
        split="train",
        cache_dir=str(tmp_path / ".cache"),
    )
    entropy = [row["json"]["entropy"] if format == "webdataset" else row["entropy"] for row in rows]
    assert sorted(e for e in entropy if e is not None and e == e) == [0.5 + i for i in range(10)]


@pytest.mark.parametrize("name", ["x" * 400, "é" * 200, "漢" * 100, ", ".join(["hen"] * 90)])
def test_a_class_name_may_be_longer_than_the_name_of_a_file(tmp_path, name):
    pool = pool_of("pixels")
    names = [f"{name}{i}" for i in range(10)]
    export_pool(pool, tmp_path / "out", "imagefolder", names)
    again, classes = import_pool(tmp_path / "out")
    assert classes == names
    assert again.records().tobytes() == pool.records().tobytes()


def test_datasets_reads_classes_of_one_name(datasets, tmp_path):  # noqa: F811
    """Two of ImageNet's classes are called "crane"; a ClassLabel refuses that."""
    names = ["crane", "crane", *"cdefghij"]
    export_pool(pool_of("pixels"), tmp_path / "out", "parquet", names)
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train"
    )
    assert rows.features["label"].names[:3] == ["crane (0)", "crane (1)", "c"]
    assert import_pool(tmp_path / "out")[1] == names
