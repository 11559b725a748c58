"""The order in which ranks issue their messages: the same for both ends, and nothing before what it depends on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpipe.ranks.message_order import Passing, message_order
from gpipe.schedule import Kind
from gpipe.schedules import BUILDERS, with_recompute
from gpipe.transport import CALLER, Direction
from gpipe.two_pass import last_first, passes, window
from gpipe.ways import Ways
from gpipe.worker import neighbours


def ways_of(stages, skips):
    """Every stage's connections, of pairs of stages."""
    incoming = [tuple((a, ((None, f"{a} {b}"),)) for a, b in skips if b == k) for k in range(stages)]
    outgoing = [tuple((b, ((None, f"{a} {b}"),)) for a, b in skips if a == k) for k in range(stages)]
    return [Ways(i, o) for i, o in zip(incoming, outgoing, strict=True)]


def hosts_of(schedule):
    hosts = {int(a.stage): w for w, actions in enumerate(schedule.workers) for a in actions}
    return [hosts[k] for k in range(schedule.stages)]


@st.composite
def pipelines(draw):
    name = draw(st.sampled_from(sorted(BUILDERS)))
    stages = draw(st.integers(1, 4)) * (2 if name.startswith("interleaved") else 1)
    micro_batches = draw(st.integers(1, 7))
    schedule = BUILDERS[name](stages, micro_batches)
    keep = draw(st.integers(0, micro_batches))
    if keep < micro_batches and name in ("gpipe", "one_f_one_b"):
        schedule = with_recompute(schedule, (keep,) * stages)
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    skips = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=4)) if pairs else []
    return schedule, ways_of(stages, skips)


def talks(workers, hosts, ways, ahead):
    """For every worker what it receives and sends, action after action, as the worker loop does."""
    for worker, actions in enumerate(workers):
        for stage, kind, m in actions:
            sources, targets = neighbours(stage, kind, len(hosts), ways[stage])
            received = [Passing(s, stage, way, m) for s, way in sources if s != CALLER]
            sent = [Passing(stage, t, way, m) for t, way in targets if t != CALLER]
            if ahead is not None and m >= ahead and targets[0][0] != CALLER:
                received.append(Passing(targets[0][0], stage, Direction.BACKWARD, m - ahead))
            if ahead is not None and sources[0][0] != CALLER:
                sent.insert(0, Passing(stage, sources[0][0], Direction.BACKWARD, m))
            away = [[p for p in part if hosts[p.source] != hosts[p.target]] for part in (received, sent)]
            yield worker, *away


def check(workers, hosts, ways, ahead=None):
    order = message_order(workers, hosts, ways, ahead)
    place = {passing: i for i, passing in enumerate(order)}
    assert len(place) == len(order)
    seen = dict.fromkeys(range(len(workers)), -1)
    everything = set()
    for worker, received, sent in talks(workers, hosts, ways, ahead):
        seen[worker] = max([seen[worker], *(place[p] for p in received)])
        for passing in sent:
            assert place[passing] > seen[worker]  # behind all that its sender has received and sent before
            seen[worker] = place[passing]
        everything.update(received, sent)
    assert everything == set(order)


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_one_order_for_all_in_which_nothing_comes_before_what_it_depends_on(pipeline):
    schedule, ways = pipeline
    hosts = hosts_of(schedule)
    check(schedule.workers, hosts, ways)
    forwards = [[a for a in actions if a.kind == Kind.FORWARD] for actions in schedule.workers]
    check(forwards, hosts, ways)
    check([[a for a in actions if a.kind != Kind.FORWARD] for actions in schedule.workers], hosts, ways)


@settings(max_examples=50, deadline=None)
@given(pipelines())
def test_the_first_of_two_passes_with_what_says_that_micro_batches_were_taken(pipeline):
    schedule, ways = pipeline
    second = last_first(schedule)
    check(passes(second)[0], hosts_of(schedule), ways, window(second))


def test_messages_come_as_soon_as_their_actions_have_ended():
    order = message_order(BUILDERS["one_f_one_b"](2, 3).workers, [0, 1], [Ways(), Ways()])
    assert [f"{p.source}{p.direction[0]}{p.micro_batch}" for p in order] == ["0f0", "0f1", "1b0", "1b1", "0f2", "1b2"]


def test_workers_that_wait_for_ever_are_refused():
    schedule = BUILDERS["gpipe"](2, 2)
    first, last = schedule.workers
    with pytest.raises(ValueError, match="wait for each other for ever"):
        message_order([first[1:], last], [0, 1], [Ways(), Ways()])


def test_messages_come_in_the_order_in_which_they_would_be_sent():
    """A rank that posted a receive for a late message first would keep memory for it, and its stream, in vain."""
    schedule = BUILDERS["one_f_one_b"](3, 3)
    order = message_order(schedule.workers, [0, 1, 2], [Ways()] * 3)
    forward, backward = Direction.FORWARD, Direction.BACKWARD
    assert order == [
        Passing(0, 1, forward, 0),
        Passing(0, 1, forward, 1),
        Passing(1, 2, forward, 0),
        Passing(0, 1, forward, 2),
        Passing(1, 2, forward, 1),
        Passing(2, 1, backward, 0),
        Passing(1, 0, backward, 0),
        Passing(2, 1, backward, 1),  # at the same time as the next
        Passing(1, 2, forward, 2),
        Passing(1, 0, backward, 1),
        Passing(2, 1, backward, 2),
        Passing(1, 0, backward, 2),
    ]
