"""The theory against its printed check values, quadrature, finite differences, its limit, and
simulation.
"""

import numpy as np
import pytest

from dpfast.theory import easy, hard, quadrature, ridgeless, scalars, simulate, soft, spectral
from dpfast.theory import test_error as predict
from dpfast.theory.scalars import keep_probability, soft_rule, threshold


@pytest.mark.parametrize(
    ("rho", "keep", "error"), [(1, 1, 0.130440), (1, 0.5, 0.087377), (0.9, 0.5, 0.135621)]
)
def test_check_values(rho, keep, error):
    assert predict(d=512, n=2048, keep=keep, rho=rho, ridge=0.01) == pytest.approx(error, abs=5e-7)


def test_check_values_of_the_scalars():
    s = hard(0.5, 0.9)
    f = spectral(s.p, s.gamma, 0.25, 0.01)
    got = [*s[1:], *f]
    want = [0.071326, 0.305439, 0.099157, 3.713553, 25.707110, 21.282337, 508.770766]
    np.testing.assert_allclose(got, want, rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("rho", [-1, -0.5, 0, 0.6, 0.9, 0.999999, 1])
@pytest.mark.parametrize(
    ("strategy", "power"), [("hard", 1), ("easy", 1), ("soft", 3), ("soft", -0.3), ("soft", -5)]
)
def test_scalars_agree_with_quadrature(strategy, power, rho):
    for keep in (1e-3, 0.1, 0.5, 0.9, 1.0):
        edge = soft_rule(keep, power)[0][0] if strategy == "soft" else threshold(strategy, keep)
        other = quadrature(
            lambda t, k=keep: keep_probability(t, strategy, k, power=power),
            rho,
            breaks=[float(edge)],
        )
        np.testing.assert_allclose(
            scalars(strategy, keep, rho, power=power), other, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("p", "gamma", "phi"), [(0.5, 0.07, 0.25), (0.2, 0.01, 0.9), (1, 1, 1)])
def test_derivatives_agree_with_finite_differences(p, gamma, phi):
    step = 1e-6
    middle, below, above = (spectral(p, gamma, phi, 0.01 + x) for x in (0, -step, step))
    for value, slope in (("m", "m_prime"), ("m_tilde", "m_tilde_prime")):
        difference = (getattr(below, value) - getattr(above, value)) / (2 * step)  # z = -ridge
        assert getattr(middle, slope) == pytest.approx(difference, rel=1e-6)


def test_the_limit_agrees_with_the_theorem():
    keep, rho = np.array([1, 0.8, 0.5, 0.2])[:, None, None], np.array([1, 0.9, 0.6])[:, None]
    for n in ([256, 2048, 6144], [300, 1100, 100_000]):
        for strategy in ("hard", "easy"):
            near = predict(d=512, n=n, keep=keep, rho=rho, ridge=1e-9, strategy=strategy)
            limit = ridgeless(d=512, n=n, keep=keep, rho=rho, strategy=strategy)
            np.testing.assert_allclose(near, limit, rtol=0, atol=1e-6)
    beside = ridgeless(
        d=512, n=1024, keep=np.nextafter(0.5, [0, 1]) + np.array([-1e-12, 1e-12]), rho=0.9
    )
    np.testing.assert_allclose(beside, 0.5, atol=1e-4)


def test_three_directions_contain_two():
    two = predict(d=512, n=2048, keep=0.5, rho=0.9, ridge=0.01)
    assert predict(
        d=512, n=2048, keep=0.5, rho=1, rho_g=0.9, rho_s=0.9, ridge=0.01
    ) == pytest.approx(two, abs=1e-14)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 0.5, "rho": [1, 0.9, 0.6], "ridge": 1e-2},
        {"keep": 0.5, "rho": [0.9, 0.6], "ridge": 1e-1, "strategy": "easy"},
        {"keep": 0.5, "rho": 0.9, "ridge": 1e-2, "strategy": "soft", "power": 2.0},
        {"keep": 0.5, "rho": 0.8, "rho_g": 0.7, "rho_s": 0.5, "ridge": 1e-2},
    ],
)
def test_prediction_agrees_with_simulation(arguments):
    found = simulate(d=512, n=2048, draws=8, **arguments)
    predicted = predict(d=512, n=2048, **arguments)
    assert np.all(np.abs(found.error - predicted) < 0.009)


