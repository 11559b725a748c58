"""The simulated NCCL: tensors between ranks with a simulated accelerator each, and what it reports."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from worlds import Raised, World

from gpipe.testing import accelerators

pytestmark = pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators")

BACKEND = "cpu:gloo,sim:simccl"


@pytest.fixture(scope="module")
def world():
    ranks = World(3, BACKEND)
    yield ranks
    ranks.close()


def here(rank):
    torch.accelerator.set_device_index(rank)
    return torch.device("sim", rank)


def numbers(rank, count=4, dtype=torch.float32):
    """Different ones on every rank."""
    return torch.arange(1, count + 1, device=here(rank)).to(dtype) * (rank + 1)


def groups(count, ranks=(0, 1), **options):
    """New groups; None on other ranks."""
    made = [dist.new_group(list(ranks), backend="simccl", **options) for _ in range(count)]
    return [group if dist.get_rank() in ranks else None for group in made]


def reported(expected):
    """The reports, once there are any; the other ranks' notices come when they come."""
    deadline = time.monotonic() + 10
    while expected and not accelerators.reports() and time.monotonic() < deadline:
        time.sleep(0.01)
    dist.barrier()
    found = accelerators.reports()
    accelerators.clear()
    return found


# --- values -----------------------------------------------------------------------------------------------------------


def reduce_on_rank(rank, name, dtype):
    x = numbers(rank, dtype=dtype)
    dist.all_reduce(x, getattr(dist.ReduceOp, name))
    return x.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", ["SUM", "MAX", "MIN"])
def test_all_reduce(world, name, dtype):
    stacked = torch.stack([torch.arange(1, 5).to(dtype) * (rank + 1) for rank in range(3)])
    expected = {"SUM": stacked.sum(0), "MAX": stacked.amax(0), "MIN": stacked.amin(0)}[name].to(dtype)
    assert all(torch.equal(found, expected) for found in world.values(reduce_on_rank, name, dtype))


def test_all_reduce_of_a_mean(world):
    assert all(torch.equal(x, torch.arange(1.0, 5) * 2) for x in world.values(reduce_on_rank, "AVG", torch.float32))


def refused_on_rank(rank):
    x = numbers(rank)
    with pytest.raises(ValueError, match="reduce by sum, avg, max, min"):
        dist.all_reduce(x, dist.ReduceOp.BXOR)
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) first"):
        dist.all_reduce(x.view(2, 2).t())
    with pytest.raises(ValueError, match=r"this one; copy them|itself|same"):
        dist.isend(x, rank)
    (group,) = groups(1)
    if group is not None:
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            dist.all_reduce(torch.ones(1), group=group)


def test_what_nccl_refuses(world):
    world.values(refused_on_rank)


def others_on_rank(rank):
    sent, gathered = numbers(rank), torch.empty(12, device=here(rank))
    dist.broadcast(sent, 1)
    both = [torch.empty(4, device=here(rank)) for _ in range(3)]
    dist.all_gather(both, numbers(rank))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered, numbers(rank))
    dist.barrier(device_ids=[rank])
    nothing = torch.empty(0, device=here(rank))
    dist.all_reduce(nothing)
    on_cpu = torch.ones(2)
    dist.all_reduce(on_cpu)
    return sent.cpu(), torch.cat(both).cpu(), gathered.cpu(), on_cpu


def test_broadcast_gather_barrier_and_the_cpu(world):
    all_ranks = torch.cat([torch.arange(1.0, 5) * (rank + 1) for rank in range(3)])
    for sent, both, gathered, on_cpu in world.values(others_on_rank):
        assert torch.equal(sent, torch.arange(1.0, 5) * 2)
        assert torch.equal(both, all_ranks)
        assert torch.equal(gathered, all_ranks)
        assert torch.equal(on_cpu, torch.full((2,), 3.0))


def ring_on_rank(rank, together):
    """Every rank sends to the next one; two messages each, of which the second is longer."""
    before, after = (rank - 1) % 3, (rank + 1) % 3
    sent = [numbers(rank, 4), numbers(rank, 9)]
    received = [torch.empty(4, device=here(rank)), torch.empty(9, device=here(rank))]
    if together:
        with _coalescing_manager(None, here(rank), async_ops=True) as works:
            for tensor in received:
                dist.irecv(tensor, before)
            for tensor in sent:
                dist.isend(tensor, after)
        works.wait()
    else:
        works = [dist.isend(tensor, after) for tensor in sent] + [dist.irecv(tensor, before) for tensor in received]
        for work in works:
            work.wait()
    return [tensor.cpu() for tensor in received]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one group"])
