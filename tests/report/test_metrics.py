"""The final tables of a run, as text."""

import re
from types import SimpleNamespace

from dpfast.report.metrics import result_table


def result(source, shots):
    return SimpleNamespace(
        source=source,
        pool=range(60),
        iterations=40,
        additions=1,
        validation=SimpleNamespace(top1=0.5),
        test=SimpleNamespace(top1=0.25, shots=shots),
        generation_seconds=7.0,
        training_seconds=4.0,
        loader_wait=0.01,
        sets=(),
    )


def test_a_run_with_class_counts_has_a_table_by_shots_and_another_run_has_none():
    assert "many" not in result_table([result("dp", {})])
    both = [result("dp", {"many": (0.9, 385), "few": (0.125, 136)}), result("static", {})]
    *_, blank, head, rule, dp, static = result_table(both).splitlines()
    assert (blank, set(rule)) == ("", {"-"})
    assert [cell.strip() for cell in re.split("  +", head)] == [
        *("held-out test", "many: over 100", "medium: 20 to 100", "few: under 20")
    ]
    assert dp.split() == ["dp", "90.00%", "of", "385", "-", "12.50%", "of", "136"]
    assert static.split() == ["static", "-", "-", "-"]
