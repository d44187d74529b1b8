"""Power laws of the error: exponents, factors and their intervals, where the truth is known."""

from pathlib import Path

import numpy as np
import pytest

from dpfast.errors import InputError
from dpfast.report.figures import scaling
from dpfast.report.laws import SIZES, Interval, fit_laws, groups_of, savings, student_t
from dpfast.report.points import Point, on_validation, points_of_study

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "study.jsonl"
SIZE = (500, 1000, 2000, 4000, 8000)


def points(source, a, b, *, seeds=3, spread=0.0, sizes=SIZE, random=None, **fields):
    """Runs whose error is a n^-b, times the exponential of normal noise of runs and of seeds."""
    random = random or np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        # its own height and, of what its runs share, its own slope
        high, steep = spread * random.standard_normal(2)
        for n in sizes:
            noise = high + 0.3 * steep * np.log(n / 2000) + spread * random.standard_normal()
            error = a * n**-b * np.exp(noise)
            found.append(Point(source, n, 1 - error, {"seed": seed, **fields}))
    return found


def covers(interval, truth):
    return interval.low is not None and interval.low <= truth <= interval.high


def test_a_law_without_noise_is_found_again_with_an_interval_of_no_width():
    both = [*points("dp", 1.5, 0.3), *points("static", 1.2, 0.2)]
    dp, static = fit_laws(both)
    assert (dp.name, static.name) == ("dp", "static")
    assert (dp.factor, dp.exponent.value) == (pytest.approx(1.5), pytest.approx(0.3))
    assert (dp.exponent.low, dp.exponent.high) == (pytest.approx(0.3), pytest.approx(0.3))
    (saved,) = savings([dp, static])
    needed = (1.5 / (1.2 * 8000**-0.2)) ** (1 / 0.3)
    assert saved.samples.value == pytest.approx(needed)
    assert saved.factor.value == pytest.approx(8000 / needed)
    assert saved.factor.low == pytest.approx(8000 / needed)
    assert saved.inside
    assert saved.sentence() == (
        "dp needs 9.5 (9.5 to 9.5) times fewer samples than static for its 80.11% with 8,000"
    )
    wide = Interval(value=6.1, low=3.0, high=1e200)
    assert wide.text(1) == "6.1 (3.0 to over 10^9)"


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    """Of 400 draws 95 % are 380 ± 4.4; what is found is within four of these deviations."""
    random = np.random.default_rng(seeds)
    exponent = factor = 0
    truth = 8000 / (1.5 / (1.2 * 8000**-0.2)) ** (1 / 0.3)
    for _ in range(400):
        dp = points("dp", 1.5, 0.3, seeds=seeds, spread=0.02, random=random)
        static = points("static", 1.2, 0.2, seeds=seeds, spread=0.02, random=random)
        laws = fit_laws([*dp, *static], draws=400)
        (saved,) = savings(laws, draws=400)
        exponent += covers(laws[0].exponent, 0.3)
        factor += covers(saved.factor, truth)
    assert 0.95 - 4 * 0.011 <= exponent / 400 <= 0.95 + 4 * 0.011
    assert 0.95 - 5 * 0.011 <= factor / 400 <= 1.0


def test_too_little_for_a_law_or_an_interval_is_said():
    one = points("dp", 1.5, 0.3, seeds=1, sizes=(500,))
    for given in (one, [*one, *points("dp", 1.5, 0.3, seeds=1, sizes=(1000,))], one * 2):
        (law,) = fit_laws(given)
        sizes = len({point.samples for point in given})
        assert (law.exponent, law.factor) == (None, None)
        assert law.reason == f"runs of {sizes} of the {SIZES} sizes that it needs"
        assert savings([law]) == []
    (law,) = fit_laws(points("dp", 1.5, 0.3, seeds=1))
    assert law.exponent == Interval(value=pytest.approx(0.3), reason="one seed")
    unknown = [Point("dp", n, 1 - n**-0.3, {}) for n in SIZE]
    (law,) = fit_laws(unknown)
    assert law.exponent.reason == "no known seed"
    (law,) = fit_laws([*points("dp", 1, 0.3, seeds=2, sizes=(500,)), *unknown[1:]])
    assert law.exponent.low is not None
    scattered = [Point("dp", n, 1 - n**-0.3, {"seed": n}) for n in SIZE[:3]]
    (law,) = fit_laws(scattered)
    assert law.exponent.reason == "too few sizes have runs of several seeds"


