"""A plan as text."""

from __future__ import annotations

from dpfast.planning.fitting import Fit
from dpfast.planning.plan import Phase, Plan
from dpfast.pool.memory_tiers import NAMES, readable
from dpfast.terminal import table


def plan_table(plan: Plan, columns: int | None = None) -> str:
    """Returns phases with hours and samples/s at the utilisation and at the limit, then memory and
    the place of the pool.

    columns: of the terminal, as of ``dpfast.terminal.table``.
    """
    rows: list[tuple[str, ...]] = [
        (
            "",
            "samples",
            "TFLOP each",
            "samples/s",
            "at 100 %",
            "of the limit",
            "hours",
            "at 100 %",
            "limited by",
        )
    ]
    rows += [_row(phase) for phase in plan.phases if phase.units]
    rows.append(("whole run", "", "", "", "", "", _hours(plan.seconds), _hours(plan.limit), ""))
    many = f"{plan.count} x " if plan.count > 1 else ""
    if plan.timed:
        how = "stages timed on this machine"
    elif plan.given:
        how = "utilisation as given"
    else:
        how = (
            "generation at the share of its limit that an H200 reached with a large such "
            "network, the rest stated"
        )
    took = f"{plan.seconds / 3600:.2f} hours, {plan.device_hours:.2f} device hours"
    lines = [f"{plan.recipe.name} on {many}{plan.device.name}: {took}; {how}"]
    lines.append(table(rows, left=(0, 8), columns=columns))
    timed = (
        ["", "timed in small batches:", *(f"  {note}" for note in plan.timed)] if plan.timed else []
    )
    return "\n".join([*lines, *timed, "", *_simulated(plan), *_memory(plan)])


def _row(phase: Phase) -> tuple[str, ...]:
    return (
        f"{phase.source}: {phase.name}",
        str(phase.units),
        f"{phase.counts.flops / 1e12:.4g}",
        f"{phase.rate:.4g}",
        f"{phase.units / phase.limit:.4g}",
        f"{phase.utilisation:.0%}",
        _hours(phase.seconds),
        _hours(phase.limit),
        phase.limited_by,
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}" if seconds >= 360 else f"{seconds / 3600:.4f}"


def _simulated(plan: Plan) -> list[str]:
    """Returns the simulated runs of Deliberate Practice on several devices, in turns and side by
    side.
    """
    if plan.count < 2 or "dp" not in plan.recipe.practice.sources:
        return []
    turns, overlap = plan.turns, plan.overlap
    oldest, longest = plan.recipe.practice.overlap_staleness, plan.job.longest
    needs = f", with --overlap-staleness {longest} or more" if longest > oldest else ""
    return [
        f"dp, simulated in turns: {_hours(turns.seconds)} hours, "
        f"{plan.efficiency(turns):.0%} efficient",
        f"  side by side, {overlap.generating} of {overlap.ranks} make samples while the "
        f"others train: {_hours(overlap.seconds)} hours, {plan.efficiency(overlap):.0%}{needs}",
    ]


def _memory(plan: Plan) -> list[str]:
    fit, pool = plan.fit, plan.fit.pool
    lines = fit.lines()
    for footprint in fit.phases:
        kinds = ", ".join(
            f"{kind} {readable(held)}" for kind, held in footprint.kinds.items() if held
        )
        lines.append(
            f"  {footprint.phase}{_at_once(fit, footprint.phase)}: "
            f"{readable(footprint.total)} ({kinds})"
        )
    lines.append(f"pool: {pool}")
    each = pool.bytes_per_sample
    lines += [
        f"  {name}: {readable(held * each)} a device" for name, held in pool.in_tier.items() if held
    ]
    if not pool.fits:
        missing = pool.samples - sum(pool.in_tier.values())
        budgets = ", ".join(f"{name} {readable(pool.tiers.budget(name))}" for name in NAMES)
        lines.append(
            f"  {missing} samples of a device have no place (budgets of this plan: {budgets})"
        )
    return [*lines, *plan.disk.lines()]


def _at_once(fit: Fit, phase: str) -> str:
    if phase.endswith("samples"):
        return f", {fit.generator_micro_batch} at once"
    return (
        f", {fit.learner_micro_batch if phase == 'training' else fit.evaluation_batch_size} at once"
    )
