"""Peak extra memory of a step, from what torch's allocator reports to its profiler.

``tracemalloc`` does not see torch's memory, and the peak resident set of a process holds whatever
ran in it before; the profiler sees every tensor a step makes, and frees, in the order in which it
happens. Workspaces inside the linear algebra library are not seen.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_extra"]


def peak_extra(step: Callable[[], object]) -> int:
    """Return the most bytes that one step held beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak
