"""Benchmarks: `dpfast bench SUITE` prints a table.

harness   how things are measured: turns, gates, records
cases     single operations at fixed sizes; `pytest tests/benchmarks/one_by_one.py` times one by one
systems   whole samplers, learners, runs and plans
studies   what runs reach
experiments  kernels that wait for a GPU to decide
results   the records, one file a suite

A wheel of dpfast has this folder, too, under the same name: `dpfast.cli.bench` says where. It has
neither the tests nor all records, so there a case is compared with its rivals and not tested, what
is measured is kept in the current folder, and tables are printed of the records that were shipped.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "tests").is_dir()
RESULTS = ROOT / "benchmarks" / "results"
