"""Which folder is which class: exact names first, then what is unambiguous, ImageNet's names for
its classes alone; hidden folders are no data.
"""

import os
import shutil
import unicodedata

import pytest
import torch
from PIL import Image

from dpfast import imagenet
from dpfast.data.class_folders import class_folders, folder_name
from dpfast.data.folders import open_folder
from dpfast.data.real import RealSet, check_real, load_real
from dpfast.errors import InputError
from dpfast.evaluate.sets import evaluation_sets
from dpfast.files import NO_DATA

IDS = imagenet.load().ids
TEST = RealSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))


def folder(root, names, count=2):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8)).save(root / name / f"{i}.png")
    return root


def called(root, classes, ids=None, **options):
    """Folder name -> the class that it counts as."""
    found = class_folders(root, classes, ids=ids, **options)
    return {each.name: classes[label] for each, label in found}


@pytest.mark.parametrize(
    "classes",
    [
        sorted(str(k) for k in range(12)),  # as ImageFolder sorts them
        [str((k + 1) % 10) for k in range(10)],
        ["A", "a"],
        ["C+", "C-"],
        ["C++", "C--", "C-+", "C"],
        ["1", "0001-1", "one"],  # the second is what an export may call a class "1"
        ["STRASSE", "Straße"],
        ["x y", "x-y"],
        ["n01440764", "n01443537", "dog"],  # not ImageNet's: a class of its own is among them
    ],
)
def test_a_folder_that_has_a_class_s_name_is_that_class_whatever_else_it_could_mean(
    tmp_path, classes
):
    root = folder(tmp_path, classes)
    assert called(root, classes) == {name: name for name in classes}
    found = open_folder(root, classes, (1, 8, 8), ids=None)
    assert {file.parent.name for file in found.files} == set(classes)
    assert all(
        classes[label] == file.parent.name
        for file, label in zip(found.files, found.labels, strict=True)
    )
    real = load_real(str(root), classes=classes, shape=(1, 8, 8))
    assert sorted(real.validation.labels.tolist()) == list(range(len(classes)))
    (one,) = evaluation_sets((f"mine={root}",), TEST, classes)
    assert sum(len(labels) for _, labels in one.batches()) == 2 * len(classes)


def test_what_an_export_calls_its_folders_can_be_read_back(tmp_path):
    classes = ("C+", "C-", "T-shirt/top", "été", "a" * 300)
    names = [folder_name(label, name) for label, name in enumerate(classes)]
    assert names[2] == "0002-T-shirt-top"
    assert max(len(name.encode()) for name in names) == 255
    assert called(folder(tmp_path, names), classes) == dict(zip(names, classes, strict=True))


def test_case_punctuation_and_numbers_count_where_they_are_unambiguous(tmp_path):
    classes = ("T-shirt/top", "Dress", "Bag", "Coat")
    root = folder(tmp_path, ["t-shirt-top", "DRESS", "2", "0003-coat"])
    assert list(called(root, classes).values()) == ["Coat", "Bag", "Dress", "T-shirt/top"]


@pytest.mark.parametrize(
    ("classes", "names", "said"),
    [
        (("Dog", "dog"), ["DOG"], r"'DOG' may be any of 'Dog' \(class 0\), 'dog' \(class 1\)"),
        (("C+", "C-"), ["c-"], "'c-' may be any of 'C\\+'"),
        (("crane", "crane"), ["crane"], r"'crane' \(class 0\), 'crane' \(class 1\)"),
        (("Dress", "Bag"), ["Dress", "dress"], "'Dress' and 'dress' are both class 0"),
        (("Dress", "Bag"), ["0", "0000-Dress"], "'0' and '0000-Dress' are both class 0"),
        # numbers are names here, and no ids: from 1 on, 0 is none of them
        (("1", "2", "3"), ["0", "1", "2"], "does not know: 0"),
        (("one", "2"), ["one", "0"], "does not know: 0"),
        (("1", "2"), ["01", "2"], "does not know: 01"),
        (("cat", "dog"), ["cat", "dog", "7"], "does not know: 7"),
        (("cat", "dog"), ["cat", "dog", "n01440764"], "does not know: n01440764"),
        (("cat", "dog"), ["cat", "dog", "²"], "does not know: ²"),
    ],
)
def test_what_may_be_several_classes_or_none_is_refused_by_name(tmp_path, classes, names, said):
    root = folder(tmp_path, names)
    with pytest.raises(InputError, match=said):
        class_folders(root, classes, ids=None)
    with pytest.raises(InputError, match=said):
        load_real(str(root), classes=classes, shape=(1, 8, 8))
    with pytest.raises(InputError, match=said):
        check_real(str(root), classes=classes)
    with pytest.raises(InputError, match=said):
        evaluation_sets((f"mine={root}",), TEST, classes)


