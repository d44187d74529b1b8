"""The test error that random-matrix theory predicts for training on selected samples, beside its simulation."""

from dpfast.theory.scalars import Scalars, easy, hard, quadrature, scalars, soft
from dpfast.theory.simulate import Simulated, simulate
from dpfast.theory.theorem import Spectral, ridgeless, spectral, test_error

__all__ = [
    "Scalars", "Simulated", "Spectral", "easy", "hard", "quadrature", "ridgeless", "scalars", "simulate", "soft",
    "spectral", "test_error",
]  # fmt: skip