def test_messages_around_a_ring(world, together):
    for rank, found in enumerate(world.values(ring_on_rank, together)):
        before = (rank - 1) % 3 + 1
        assert torch.equal(found[0], torch.arange(1.0, 5) * before)
        assert torch.equal(found[1], torch.arange(1.0, 10) * before)


def batch_on_rank(rank):
    group = dist.new_group([0, 1], backend="simccl")
    if rank == 2:
        return None
    received, peer = torch.empty(4, device=here(rank)), 1 - rank
    send, receive = dist.P2POp(dist.isend, numbers(rank), peer, group), dist.P2POp(dist.irecv, received, peer, group)
    for work in dist.batch_isend_irecv([send, receive] if rank == 0 else [receive, send]):
        work.wait()
    return received.cpu()


def test_a_batch_of_messages(world):
    found = world.values(batch_on_rank)
    assert torch.equal(found[0], torch.arange(1.0, 5) * 2)
    assert torch.equal(found[1], torch.arange(1.0, 5))


def again_on_rank(rank):
    for _ in range(2):
        (group,) = groups(1, (0, 1, 2))
        x = numbers(rank)
        dist.all_reduce(x, group=group)
        dist.destroy_process_group(group)
        with pytest.raises((dist.DistBackendError, ValueError, RuntimeError)):
            dist.all_reduce(x, group=group)
        dist.barrier()
    return x.cpu()


def test_groups_come_and_go(world):
    assert all(torch.equal(x, torch.arange(1.0, 5) * 6) for x in world.values(again_on_rank))


# --- streams ----------------------------------------------------------------------------------------------------------


def read_on_rank(rank, waits):
    (group,) = groups(1)
    if rank == 0:
        dist.isend(numbers(0), 1, group).wait()
    if rank == 1:
        received = torch.zeros(4, device=here(1))
        work = dist.irecv(received, 0, group)
        if waits:
            work.wait()
        used = (received + 1).cpu()
        work.wait()
        return used, received.cpu(), reported(not waits)
    return reported(False)


def test_what_is_received_is_there_after_wait_alone(world):
    early, late, reports = world.values(read_on_rank, False)[1]
    assert early.isnan().all()
    assert torch.equal(late, torch.arange(1.0, 5))
    assert any("add" in report and "simccl::recv" in report for report in reports), reports
    used, _, reports = world.values(read_on_rank, True)[1]
    assert torch.equal(used, torch.arange(1.0, 5) + 1)
    assert reports == []


def overwrite_on_rank(rank, waits):
    (group,) = groups(1)
    if rank == 0:
        sent = numbers(0)
        work = dist.isend(sent, 1, group)
        if waits:
            work.wait()
        sent.zero_()
        return reported(not waits)
    if rank == 1:
        dist.irecv(torch.empty(4, device=here(1)), 0, group).wait()
    return reported(False)


def test_what_is_sent_may_be_written_after_wait_alone(world):
    reports = world.values(overwrite_on_rank, False)[0]
    assert any("zero_" in report and "simccl::send" in report for report in reports), reports
    assert world.values(overwrite_on_rank, True)[0] == []


def reduce_early_on_rank(rank):
    x = numbers(rank)
    work = dist.all_reduce(x, async_op=True)
    x + 1
    work.wait()
    return reported(True), x.cpu()


def test_a_reduction_that_nobody_waited_for_is_reported(world):
    for reports, x in world.values(reduce_early_on_rank):
        assert any("simccl::all_reduce" in report for report in reports), reports
        assert torch.equal(x, torch.arange(1.0, 5) * 6)


def drop_on_rank(rank):
    (group,) = groups(1)
    if rank == 0:
        for _ in range(20):
            dist.isend(numbers(0), 1, group)  # nobody keeps it, nobody waits
    if rank == 1:
        for _ in range(20):
            received = torch.empty(4, device=here(1))
            dist.irecv(received, 0, group).wait()
            received.add_(1)
    return reported(False)


def test_tensors_live_until_they_have_been_sent(world):
    assert world.values(drop_on_rank) == [[], [], []]


def hold_on_rank(rank):
    (group,) = groups(1)
    before, works = torch.accelerator.memory_allocated(here(rank)), []
    for _ in range(4 if rank < 2 else 0):
        x = numbers(rank, 4096)
        works.append(dist.isend(x, 1, group) if rank == 0 else dist.irecv(x, 0, group))
        works[-1].wait()
        works.append(dist.all_reduce(x, group=group, async_op=True))
        works[-1].wait()
        del x
    return torch.accelerator.memory_allocated(here(rank)) - before