def test_superseded_forms_do_not_agree_with_simulation():
    cell = {"d": 512, "n": 6144, "keep": 0.5, "rho": 1.0, "ridge": 1e-2}
    found = simulate(draws=4, **cell).error
    assert abs(predict(**cell) - found) < 0.009
    assert abs(predict(**cell, form="arxiv-v1") - found) > 0.02
    cell["rho"] = 0.6
    assert abs(predict(**cell, form="icml-main") - simulate(draws=4, **cell).error) > 0.02


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keep", 0),
        ("keep", 1.1),
        ("rho", -1.1),
        ("ridge", -1e-9),
        ("d", 0),
        ("n", 0.5),
        ("n", np.nan),
        ("form", "x"),
        ("strategy", "x"),
        ("rho_g", 0.5),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        predict(**{"d": 512, "n": 2048, "keep": 0.5, "rho": 0.9, "ridge": 0.01, name: value})


@pytest.mark.parametrize(
    "function", [hard, easy, soft, scalars, threshold, soft_rule, quadrature, spectral, simulate]
)
def test_every_public_function_refuses_what_is_outside_its_domain(function):
    good = {
        **{key: {"keep": 0.5, "rho": 0.9} for key in (hard, easy)},
        soft: {"keep": 0.5, "rho": 0.9, "power": 2.0},
        scalars: {"strategy": "soft", "keep": 0.5, "rho": 0.9, "power": 2.0},
        threshold: {"strategy": "hard", "keep": 0.5},
        soft_rule: {"keep": 0.5, "power": 2.0},
        quadrature: {"rule": np.ones_like, "rho": 0.9, "breaks": [1.0], "nodes": 8},
        spectral: {"p": 0.5, "gamma": 0.1, "phi": 0.25, "ridge": 0.01},
        simulate: {"d": 8, "n": 32, "keep": 0.5, "rho": 0.9, "ridge": 0.01, "draws": 2},
    }[function]
    bad = {
        **dict.fromkeys(("keep", "p"), (0, 1.1, -0.5, np.nan, "half")),
        "rho": (1.1, -1.1, np.nan),
        "ridge": (-1e-9, 0, np.nan, np.inf),
        "power": (np.nan, np.inf),
        "gamma": (-1, np.nan, np.inf),
        "phi": (0, -1, np.nan, np.inf),
        "d": (0, 2, 8.5, np.nan),
        "n": (0, 0.5, 32.5, np.nan),
        "draws": (1,),
        "strategy": ("x",),
        "rule": (lambda t: t * np.nan, lambda t: t - 1, lambda t: t + 0.5),
        "breaks": ([np.nan], [1.0, np.nan]),
        "nodes": (0,),
    }
    assert all(np.isfinite(part).all() for part in np.atleast_1d(function(**good)))
    for name in good:
        for value in bad[name]:
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                function(**{**good, name: value})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("outside", [{"ridge": 1e-300}, {"phi": 1e300, "ridge": 1e300}])
def test_what_is_beyond_float64_is_no_nan(outside):
    with pytest.raises(ValueError, match="beyond float64"):
        spectral(**{"p": 1.0, "gamma": 1.0, "phi": 1.0, "ridge": 0.01, **outside})


@pytest.mark.parametrize("strategy", ["hard", "easy", "soft"])
def test_far_corners_are_finite(strategy):
    power = [-1e5, -1, 0, 1, 1e9] if strategy == "soft" else 1.0
    for keep in (1e-300, 1e-9, 1.0):
        for rho in (-1, 0, 1):
            assert np.isfinite(np.stack(scalars(strategy, keep, rho, power=power))).all()


def test_regimes():
    """The table and the weak generator of docs/background/theory.md, to its digits."""
    keep, n = np.array([1, 0.5, 0.1]), 2048 / np.array([1, 0.5, 0.1])
    cell = {"d": 512, "rho": 0.9}
    accuracies = [
        1 - predict(n=n, keep=keep, ridge=0.01, **cell),
        1 - predict(n=n[:2] / 8, keep=keep[:2], ridge=0.01, **cell),
        1 - predict(n=n[:2], keep=keep[:2], ridge=0.1, **cell),
        1 - predict(n=8192, keep=0.5, ridge=0.01, d=512, rho=0.8, rho_g=0.8, rho_s=1),
        1
        - predict(
            n=8192, keep=0.5, ridge=0.01, d=512, rho=0.8, rho_g=0.8, rho_s=1, strategy="easy"
        ),
    ]
    printed = [[86.96, 92.07, 65.70], [66.14, 60.69], [87.18, 83.77], 77.50, 85.14]
    for got, wanted in zip(accuracies, printed, strict=True):
        np.testing.assert_allclose(100 * got, wanted, rtol=0, atol=0.00501)


def test_no_ridge_at_the_peak_is_refused():
    with pytest.raises(ValueError, match="ridge = 0"):
        predict(d=512, n=1024, keep=0.5, rho=0.9, ridge=0)
