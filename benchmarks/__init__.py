"""Benchmarks: `dpfast bench SUITE` prints a table.

harness   how things are measured: turns, gates, records
cases     single operations at fixed sizes; `pytest benchmarks/cases/entropy.py` times one by one
systems   whole samplers, learners, runs and plans
studies   what runs reach
experiments  kernels that wait for a GPU to decide
results   the records, one file a suite
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
