"""The pool reaches the accuracy, one sample fewer does not, and what is unreachable says
so.
"""

import pytest

from dpfast.cli.main import main
from dpfast.theory import test_error as predict
from dpfast.theory.pool_sizes import pool_sizes, table


@pytest.mark.parametrize("strategy", ["hard", "easy"])
@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
def test_the_pool_reaches_the_accuracy_and_one_sample_fewer_does_not(strategy, ridge):
    for made in pool_sizes(
        0.75, d=64, ridge=ridge, rho=0.9, strategy=strategy, keeps=(1, 0.8, 0.5)
    ):
        cell = {"d": 64, "keep": made.keep, "rho": 0.9, "ridge": ridge, "strategy": strategy}
        assert predict(n=made.n, **cell) <= 0.25 < predict(n=made.n - 1, **cell)
        assert all(predict(n=made.n * k, **cell) <= 0.25 for k in (1.1, 2, 10))
        assert made.kept == made.n * made.keep


def test_a_tuned_ridge_needs_the_fewest_samples():
    for tuned, *fixed in zip(
        *(pool_sizes(0.85, d=100, rho=0.95, ridge=r) for r in (None, 1e-3, 1e-2, 1e-1)), strict=True
    ):
        assert all(other.n is None or tuned.n <= other.n for other in fixed)
        assert tuned.accuracy == pytest.approx(0.85, abs=1e-3)


def test_what_is_unreachable_says_how_far_one_gets():
    # labels of an imperfect generator
    (weak,) = pool_sizes(0.95, d=50, keeps=[0.5], rho=0.8, rho_g=0.8, rho_s=1.0)
    assert weak.n is None
    assert weak.kept is None
    assert 0.6 < weak.accuracy < 0.95
    assert "none up to 100,000 d holds it" in table([weak])


def test_an_accuracy_that_more_samples_lose_again_is_not_held():
    cell = {"d": 64, "ridge": 1e-7, "rho": 0.17, "rho_g": 0.99, "rho_s": 0.04}
    (lost,) = pool_sizes(0.6, keeps=[0.05], **cell)
    assert lost.n is None
    assert lost.accuracy >= 0.6
    assert predict(n=lost.best_n, keep=0.05, **cell) == pytest.approx(1 - lost.accuracy, abs=1e-12)
    assert f"at best {100 * lost.accuracy:.2f} %, pool {lost.best_n:,}" in table([lost])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--accuracy", "1", "--d", "9"], "accuracy = 1.0"),
        (["--accuracy", "nan", "--d", "9"], "accuracy = 'nan': expected a finite number"),
        (["--accuracy", "x", "--d", "9"], "accuracy = 'x': expected a finite number"),
        (["--accuracy", "0.8", "--d", "0"], "d = 0"),
        (["--accuracy", "0.8", "--d", "9", "--keep", "0.5,0"], "keep = 0"),
        (["--accuracy", "0.8", "--d", "9", "--keep", "half"], "keep = 'half'"),
        (["--accuracy", "0.8", "--d", "9", "--ridge", "0"], "ridge = 0"),
        (["--accuracy", "0.8", "--d", "9", "--rho", "2"], "rho = 2"),
        (["--accuracy", "0.8", "--d", "9", "--rho-g", "0.5"], "rho_g, rho_s"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(options, named, capsys):
    assert main(["theory", "samples", *options]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_prints_the_table(capsys):
    assert main(["theory", "samples", "--accuracy", "0.8", "--d", "64", "--keep", "1,0.5"]) == 0
    assert capsys.readouterr().out.count("|\n") == 4


@pytest.mark.parametrize(("keep", "warned"), [("0.1", True), ("0.5", False)])
def test_a_plan_at_the_interpolation_peak_says_so(keep, warned, capsys):
    assert main(["theory", "samples", "--accuracy", "0.9", "--d", "512", "--keep", keep]) == 0
    assert ("least exact" in capsys.readouterr().out) == warned
