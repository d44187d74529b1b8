"""The operations in plain PyTorch: what the kernels are tested against, and what runs where there
are none.
"""
