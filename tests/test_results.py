"""The pages that people quote say what the committed records say."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.studies import tables
from benchmarks.studies.anchored_tables import interval, needed
from benchmarks.systems import models

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RECORDS = (ROOT / "docs" / "records" / "results.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
SOURCES = ("static", "dynamic", "prune", "dp")


def records(suite):
    return [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]


def rows(text, heading):
    """The cells of the first table after the text ``heading``, without its first two lines."""
    table = re.findall(r"(?:^\|.*\n)+", text.split(heading, 1)[1], re.MULTILINE)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def row(heading, name):
    (found,) = [cells for cells in rows(PAGE, heading) if cells[0] == name]
    return found[1:]


def test_the_study_is_that_of_its_lines():
    lines = tables.read(RESULTS / "study.jsonl")
    measured = tables.scaling(lines)
    shown = rows(PAGE, "Four sources at five sizes")
    assert len(shown) == 5
    for size, *cells in shown:
        samples = int(size.replace(",", ""))
        assert cells == [f"{100 * measured[each, samples].mean:.2f}" for each in SOURCES]
    best = measured["static", 8000].mean
    fewest = tables.cheapest(lines, best)
    assert (
        f"needs {fewest['dp'][3].seconds / fewest['static'][3].seconds:.2f} of static's seconds"
        in PAGE
    )
    reached = [size for size in (500, 1000, 2000) if measured["dp", size].mean >= best]
    assert 8000 // reached[0] == 8
    assert "8x fewer, in 0.30 of the seconds" in README
    assert "with 8 times fewer samples" in PAGE


def _samples_of_late():
    """Samples that late runs need for the accuracy of plain guidance with 8,000, over 8,000."""
    found = {"dp": {}, "late": {}}
    for each in records("anchored"):
        if each["part"] == "confirmation" and each["kind"] in found:
            by_seed = found[each["kind"]].setdefault(each["size"], {})
            by_seed[each["seed"]] = each["test_accuracy"]
    assert max(found["dp"], key=lambda size: statistics.mean(found["dp"][size].values())) == 8000
    return needed(found["dp"][8000], found["late"], draws=1)[0] / 8000


def _gains(part, kind):
    """The differences of an arm to plain dp with 2,000 samples, in points, by seed."""
    of = {"dp": {}, kind: {}}
    for each in records("anchored"):
        if (each["part"], each["size"]) == (part, 2000) and each["kind"] in of:
            of[each["kind"]][each["seed"]] = 100 * each["test_accuracy"]
    assert of["dp"].keys() == of[kind].keys()
    return {seed: of[kind][seed] - of["dp"][seed] for seed in sorted(of[kind])}


def _gain_over_sizes(kind):
    """The mean of a seed's differences to plain dp over all sizes, and its interval, in points."""
    found = {}
    for each in records("anchored"):
        if each["part"] == "confirmation":
            found[each["kind"], each["size"], each["seed"]] = 100 * each["test_accuracy"]
    sizes = (500, 1000, 2000, 4000, 8000)
    return interval(
        [
            statistics.mean(found[kind, size, seed] - found["dp", size, seed] for size in sizes)
            for seed in range(3, 9)
        ]
    )


def test_what_an_anchor_brings_is_that_of_the_study():
    text = " ".join(PAGE.split())
    shown = rows(PAGE, "Twelve seeds of 2,000 samples each")
    early, late = range(3, 15), range(15, 27)
    for cells, name, part, kind, seeds in (
        (shown[0], "kappa 1 in all steps, omega 0.2", "confirmation", "anchored", early),
        (shown[1], "kappa 1 in the second half", "confirmation", "late", early),
        (shown[2], "the same", "replication", "found", late),
        (shown[3], "kappa 2 in the second half", "replication", "late", late),
    ):
        found = _gains(part, kind)
        assert list(found) == list(seeds)
        mean, low, high = interval([*found.values()])
        wins = sum(value > 0 for value in found.values())
        told = [f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{wins} of 12"]
        assert cells == [name, f"{seeds[0]} to {seeds[-1]}", *told]
    mean = statistics.mean(_gains("replication", "found").values())
    said = f"{mean:+.2f} points, better in 12 of 12 seeds"
    assert f"| {said} | `dpfast bench anchored` |" in README
    assert f"it needs {_samples_of_late():.2f} of the samples" in text
    for kind, said in (
        ("late", "gains {:.2f} points with it (95 % interval {:.2f} to {:.2f}, seeds 3 to 8)"),
        ("anchored", "and {:.2f} ({:.2f} to {:.2f}) with the first row's"),
    ):
        assert said.format(*_gain_over_sizes(kind)) in text
    at_4000 = {
        kind: [
            each["test_accuracy"]
            for each in records("anchored")
            if (each["part"], each["kind"], each["size"]) == ("confirmation", kind, 4000)
        ]
        for kind in ("dp", "late")
    }
    gain = 100 * (statistics.mean(at_4000["late"]) - statistics.mean(at_4000["dp"]))
    assert f"the anchor brings {gain:.2f} points of 4,000 samples" in text
    agreed = {cells[0]: cells[4] for cells in rows(RECORDS, "## Guidance\n")}
    for form, said in (
        ("kappa 1 late", "90.2 % of the"),
        ("kappa 0 (paper)", "and 77.3 % without"),
    ):
        assert said in text
        assert agreed[form].startswith(re.findall(r"[\d.]+", said)[0])


def test_three_seeds_of_the_demo_are_those_of_the_lab_record():
    seeds = [
        cells for cells in rows(RECORDS, "## Deliberate Practice against") if cells[0] in "012"
    ]
    assert len(seeds) == 3
    columns = [[float(cells[i]) for cells in seeds] for i in (1, 2, 3)]
    shown = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns]
    assert row("Deliberate Practice against static data", "held-out accuracy, %") == shown
    dp, paper, static = (f"{statistics.mean(c):.2f} %" for c in columns)
    assert f"| {dp}, as the paper guides {paper}, static {static} |" in README


