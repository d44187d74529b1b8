"""The committed record of the theory against its simulation, and the command that makes it."""

import json

import numpy as np
import pytest

from benchmarks.cases import theory as bench_theory
from dpfast.errors import InputError


@pytest.fixture(scope="module")
def record():
    return json.loads(bench_theory.RECORDS.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def columns(record):
    return dict(
        zip(record["columns"], map(np.array, zip(*record["rows"], strict=True)), strict=True)
    )


def test_the_grid_is_the_one_that_was_promised():
    cells = bench_theory.grid()
    assert cells.off_peak.sum() >= 200
    assert (cells.n * cells.keep).min() >= 100
    assert set(zip(cells.strategy, cells.rho, strict=True)) == {
        ("hard", 1),
        ("hard", 0.9),
        ("hard", 0.6),
        ("easy", 0.9),
    }
    assert (cells.n.min(), cells.n.max(), cells.keep.min(), cells.keep.max()) == (256, 6144, 0.1, 1)
    assert set(cells.ridge) == {1e-6, 1e-2, 1e-1}


@pytest.mark.parametrize("form", bench_theory.FORMS)
def test_the_record_holds_what_the_code_predicts(columns, form):
    np.testing.assert_allclose(
        columns[form], bench_theory.predicted(bench_theory.grid(), form), rtol=0, atol=5.1e-7
    )


def test_the_record_meets_the_targets_and_one_that_does_not_is_named(record, columns):
    assert not bench_theory.missed(record)
    off = bench_theory.grid().off_peak
    worst = np.abs(columns["exact"] - columns["simulated"])[off].max()
    assert record["deviation"]["exact"]["off"]["max"] == pytest.approx(worst, abs=2e-6)
    record = json.loads(json.dumps(record))
    record["deviation"]["exact"]["off"]["max"] = 0.01
    assert bench_theory.missed(record) == ["max: 0.01, target 0.009"]


@pytest.mark.parametrize("options", [["--draws", "1"], ["--rounds", "0"], ["--draws", "many"]])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=f"{options[0][2:]} = .*: expected a whole number of at"):
        bench_theory.main(options)
