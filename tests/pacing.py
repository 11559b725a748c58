"""Workers that take turns: what waits for whom depends on given seconds, not on how fast the machine happens to be."""

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from unittest.mock import patch

import gpipe.worker
from gpipe import StageCost, simulate
from gpipe.schedule import Action, Kind, Schedule


def turns(schedule: Schedule, seconds: Sequence[tuple[float, float]], *, halves: bool) -> list[Action]:
    """The actions in the order in which they end, if a stage's forward and backward take ``seconds``.

    Args:
        schedule: What the workers do.
        seconds: Of every stage, forward and backward.
        halves: All forwards come before the first of the others, as in ``pipe(x)``.
    """
    timeline = simulate(schedule, [StageCost(forward, backward, 0.0) for forward, backward in seconds])
    spans = [span for worker in timeline.workers for span in worker]
    # What ends together: the receiver first, so that what it drops is gone before the next message comes.
    spans.sort(key=lambda s: (s.end, -s.action.stage if s.action.kind == Kind.FORWARD else s.action.stage))
    if halves:
        spans.sort(key=lambda s: s.action.kind != Kind.FORWARD)
    return [span.action for span in spans]


@contextmanager
def in_turn(actions: Sequence[Action]):
    """Workers inside perform ``actions``, one after the other, again and again."""
    act, turn, number = gpipe.worker._act, threading.Condition(), 0

    def wait_and_act(work, action, spans):
        nonlocal number
        with turn:
            if not turn.wait_for(lambda: actions[number % len(actions)] == action, timeout=60):
                raise TimeoutError(f"{action} waits, it is the turn of {actions[number % len(actions)]}")
            act(work, action, spans)
            number += 1
            turn.notify_all()

    with patch.object(gpipe.worker, "_act", wait_and_act):
        yield
