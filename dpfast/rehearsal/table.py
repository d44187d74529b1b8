"""A rehearsal as text."""

from __future__ import annotations

from collections import Counter

from dpfast.planning.memory import usable
from dpfast.pool.memory_tiers import readable
from dpfast.rehearsal.rehearsal import Rehearsal


def rehearsal_table(found: Rehearsal) -> str:
    """Returns memory by phase and kind, the run's clock, waits and collectives, and what would go
    wrong.
    """
    plan = found.plan
    line = found.timeline
    walk = found.walks[0]
    many = f"{plan.count} x " if plan.count > 1 else ""
    verdict = (
        "goes from start to end" if not found.failures else f"{len(found.failures)} things go wrong"
    )
    lines = [f"{found.recipe.name} on {many}{plan.device.name}, rehearsed without data: {verdict}"]
    lines += [f"  adapted: {change}" for change in plan.fit.changes]
    lines += ["", *_memory(found), ""]
    host = ", ".join(f"{kind} {readable(size)}" for kind, size in found.host.items() if size)
    lines.append(f"memory of a node's host: {readable(sum(found.host.values()))} ({host})")
    rounds = sum(line.rounds)
    lines += [
        f"clock, by the plan's seconds: {line.seconds / 3600:.1f} hours, of them "
        f"{rounds / 3600:.1f} in "
        f"{len(line.rounds)} rounds of samples; evaluations {line.interval:.0f} s apart",
        f"checkpoints: {line.checkpoints} of {readable(line.checkpoint_bytes)}, "
        f"{readable(line.written)} in all; the "
        f"loop waits {line.waited:.1f} s for them; a kill costs at most {line.lost / 60:.0f} "
        "minutes of training",
        *plan.disk.lines(),
        f"dry run: times the stages for {found.dry_run:.0f} s",
        f"ranks: the longest silence is {line.quiet:.0f} s",
        f"graphs: {walk.captures} captures, {walk.alive} alive while the learner trains",
        f"host waits in steps: {sum(wait.in_step for wait in walk.waits)}; beside them "
        f"{_waits(found)}",
    ]
    if walk.collectives:
        kinds = Counter((group, kind) for group, kind, _ in walk.collectives)
        told = ", ".join(f"{count} {kind} on {group}" for (group, kind), count in kinds.items())
        lines.append(f"collectives of the walk, in one order on ranks {_numbers(found)}: {told}")
    lines += ["", *(f"FAILS {failure}" for failure in found.failures)] if found.failures else []
    return "\n".join(lines)


def _memory(found: Rehearsal) -> list[str]:
    """Returns a row for each phase: the peak, the margin, and what is held then."""
    limit = usable(found.plan.device)
    rows = [f"memory of a device, of {readable(limit)} that may be used (counted tensors)"]
    width = max(len(name) for name in found.walks[0].phases)
    for name, memory in found.walks[0].phases.items():
        kinds = sorted(
            ((k, v) for k, v in memory.kinds.items() if v > 10 << 20), key=lambda pair: -pair[1]
        )
        told = ", ".join(f"{kind} {readable(size)}" for kind, size in kinds)
        rows.append(f"  {name.ljust(width)}  {readable(memory.peak):>10}  {told}")
    fit = found.plan.fit
    rows.append(
        f"with the allocator's reserve, by the plan: at most {readable(fit.peak.total)} "
        f"({fit.peak.phase}), "
        f"{'margin' if fit.margin >= 0 else 'missing'} {readable(abs(fit.margin))}"
    )
    return rows


def _waits(found: Rehearsal) -> str:
    counts = Counter(wait.phase for wait in found.walks[0].waits if not wait.in_step)
    return ", ".join(
        f"{count} in {phase}" for phase, count in counts.items() if phase not in ("start", "models")
    )


def _numbers(found: Rehearsal) -> str:
    return " and ".join(str(walk.rank) for walk in found.walks)
