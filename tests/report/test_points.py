"""What is compared with what: equal settings only; and the figures of sweeps."""

import json

import pytest

from dpfast.errors import InputError
from dpfast.report.points import Point, lead, points_of_study, sweep, usual
from dpfast.report.sweeps import swept


def point(source, samples, accuracy, seed=0, **fields):
    fields = {
        "omega": 0.05,
        "oversample": 4.0,
        "seed": seed,
        "sources": source,
        "maximum_samples": samples,
    } | fields
    return Point(source, samples, accuracy, fields, flops=2e9 * samples * (1 + fields["omega"]))


@pytest.fixture
def points():
    grid = {"dp": 0.8, "static": 0.7, "prune": 0.78}
    points = [
        point(s, n, a + n / 1e5, seed)
        for s, a in grid.items()
        for n in (1000, 2000)
        for seed in (0, 1)
    ]
    points += [
        point("dp", 2000, 0.5, omega=0.3),
        point("dp", 2000, 0.9, omega=0.0),
        point("static", 4000, 0.99),
    ]
    return [*points, point("prune", 2000, 0.71, oversample=1.0)]


def test_the_lead_ranks_every_source_at_the_largest_common_size(points):
    assert lead(points) == (
        "dp reaches 82.0% on held-out images, 2.0 points above prune (80.0%), 10.0 points above "
        "static (72.0%); "
        "means of 2 run(s) each with 2,000 samples."
    )
    assert lead([p for p in points if p.source == "dp"]) == ""
    assert {p.fields["omega"] for p in usual(points)} == {0.05}


def test_a_sweep_holds_what_differs_in_one_field_alone(points):
    assert {value: len(group) for value, group in sweep(points, "dp", "omega").items()} == {
        0.0: 1,
        0.05: 2,
        0.3: 1,
    }
    assert list(sweep(points, "prune", "oversample")) == [1.0, 4.0]
    assert sweep(points, "static", "omega") == {}


def test_a_sweep_is_drawn_over_its_cost(points):
    top, bottom = swept(points, "omega", (7.0, 3.6)).axes
    assert top.lines[-1].get_ydata().tolist() == pytest.approx([90.0, 82.0, 50.0])
    assert bottom.lines[0].get_ydata().tolist() == pytest.approx([2.0, 2.1, 2.6])
    assert swept([p for p in points if p.source == "static"], "omega", (7.0, 3.6)) is None


def test_a_study_may_leave_out_what_is_not_known(tmp_path):
    file = tmp_path / "study.jsonl"
    file.write_text(json.dumps({"source": "dp", "samples": 10, "test_accuracy": 0.5}) + "\n\n")
    assert points_of_study(file) == [Point("dp", 10, 0.5, {}, run="line 1")]
    file.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1: holds no table"):
        points_of_study(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": "5"}, "samples = '5': expected a whole number of at least 1"),
        ({"samples": 0}, "samples = 0: expected a whole number of at least 1"),
        ({"samples": True}, "samples = True: expected a whole number"),
        ({"test_accuracy": None}, "test_accuracy = None: expected a share, 0 to 1"),
        ({"test_accuracy": 81.5}, "test_accuracy = 81.5: expected a share, 0 to 1"),
        ({"test_accuracy": float("nan")}, "test_accuracy = nan: expected a share, 0 to 1"),
        ({"source": 3}, "source = 3: expected a text"),
        ({"validation_accuracy": "0.8"}, "validation_accuracy = '0.8': expected a share, 0 to 1"),
        ({"flops": "many"}, "flops = 'many': expected a number or null"),
        ({"fields": None}, "fields = None: expected a table"),
        ({"fields": {"seed": [1]}}, r"fields: seed = [1]: expected a whole number of at least 0"),
        ({"fields": {"seed": "1"}}, r"fields: seed = '1': expected a whole number of at least 0"),
        ({"fields": {"omega": "0.1"}}, r"fields: omega = '0.1': expected a number"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_line(changes, told, tmp_path):
    good = {"source": "dp", "samples": 10, "test_accuracy": 0.5, "fields": {"seed": 0}}
    file = tmp_path / "study.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(good | changes)}\n")
    with pytest.raises(InputError) as caught:
        points_of_study(file)
    said = str(caught.value).replace("line 2, fields", "line 2: fields")
    assert said.startswith(f"{file}, line 2: {told}")
    missing = {name: value for name, value in good.items() if name != "samples"}
    file.write_text(f"\n{json.dumps(missing)}\n")
    with pytest.raises(InputError, match=r"line 2: has no 'samples'; expected a whole number"):
        points_of_study(file)
