"""The allocator's peak in a step, above the parameters and the optimizer's state."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from step_peers import Trainer
from torch._C._profiler import _EventType


def peak_bytes(made: Callable[[], Trainer]) -> int:
    """Most bytes that torch's CPU allocator had handed out in the fourth and fifth step, the batch included.

    Profiled from before the model is built, so that whatever is kept from step to step counts, too; and until all is
    let go, since the allocator would take blocks at the same addresses for those in another profile.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer = made()
        for _ in range(3):
            trainer.step(*next(trainer.batches))
        gc.collect()  # what only cycles of the first steps keep
        with torch.profiler.record_function("measured"):
            for _ in range(2):
                trainer.step(*next(trainer.batches))
        state = trainer.state_bytes()
        del trainer
        gc.collect()
    events = sorted(walk(profile.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    since = next(e.start_time_ns for e in events if e.name == "measured")
    level = most = 0
    for event in events:
        if event.tag == _EventType.Allocation:
            level += event.extra_fields.alloc_size
            most = max(most, level) if event.start_time_ns >= since else level
    return most - state


def walk(events: list[Any]) -> Iterator[Any]:
    todo = list(events)
    while todo:
        event = todo.pop()
        yield event
        todo += event.children