def test_rates_on_two_cores_are_those_of_the_last_record_of_each_row():
    made = {record["row"]: record["samples_per_second"]["median"] for record in records("sampler")}
    text = {line[0]: line[1:] for line in rows(RECORDS, "### One change at a time")}
    shown = {cells[0]: cells[1:] for cells in rows(PAGE, "Two CPU cores, the embedded generator")}
    for name, recorded in (
        ("baseline", "(a) the predecessor: batch 1, files"),
        ("batched", "(b) + tiny decoder"),
        ("batched, torch.compile", "(c) torch.compile of (b), 20 DDIM steps"),
        ("dpfast", "dpfast, 20 DDIM steps, compiled"),
        ("dpfast, 8 steps of DPM-Solver++", "+ compile (dpfast)"),
    ):
        assert shown[name] == [f"{made[recorded]:.1f}", text[recorded][2]]
    base, dpfast = shown["baseline"][0], shown["dpfast"][0]
    assert f"| {dpfast}, the naive baseline makes {base} |" in README


def test_rates_on_a_gpu_are_those_of_the_record():
    made = [
        [each for each in records("models") if each["model"] == name]
        for name in ("dit-xl-2", "stable-diffusion-1.5")
    ]
    heading = "One H200, random weights"
    best = [each[-1] for each in made]
    rates = [[one["samples_per_second"]["guided"] for one in each] for each in made]
    assert row(heading, "batched") == [f"{rates[0][1]:.1f}", f"{rates[1][1]:.2f}"]
    assert row(heading, "dpfast") == [f"{rates[0][-1]:.1f}", f"{rates[1][-1]:.2f}"]
    faster = 1 / made[0][0]["minimum_seconds"]["guided"]
    assert row(heading, "baseline") == [
        f"{faster:.2f}, the faster of two rounds",
        f"{rates[1][0]:.2f}",
    ]
    over = [models.over(best[0], made[0][0]), rates[1][-1] / rates[1][0]]
    assert row(heading, "dpfast over the baseline") == [
        f"{over[0]:.1f}x, by minima",
        f"{over[1]:.1f}x",
    ]
    batched = [f"{each[-1] / each[1]:.2f}x" for each in rates]
    assert row(heading, "dpfast over batched") == batched
    assert row(heading, "seconds, guided / unguided") == [f"{one['cost']:.2f}" for one in best]
    assert (
        f"| {rates[0][-1]:.1f} and {rates[1][-1]:.1f}, the naive baseline {faster:.2f} and "
        f"{rates[1][0]:.2f} |"
    ) in README


def test_operations_on_a_gpu_are_those_of_the_record():
    ratios = {
        record["case"]: record["ratios"]["dpfast"]
        for record in records("ops")
        if record["pages"] == "replayed"
    }
    for name, case in (
        ("`entropy_and_grad`, 65,536 x 1,000", "entropy_and_grad: 65536 x 1000"),
        ("`guided_step`, 256 x 4 x 64 x 64", "guided_step: CFG, relative, eta 0"),
        ("`gather_batch`, 1,024 of 100,000 images", "gather_batch: 1024 of 100,000"),
    ):
        (found,) = [each for full, each in ratios.items() if full.startswith(case)]
        assert row("One H200, replayed", name) == [
            f"{found['eager']:.1f}x",
            f"{found['torch.compile']:.2f}x",
            f"{100 * found['copy']:.0f} %",
        ]
    low, high = (
        {rival: limit(each[rival] for each in ratios.values() if rival in each) for rival in rivals}
        for limit in (min, max)
        for rivals in [("copy", "eager")]
    )
    assert (
        f"{low['eager']:.1f}x to {high['eager']:.1f}x, at {100 * low['copy']:.0f} to "
        f"{100 * high['copy']:.0f} % of a copy's bandwidth"
    ) in README


def test_loaders_are_those_of_the_last_record():
    case = "loader: 4 x 256 x 3x224x224, crop, flip, normalise"
    measured = [
        record["seconds"]
        for record in records("loader")
        if (record["case"], record["pages"]) == (case, "reused")
    ][-1]
    for name, variant in (
        ("PNG folder, two workers", "PNG folder, 2 workers"),
        ("webdataset, two workers", "webdataset, 2 workers"),
        ("dpfast", "dpfast"),
    ):
        assert row("batches of 256 images of 224 px", name) == [
            f"{measured[variant]['median']:.2f}"
        ]


@pytest.mark.parametrize("page", [README, PAGE], ids=["README", "results"])
def test_no_table_is_wider_than_five_columns(page):
    lines = page.splitlines() if page is PAGE else (ROOT / "README.md").read_text().splitlines()
    assert max(line.count("|") for line in lines if line.startswith("|")) <= 6
