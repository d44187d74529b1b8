"""Kernels that only a GPU can judge, and that stay out of the package until one has.

`dpfast bench experiments` asks it.

attention      heads of 40, 72 and 80 in two tiles, forward and backward, in the place of SDPA
geglu_product  a GEGLU in the end of the product before it, in the place of a product and ops.geglu
machine_code   what both become on a GPU, read without one
bench          the gate and the times, beside what dpfast runs today

Each is proven in Triton's interpreter and its machine code is read; no GPU has run it. An
experiment enters `dpfast/ops` where a record of an H100 or H200 says so (``"enters": true``): its
fastest form takes at most 1 / ``needed`` of the time of the fastest rival. That is 1.1 for
attention, of each head size and pass by itself, and 1.2 for a GEGLU, of each width. What it does
not let in is deleted, with its tests and its rows here.

What they could gain, derived for a step of Stable Diffusion 1.5 with 32 rows at 512 px, of some 65
ms. A multiprocessor of Hopper computes 4096 operations of tensor cores a cycle, 128 of others and
16 exponentials. A score of an attention costs 4 d of the first, about 4 of the second and one of
the third; added up, 0.156 cycles at 64 lanes, which on 132 of them at 1.83 GHz is 397 TFLOP/s:
what Triton (400) and cuDNN (408) reach on an H100 (Shah et al., "FlashAttention-3", 2024, figure
5). So nothing overlaps there, and of 13.8 ms for heads of 40 the products are 5.6 ms. 48 lanes in
the place of 64 save 1.4 ms, if an instruction of 16 columns costs a quarter of one of 64, which
nobody has published; where products hide behind exponentials, lanes gain nothing (8.3 ms both).
A backward pass in two passes has 7 products and 2 exponentials of a score, 16 ms of 16 guided rows
against 11.5 in one pass of 64 lanes and 9.8 in one of 48.

A GEGLU's product and ``ops.geglu`` take 0.50 + 0.24 ms at 320 inputs, 0.39 + 0.12 at 640 and 0.34 +
0.06 at 1280, at 430, 550 and 630 TFLOP/s and 4.15 TB/s. To gain 1.2 the kernel has to reach 350,
505 and 640 TFLOP/s with its epilogue: likely at 320, where it saves 0.6 ms a step, hardly at 640,
and not at 1280.
"""
