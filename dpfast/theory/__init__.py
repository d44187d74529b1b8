"""The test error that random-matrix theory predicts for training on selected samples, beside its
simulation.
"""

from dpfast.theory.covariance import Features, covariance_error
from dpfast.theory.scalars import Scalars, easy, hard, quadrature, scalars, soft
from dpfast.theory.simulate import Simulated, simulate, simulate_covariance
from dpfast.theory.theorem import Spectral, ridgeless, spectral, test_error

__all__ = [
    "Features",
    "Scalars",
    "Simulated",
    "Spectral",
    "covariance_error",
    "easy",
    "hard",
    "quadrature",
    "ridgeless",
    "scalars",
    "simulate",
    "simulate_covariance",
    "soft",
    "spectral",
    "test_error",
]