def test_errors_of_nothing_are_named_and_not_fitted():
    perfect = Point("dp", 8000, 1.0, {"seed": 0})
    odd = [Point("dp", 16000, float("nan"), {"seed": 0}), Point("dp", 0, 0.1, {"seed": 0})]
    (law,) = fit_laws([*points("dp", 1.5, 0.3), perfect, *odd])
    assert law.exponent.value == pytest.approx(0.3)
    assert law.notes == ("3 of 18 runs have no error above 0, and are not in the fit",)
    (law,) = fit_laws([perfect])
    assert law.reason == "runs of 0 of the 3 sizes that it needs"


def test_a_law_that_may_be_flat_has_a_factor_without_an_interval():
    random = np.random.default_rng(1)
    dp = points("dp", 0.3, 0.01, spread=0.1, random=random)
    static = points("static", 0.35, 0.01, seeds=3)
    found = savings(fit_laws([*dp, *static]))
    assert all(saved.factor.reason == "its exponent may be 0" for saved in found)
    rising = fit_laws([*points("dp", 0.1, -0.1), *static])
    assert rising[0].notes == ("its error does not fall",)
    assert savings(rising) == []


def test_groups_are_what_the_user_names_and_nothing_is_dropped():
    """Patience that grows with the size: a group for each, or one for each source."""
    runs = [
        *points("dp", 1.5, 0.3, sizes=(500,), patience=3, omega=0.1),
        *points("dp", 1.5, 0.3, sizes=(1000,), patience=3, omega=0.1),
        *points("dp", 1.5, 0.3, sizes=(2000,), patience=6, omega=0.1),
        *points("static", 1.2, 0.2, patience=3, omega=0.1),
    ]
    assert {name: len(group) for name, group in groups_of(runs).items()} == {
        "dp": 6,
        "dp, patience 6": 3,
        "static": 15,
    }
    assert {name: len(group) for name, group in groups_of(runs, ["source"]).items()} == {
        "dp": 9,
        "static": 15,
    }
    assert list(groups_of(runs, ["patience", "omega"])) == [
        "dp, patience 3, omega 0.1",
        "dp, patience 6, omega 0.1",
        "static, patience 3, omega 0.1",
    ]
    law = fit_laws(runs, ["source"])[0]
    assert law.notes == ("its runs differ in patience",)
    assert law.exponent.value == pytest.approx(0.3)
    with pytest.raises(InputError, match="group_by = 'Omega': no run has such a field"):
        groups_of(runs, ["Omega"])
    old = [*runs, Point("dp", 500, 0.5, {"seed": 0})]
    assert "dp, omega not recorded" in groups_of(old, ["omega"])


def test_the_studys_runs_save_what_its_tables_say():
    """docs/records/results.md: dp reaches static's best with 8 times fewer samples, prune with 4,
    dynamic with none of the sizes; each is the next larger size that was run.
    """
    laws = fit_laws(points_of_study(STUDY))
    assert sum(len(law.points) for law in laws) == 118
    exponents = {law.name: round(law.exponent.value, 3) for law in laws if law.exponent}
    usual = {name: exponents[name] for name in ("dp", "prune", "dynamic", "static")}
    assert usual == {"dp": 0.078, "prune": 0.084, "dynamic": 0.068, "static": 0.061}
    found = {saved.group.name: saved for saved in savings(laws)}
    assert f"{found['dp'].accuracy:.2%}" == "79.01%"
    assert 8 <= found["dp"].factor.value < 16
    assert found["dp"].factor.low > 4
    assert 4 <= found["prune"].factor.value < 8
    assert 1 <= found["dynamic"].factor.value < 2
    text = (STUDY.parents[2] / "docs" / "records" / "results.md").read_text(encoding="utf-8")
    for law in laws[:1] + [law for law in laws if law.name in ("prune", "dynamic", "static")]:
        assert f"| {law.name} | {law.exponent.text(3)} |" in text
    for name in ("dp", "dynamic"):
        assert f"| {found[name].factor.text(1)} |" in text
    validation, missing = on_validation(points_of_study(STUDY))
    assert (len(validation), missing) == (118, [])
    assert fit_laws(validation)[0].exponent.value != laws[0].exponent.value


def test_students_t_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for values in range(2, 60):
        assert student_t(values) == pytest.approx(stats.t.ppf(0.975, values - 1), rel=2e-3)
    assert student_t(3) == pytest.approx(stats.t.ppf(0.975, 2), abs=5e-4)


@pytest.mark.parametrize("sizes", [SIZE, SIZE[:2], SIZE[:1]])
def test_every_source_has_its_name_in_the_figure(sizes):
    laws = fit_laws([*points("dp", 1.5, 0.3), *points("static", 1.2, 0.2, sizes=sizes)])
    (axes,) = scaling(laws, (7.0, 3.6), "validation").axes
    assert sorted(text.get_text() for text in axes.texts) == ["dp", "static"]