def test_a_misspelt_folder_hears_the_names_of_the_classes(tmp_path):
    root = folder(tmp_path, ["Trousers", "Sandal"])  # a sandal is a class of ImageNet too
    with pytest.raises(InputError, match=r"know: Trousers; expected .*: 'Trouser', 'Sandal'$"):
        class_folders(root, ("Trouser", "Sandal"), ids=None)


def test_names_of_a_mac_are_those_of_the_recipe(tmp_path):
    classes = ("café", "naïve")
    names = [unicodedata.normalize("NFD", name) for name in classes]
    assert names[0] != classes[0]
    assert called(folder(tmp_path / "nfd", names), classes) == dict(
        zip(names, classes, strict=True)
    )
    assert called(folder(tmp_path / "nfc", classes), names) == dict(
        zip(classes, names, strict=True)
    )
    both = folder(tmp_path / "both", [names[0], classes[0]])
    with pytest.raises(InputError, match="are both class 0"):
        class_folders(both, classes, ids=None)


def test_imagenet_s_rules_hold_for_its_classes_alone(tmp_path):
    few = (IDS[3], IDS[1])
    root = folder(tmp_path / "v2", ["3", "1", "7", IDS[9]])
    assert called(root, few, few, only=True) == {"1": IDS[1], "3": IDS[3]}
    with pytest.raises(InputError, match="does not know: 7, n01518878"):
        class_folders(root, few, ids=few)
    with pytest.raises(InputError, match="does not know: 7, n01518878"):
        class_folders(root, ("a", "b", "c", "d"), ids=None, only=True)


def test_birds_and_cranes_need_no_wordnet_ids_where_the_folders_have_their_names(tmp_path):
    classes = ("crane", "goldfinch")  # one name of two classes of ImageNet
    root = folder(tmp_path / "birds", classes)
    real = load_real(str(root), classes=classes, shape=(1, 8, 8))
    assert real.validation.labels.tolist() == [0, 1]
    (one,) = evaluation_sets((f"birds={root}",), TEST, classes)
    assert one.among is None
    with pytest.raises(InputError, match="'crane' is the name of 2 classes of ImageNet"):
        load_real(
            str(folder(tmp_path / "ids", [IDS[134], IDS[11]])), classes=classes, shape=(1, 8, 8)
        )


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path):
    v2 = folder(tmp_path / "v2", [str(i) for i in range(1000)], count=1)
    for name in (".ipynb_checkpoints", ".cache"):
        folder(v2, [name])
    (one,) = evaluation_sets((f"imagenet-v2={v2}",), TEST, IDS)
    assert sum(len(labels) for _, labels in one.batches()) == 1000
    shutil.rmtree(v2 / "3")
    with pytest.raises(InputError, match=r"lacks n01491361$"):
        evaluation_sets((f"imagenet-v2={v2}",), TEST, IDS)

    root = folder(tmp_path / "real", ["a", "b"])
    folder(root / "a", [".ipynb_checkpoints", "more"])
    (root / "b" / "._0.png").write_bytes(b"\0\5\26\7")
    (root / ".DS_Store").write_bytes(b"\0")
    found = open_folder(root, ("a", "b"), (1, 8, 8), ids=None)
    names = [str(file.relative_to(root)) for file in found.files]
    assert names == ["a/0.png", "a/1.png", "a/more/0.png", "a/more/1.png", "b/0.png", "b/1.png"]
    empty = tmp_path / "empty"
    (empty / ".git").mkdir(parents=True)
    with pytest.raises(InputError, match="no sub-folders"):
        check_real(str(empty))


@pytest.mark.parametrize("name", NO_DATA)
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path, name):
    root = folder(tmp_path, ["cat", "dog", name, f"cat/{name}"])
    assert called(root, ["cat", "dog"]) == {"cat": "cat", "dog": "dog"}
    assert len(open_folder(root, ["cat", "dog"], (1, 8, 8), ids=None)) == 4