def test_what_was_waited_for_keeps_no_tensors(world):
    assert all(grown <= 0 for grown in world.values(hold_on_rank))  # what earlier tests sent may go meanwhile


SECONDS = 0.4


def overlap_on_rank(rank):
    """How long it takes to receive and compute at the same time, and one after the other; simulated seconds."""
    (group,) = groups(1)
    accelerators.set_link(0.0, SECONDS)
    x, computed, found = numbers(rank), numbers(rank), []
    for overlaps in (True, False):
        dist.barrier()
        if rank == 2:
            continue
        stream = torch.accelerator.current_stream()
        start, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
        start.record(stream)
        work = dist.isend(x, 1, group) if rank == 0 else dist.irecv(x, 0, group)
        began = time.monotonic()
        if not overlaps:
            work.wait()
        issued = time.monotonic() - began
        accelerators.spend(computed, SECONDS)
        work.wait()
        completed = work.is_completed()
        end.record(stream)
        end.synchronize()
        found.append((start.elapsed_time(end) / 1e3, issued, completed, work.is_completed()))
    accelerators.set_link(0.0, 0.0)
    return found


def test_messages_take_time_on_a_stream_of_their_own(world):
    for (beside, _, early, late), (after, host, *_) in world.values(overlap_on_rank)[:2]:
        assert 0.75 * SECONDS < beside < 1.5 * SECONDS
        assert 1.5 * SECONDS < after < 2.5 * SECONDS
        assert not early
        assert late
        assert host < SECONDS / 2  # the stream waits, not the host


def late_on_rank(rank):
    """The receiver's stream waits for what the sender still computes."""
    (group,) = groups(1)
    x = numbers(rank)
    dist.barrier()
    start = time.monotonic()
    if rank == 0:
        dist.isend(accelerators.spend(x, SECONDS), 1, group)
    if rank == 1:
        dist.irecv(x, 0, group).wait()
        torch.accelerator.synchronize()
    return time.monotonic() - start


def test_a_message_comes_when_its_sender_has_computed_it(world):
    assert world.values(late_on_rank)[1] > SECONDS * 0.9


# --- what NCCL could not carry out ------------------------------------------------------------------------------------


def orders_on_rank(rank, same):
    first, second = groups(2)
    x, y = numbers(rank), numbers(rank, 2)
    if rank == 0:
        dist.isend(x, 1, first)
        dist.isend(y, 1, second)
    if rank == 1:
        pairs = [(x, first), (y, second)]
        for work in [dist.irecv(t, 0, group) for t, group in (pairs if same else reversed(pairs))]:
            work.wait()
    return x.cpu(), y.cpu(), reported(not same and rank < 2)


def test_different_orders_on_two_communicators_are_reported(world):
    for x, y, reports in world.values(orders_on_rank, False)[:2]:
        assert torch.equal(x, torch.arange(1.0, 5))
        assert torch.equal(y, torch.arange(1.0, 3))
        assert len(reports) == 1
        assert "in different orders" in reports[0]
        assert "of 16 bytes" in reports[0] or "of 8 bytes" in reports[0]  # what either met first
    assert [reports for *_, reports in world.values(orders_on_rank, True)] == [[], [], []]


def mismatch_on_rank(rank, first, second):
    (group,) = groups(1)
    error = ""
    if rank < 2:
        x, what = numbers(rank), (first, second)[rank]
        try:
            if what == "send":
                work = dist.isend(x, 1 - rank, group)
            elif what == "recv":
                work = dist.irecv(x, 1 - rank, group)
            elif what == "recv half":
                work = dist.irecv(x[:2], 1 - rank, group)
            else:
                work = dist.all_reduce(x, getattr(dist.ReduceOp, what), group=group, async_op=True)
            work.wait()
        except dist.DistBackendError as raised:
            error = str(raised)
    return error, reported(rank < 2)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("send", "send", "rank 0 issued send of 16 bytes, rank 1 issued send of 16 bytes"),
        ("recv", "recv", "rank 0 issued recv of 16 bytes, rank 1 issued recv of 16 bytes"),
        ("send", "recv half", "rank 0 issued send of 16 bytes, rank 1 issued recv of 8 bytes"),
        ("SUM", "MAX", "all_reduce of 16 bytes (sum of torch.float32), rank 1 issued all_reduce of 16 bytes (max"),
    ],
)
def test_operations_that_do_not_match_are_reported_by_both_ranks(world, first, second, words):
    (zero, zeros), (one, ones), (_, others) = world.values(mismatch_on_rank, first, second)
    assert words in zeros[0]
    assert "does not match" in ones[0]
    assert others == []
    assert first == "send" or "does not match" in zero
    assert second == "send" or "does not match" in one


