"""The report of runs: its numbers, what it says of unfinished runs, and the page in a real
browser.
"""

import json

import pytest

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.report.page import write_report
from dpfast.report.runs import differences, read_runs
from tests.report import browser


def make_run(folder, *, finished=True, **fields):
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(Recipe.load("fashion", **fields).to_dict()))
    lines, times = [], []
    for source, top in (("dp", 0.82), ("static", 0.8)):
        for step in range(25, 1000, 25):
            values = {"accuracy": top - 3 / step, "loss": 9 / step, "samples": 1500}
            lines.append({"event": "evaluation", "source": source, "step": step, **values})
        times.append(
            {
                "event": "generation",
                "source": source,
                "step": 0,
                "seconds": 50.0,
                "samples": 1500,
                "made": 1500,
                "flops": 3e12,
                "mfu": 0.25,
                "skipped": 7,
                "retries": 3,
                "memory_peak": 3 << 30,
            }
        )
        times += [
            {"event": "interval", "source": source, "step": 25 * i, "seconds": i, "mfu": 0.1 * i}
            for i in (1, 2, 3)
        ]
        times.append({"event": "training", "source": source, "step": 975, "seconds": 30.0})
        result = {
            "samples": 1500,
            "additions": 1,
            "validation_accuracy": top,
            "test_accuracy": top - 0.01,
        }
        if finished:
            lines.append({"event": "result", "source": source, "step": 975, **result})
    added = {"round": 1, "samples": 2250, "entropy": 0.5, "unguided_entropy": 0.2}
    lines.append({"event": "addition", "source": "dp", "step": 400, **added})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    return folder


def test_the_page_opens_in_a_browser(tmp_path):
    binary = browser.find()
    if binary is None:
        pytest.skip("no headless Chromium; apt-get install chromium-headless-shell")
    page_file = write_report(
        [make_run(tmp_path / "a"), make_run(tmp_path / "b", omega=0.2)], tmp_path / "out"
    )
    for width, dark in ((1280, False), (360, True)):
        with browser.Page(binary) as page:
            page.open(page_file, width=width, dark=dark)
            sizes = page.evaluate(
                "Promise.all([...document.images].map(i => "
                "i.decode().then(() => i.naturalWidth, () => 0)))"
            )
            assert len(sizes) == 6
            assert min(sizes) > 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(i => i.alt.length > 9)")
            kinds = [event["method"] for event in page.events]
            assert "Runtime.consoleAPICalled" not in kinds
            assert "Runtime.exceptionThrown" not in kinds
            assert "Log.entryAdded" not in kinds
            sent = [
                e["params"]["request"]["url"]
                for e in page.events
                if e["method"] == "Network.requestWillBeSent"
            ]
            assert [url for url in sent if not url.startswith("data:")] == [
                page_file.resolve().as_uri()
            ]


def test_the_page_tells_the_results_and_the_gap(tmp_path):
    text = write_report([make_run(tmp_path / "a")], tmp_path / "out").read_text()
    assert "81.00%" in text
    assert "dp reaches 81.0% on held-out images, 2.0 points above static (79.0%)" in text
    assert "<td>30.0</td>" in text  # samples a second
    # shares of the peak, over seconds; memory, gradients, retries
    for cell in (
        "25.0%",
        "23.3%",
        "3 GiB",
        "7",
        "3",
    ):
        assert f"<td>{cell}</td>" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "By shots" not in text


def test_a_run_with_class_counts_has_a_table_by_shots(tmp_path):
    run = make_run(tmp_path / "a")
    shots = {"test_many": 0.9, "many_classes": 385, "test_few": 0.125, "few_classes": 136}
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    last = next(line for line in lines if line["event"] == "result" and line["source"] == "dp")
    last |= shots
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report([run], tmp_path / "out").read_text()
    heads = ("many: over 100", "medium: 20 to 100", "few: under 20")
    assert "".join(f'<th scope="col">{head}</th>' for head in heads) in text
    row = ("a", "dp", "90.00% of 385", "-", "12.50% of 136")
    assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr></tbody>" in text


def test_an_unfinished_run_says_so(tmp_path):
    run = make_run(tmp_path / "a", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evalu')
    text = write_report([run], tmp_path / "out").read_text()
    assert "dp is unfinished, its last line is of iteration 975" in text
    assert "is cut short and was left out" in text


def test_bad_runs_are_refused_and_mixed_recipes_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not the folder of a run"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    runs = [make_run(tmp_path / "a", omega=0.03), make_run(tmp_path / "b", omega=0.05, seed=1)]
    assert differences(read_runs(runs)[0]) == {"omega": [0.03, 0.05]}
    assert (
        "The recipes differ in omega: 0.03, 0.05"
        in write_report(runs, tmp_path / "out").read_text()
    )
    other = json.loads((runs[1] / "recipe.json").read_text()) | {"validation": "other"}
    (runs[1] / "recipe.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="real images differ"):
        write_report(runs, tmp_path / "out")


def test_runs_that_are_not_compared_are_named(tmp_path):
    """Unfinished ones, folders that are no run, and results without the accuracy that is asked."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", finished=False)]
    (tmp_path / "empty").mkdir()
    told = []
    paths = [*runs, tmp_path / "empty", tmp_path / "missing"]
    text = write_report(paths, tmp_path / "out", tell=told.append).read_text()
    for words in (
        "b, dp: unfinished, at iteration 975",
        "b, static: unfinished, at iteration 975",
        "empty&#x27;: not the folder of a run",
        "missing&#x27;: not the folder of a run",
    ):
        assert f"{words}" in text
    assert "not in the fits: b, dp: unfinished, at iteration 975" in told
    assert told[0].splitlines()[0].split()[:3] == ["run", "source", "samples"]
    assert told[1].startswith("dp reaches 81.0% on held-out images, 2.0 points above static")
    assert not any("power law" in line for line in told)  # nobody asks one size for a law
    lines = (runs[0] / "metrics.jsonl").read_text().replace('"validation_accuracy"', '"other"')
    (runs[0] / "metrics.jsonl").write_text(lines)
    told.clear()
    write_report(runs[:1], tmp_path / "out", accuracy="validation", tell=told.append)
    assert told[2:] == [
        f"not in the fits: a, {source}: its result has no validation accuracy"
        for source in ("dp", "static")
    ]
    with pytest.raises(InputError, match="accuracy = 'held-out': expected one of test, validation"):
        write_report(runs, tmp_path / "out", accuracy="held-out")
    with pytest.raises(InputError, match="group_by = 'patiense': no run has such a field"):
        write_report(runs, tmp_path / "out", group_by=["patiense"])


def test_runs_that_differ_in_patience_are_all_drawn(tmp_path):
    """Table 4's patience grows with the size: told apart none has a law, by source there is one."""
    runs = []
    for number, size in enumerate((500, 1000, 2000)):
        run = make_run(tmp_path / str(size), initial_samples=100, patience=3 + number)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["event"] == "result":
                line |= {"samples": size, "test_accuracy": 1 - 0.3 * (size / 500) ** -0.25}
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        runs.append(run)
    told = []
    page = write_report(runs, tmp_path / "out", tell=told.append).read_text()
    assert sum("no power law" in line for line in told) == 6
    assert "dp, patience 4" in page
    told.clear()
    page = write_report(
        runs, tmp_path / "out", group_by=["source"], accuracy="test", tell=told.append
    ).read_text()
    assert told[2] == "dp: exponent 0.250 (no interval: one seed), 3 runs of 3 sizes"
    assert "its runs differ in patience" in page