def test_an_underscore_counts_as_a_dash_where_that_is_unambiguous(tmp_path):
    names = ["Ankle boot", "T-shirt/top", "a_b", "a-b"]
    found = called(folder(tmp_path / "a", ["ankle_boot", "T-shirt_top", "a_b"]), names)
    assert found == {"ankle_boot": "Ankle boot", "T-shirt_top": "T-shirt/top", "a_b": "a_b"}
    assert called(folder(tmp_path / "d", ["0001_dog"]), ["cat", "dog"]) == {"0001_dog": "dog"}
    with pytest.raises(InputError, match=r"'x_y' may be any of 'x y' .* 'x/y'"):
        called(folder(tmp_path / "b", ["x_y"]), ["x y", "x/y"])
    with pytest.raises(InputError, match="are both class 0"):
        called(folder(tmp_path / "c", ["Ankle_boot", "Ankle boot"]), names)


def test_links_are_followed_as_torchvision_does_and_end(tmp_path):
    store = folder(tmp_path / "store", ["one", "two"])
    root = tmp_path / "real"
    (root / "b").mkdir(parents=True)
    os.symlink(store / "one", root / "a")
    os.symlink(store / "two", root / "b" / "inner")
    os.symlink(store / "two", root / "b" / "twice")
    os.symlink(root, root / "b" / "loop")
    found = open_folder(root, ("a", "b"), (1, 8, 8), ids=None)
    names = [str(file.relative_to(root)) for file in found.files]
    assert names[:2] == ["a/0.png", "a/1.png"]
    assert [n for n in names if n.startswith("b") and "loop" not in n] == [
        "b/inner/0.png",
        "b/inner/1.png",
        "b/twice/0.png",
        "b/twice/1.png",
    ]
    assert len(names) < 20, "a link to a folder around it ends"


def test_a_missing_folder_of_a_named_set_is_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match=r"imagenet-r=.*: no folder '.*nowhere'"):
        evaluation_sets((f"imagenet-r={tmp_path / 'nowhere'}",), TEST, IDS)


def test_labels_of_the_command_line_are_read_by_the_same_rules():
    from dpfast.cli.sample import _labels

    turned = tuple(str((k + 1) % 10) for k in range(10))
    assert _labels("0, 9,1", turned) == [9, 8, 0]
    assert _labels("1,dress, Bag", ("Bag", "Dress")) == [1, 1, 0]
    assert _labels("all", turned) == list(range(10))
    with_commas = ("bonnet, poke bonnet", "bonnet", "tench")
    assert _labels('"bonnet, poke bonnet", bonnet,2', with_commas) == [0, 1, 2]
    for text, names, said in (
        ("bonnet, poke bonnet", with_commas[::2], "commas is quoted: '\"bonnet, poke bonnet\"'"),
        ('"bonnet', with_commas, "expected quotes around whole names"),
        ("0", ("1", "2"), "labels = '0': expected"),
        ("crane", ("crane", "crane"), "'crane': may be any of"),
        ("DOG", ("Dog", "dog"), "'DOG': may be any of"),
        ("2", ("Bag", "Dress"), "labels = '2': expected"),
    ):
        with pytest.raises(InputError, match=said):
            _labels(text, names)


@pytest.mark.parametrize("called", ["ids", "names"])
def test_a_prompt_among_the_names_of_imagenet_is_named_as_the_reason(tmp_path, called):
    """Of twelve classes one is called by a prompt: the folders of the other eleven are matched no
    more, and the message says why.
    """
    known = imagenet.load()
    names = list(known.names[1:13])
    for wordnet_id, name in zip(known.ids[1:13], names, strict=True):
        folder = {"ids": wordnet_id, "names": name}[called]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"")
    check_real(str(tmp_path), classes=names)
    names[4] = "a red bonnet in a shop"
    with pytest.raises(InputError, match="'a red bonnet in a shop' is not: a prompt of your own"):
        check_real(str(tmp_path), classes=names)
    names[6] = "a blue one"
    with pytest.raises(InputError, match="'a red bonnet in a shop' and 1 more are not"):
        check_real(str(tmp_path), classes=names)
    ours = ["ship", "frog"]
    with pytest.raises(InputError) as error:
        check_real(str(tmp_path), classes=ours)
    assert "ImageNet" not in str(error.value)
