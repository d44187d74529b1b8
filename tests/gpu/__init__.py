"""What only a GPU can show: graphs that are captured, streams that run side by side, memory that is
a device's.

Skipped where torch sees none; `benchmarks/on_gpu.sh` runs all of it.
"""