def threads_on_rank(rank, how):
    one, other = groups(2)

    def exchange(group):
        x = numbers(rank)
        (dist.isend(x, 1, group) if rank == 0 else dist.irecv(x, 0, group)).wait()

    def elsewhere(function, *args):
        thread = threading.Thread(target=function, args=args, name="another one")
        thread.start()
        return thread

    if rank < 2 and how == "in turns":  # the other thread is alive, and ready to issue
        turn, done = threading.Event(), threading.Event()
        exchange(one)
        thread = elsewhere(lambda: (exchange(other), turn.set(), done.wait()))
        turn.wait()
        exchange(one)
        done.set()
        thread.join()
    elif rank < 2 and how == "while one is pending":
        x = numbers(rank)
        work = dist.isend(x, 1, one) if rank == 0 else dist.irecv(x, 0, one)
        elsewhere(exchange, other).join()
        work.wait()
    elif rank < 2:
        exchange(one)
        elsewhere(exchange, other).join()
        exchange(one)
    return reported(rank < 2 and how != "one after the other")


@pytest.mark.parametrize("how", ["in turns", "while one is pending"])
def test_operations_of_one_device_from_two_threads_are_reported(world, how):
    accelerators_link(world, 0.3)
    try:
        for reports in world.values(threads_on_rank, how)[:2]:
            assert len(reports) == 1
            assert "from more than one thread" in reports[0]
            assert '"another one"' in reports[0]
            assert "MainThread" in reports[0]
    finally:
        accelerators_link(world, 0.0)


def accelerators_link(world, latency):
    world.values(link_on_rank, latency)


def link_on_rank(rank, latency):
    accelerators.set_link(0.0, latency)


def test_a_thread_may_follow_on_another(world):
    assert world.values(threads_on_rank, "one after the other") == [[], [], []]


def forgotten_on_rank(rank):
    x = numbers(rank)
    dist.all_reduce(x, async_op=True)
    x.mul_(2)


def test_reports_of_ranks_come_home(world):
    results = world.run(forgotten_on_rank)
    assert all(isinstance(r, Raised) and r.type == "AssertionError" and "simccl::all_reduce" in r.text for r in results)


# --- the end ----------------------------------------------------------------------------------------------------------


def abort_on_rank(rank):
    (group,) = groups(1)
    if rank != 1:
        dist.barrier()
        return None
    x = numbers(1)
    work = dist.irecv(x, 0, group)
    timer = threading.Timer(0.3, group.abort)
    timer.start()
    with pytest.raises(dist.DistBackendError, match="aborted"):
        work.wait()
    with pytest.raises(dist.DistBackendError, match="aborted"):
        dist.irecv(x, 0, group)
    timer.join()
    dist.barrier()
    return reported_nothing()


def reported_nothing():
    return accelerators.reports() == []


def test_abort_frees_who_waits_and_what_follows_is_not_accused(world):
    assert world.values(abort_on_rank)[1]
    assert [reports for *_, reports in world.values(orders_on_rank, True)] == [[], [], []]
    assert "in different orders" in world.values(orders_on_rank, False)[0][-1][0]


def slow_on_rank(rank):
    (group,) = groups(1, timeout=timedelta(seconds=0.5))
    if rank == 1:
        with pytest.raises(dist.DistBackendError, match="timed out: rank 0 of the group did not issue its part"):
            dist.irecv(numbers(1), 0, group).wait()
    dist.barrier()
    if group is not None:
        group.abort()


def test_waiting_ends_with_the_groups_timeout(world):
    world.values(slow_on_rank)


def survive_on_rank(rank):
    x = numbers(rank)
    dist.all_reduce(x)
    if rank == 0:
        os._exit(0)
    group = dist.group.WORLD
    work = dist.irecv(x, 0)
    sent = dist.isend(x, 0)
    start = time.monotonic()
    threading.Timer(1.0, group.abort).start()
    with pytest.raises(dist.DistBackendError, match="aborted"):
        work.wait()
    return sent.wait() and time.monotonic() - start


def test_who_waits_for_a_process_that_is_gone_waits_until_abort():
    ranks = World(2, BACKEND)
    try:
        ranks.start(survive_on_rank)
        (seconds,) = ranks.results([1])
        assert not isinstance(seconds, Raised), seconds.text
        assert seconds >= 0.9
    finally:
        ranks.kill()
