"""The figures: points lie on their lines, and files are written."""

from pathlib import Path

import numpy as np
import pytest

from dpfast.cli.main import main
from dpfast.report.points import points_of_study
from dpfast.report.sweeps import measured_sweeps
from dpfast.theory.charts import curves, draw
from dpfast.theory.figures import CHARTS, study

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "study.jsonl"


@pytest.mark.parametrize("name", ["selected_sizes", "oversampling", "easy_or_hard"])
def test_points_lie_on_the_lines(name):
    chart = CHARTS[name]()
    lines = [
        line for panel in chart.panels[-1][:2] for line in panel.lines
    ]  # of a ridge that smooths the peak
    for line, curve in zip(lines, curves(lines, draws=4), strict=True):
        assert curve.error.shape == line.x.shape
        between = np.interp(line.points, line.x, curve.error)
        np.testing.assert_allclose(between, curve.predicted, atol=2e-3)
        off = np.abs(curve.simulated - curve.predicted)
        # what the formula may be off by at a finite d
        assert np.all(off < 4 * curve.stderr + 0.009)
        assert np.mean(off) < 0.008
    assert len(draw(chart, curves(chart.lines, draws=2), 2).axes) == sum(map(len, chart.panels))


def test_the_study_needs_its_sweeps():
    assert len(study(measured_sweeps(points_of_study(STUDY))).axes) == 4
    with pytest.raises(ValueError, match=r"^study: no runs of prune"):
        study(measured_sweeps([]))


def test_bad_input_ends_in_one_line(tmp_path, capsys):
    for options in (["--draws", "1"], ["--draws", "x"], ["--study", str(tmp_path / "none")]):
        assert main(["theory", "figures", "--out", str(tmp_path / "new"), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()
