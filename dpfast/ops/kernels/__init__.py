"""The operations as Triton kernels: each module has its launch settings by size, and `launch`."""
