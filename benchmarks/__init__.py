"""Benchmarks: `python -m benchmarks.run ops` prints the table, `pytest benchmarks` gives single
operations.
"""
