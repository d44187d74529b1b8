"""Running out of memory: what counts as it, and that work goes on in halves without losing a
row.
"""

import pytest
import torch

from dpfast.hardware.out_of_memory import HalvingBatches, is_out_of_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: "
                "can't allocate memory: you tried to allocate 9 bytes"
            ),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_refused_allocation_of_torch_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def rows_of(batches, count, most):
    """The parts of ``count`` rows on a machine that holds ``most`` of them."""

    def make(rows):
        if rows.stop - rows.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(rows.start, rows.stop))

    return list(batches.over(count, make))


def test_halved_work_loses_no_row_and_stays_halved():
    lightened = []
    batches = HalvingBatches(8, CPU, after_out_of_memory=lambda: lightened.append(1))
    assert rows_of(batches, 19, 3) == [[i, i + 1] for i in range(0, 18, 2)] + [[18]]
    assert (batches.size, batches.since(), batches.since(), len(lightened)) == (2, 2, 0, 2)
    assert rows_of(batches, 4, 8) == [[0, 1], [2, 3]]


def test_a_part_smaller_than_the_size_is_halved_itself():
    batches = HalvingBatches(500, CPU)
    assert rows_of(batches, 6, 3) == [[0, 1, 2], [3, 4, 5]]
    assert batches.since() == 1


def test_a_single_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        rows_of(HalvingBatches(4, CPU), 4, 0)


def test_other_errors_are_raised_at_once():
    batches = HalvingBatches(4, CPU)
    with pytest.raises(ZeroDivisionError):
        list(batches.over(4, lambda rows: 1 / 0))
    assert batches.size == 4
