"""Simulated accelerators: races are found, programs without races are not accused, and time, memory and bits."""

import copy
import re
import threading
from pathlib import Path

import pytest
import torch
from nets import assert_same
from torch import nn

from gpipe.testing import accelerators

pytestmark = [
    pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators"),
    pytest.mark.skipif(
        accelerators.started() and torch.accelerator.device_count() < 2, reason="needs two simulated accelerators"
    ),
]


def reported():
    """What the detector found, taken so that it does not fail the test."""
    found = accelerators.reports()
    accelerators.clear()
    return found


def current(device):
    return torch.accelerator.current_stream(device)


# --- races ------------------------------------------------------------------------------------------------------------


def test_reading_before_it_is_written():
    x = torch.ones(3, device="sim:0")
    with torch.Stream("sim:0") as stream:
        y = x * 2
    (found,) = reported()
    assert found == (
        f"aten::mul on stream {stream.stream_id} of sim:0 (thread MainThread) reads what aten::fill_ on the default "
        "stream of sim:0 (thread MainThread) may not have written yet"
    )
    current("sim:0").wait_stream(stream)
    del y


def test_writing_before_it_is_read():
    x = torch.ones(3, device="sim:0")
    stream = torch.Stream("sim:0")
    stream.wait_stream(current("sim:0"))
    with stream:
        y = x * 2
    x.add_(1)
    (found,) = reported()
    assert found.startswith("aten::add_ on the default stream of sim:0")
    assert "writes over what aten::mul on stream" in found
    assert found.endswith("may still read")
    current("sim:0").wait_stream(stream)
    del y


def test_writing_over_what_is_not_written_yet():
    x = torch.empty(3, device="sim:0")
    stream = torch.Stream("sim:0")
    with stream:
        x.zero_()
    x.fill_(1)
    (found,) = reported()
    assert "aten::fill_ on the default stream" in found
    assert "writes over what aten::zero_ on stream" in found


def test_freeing_what_is_in_use():
    x = torch.ones(3, device="sim:0")
    stream = torch.Stream("sim:0")
    stream.wait_stream(current("sim:0"))
    with stream:
        y = x * 2
    del x
    (found,) = reported()
    assert "memory of the default stream of sim:0 was freed (thread MainThread) while aten::mul on stream" in found
    assert "record_stream" in found
    del y


def test_threads_are_named():
    x = torch.ones(3, device="sim:0")
    thread = threading.Thread(target=x.to, args=("sim:1",), name="second")
    thread.start()
    thread.join()
    with torch.Stream("sim:0"):
        x.zero_()
    del x
    assert any(
        "(thread MainThread) writes over what copy from sim:0 to sim:1 on the default stream of sim:0 (thread second)"
        in found
        for found in reported()
    )


def test_races_of_the_threads_of_autograd():
    class Elsewhere(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.Stream("sim:1") as stream:
                result = gradient * 2
            current("sim:1").wait_stream(stream)
            return result

    x = torch.ones(3, device="sim:1", requires_grad=True)
    Elsewhere.apply(x).sum().backward()
    found = reported()
    assert any("aten::mul on stream" in f and "reads what" in f and "thread pt_autograd_1" in f for f in found), found


def test_pinned_memory_has_nothing_before_the_host_has_waited():
    x = torch.ones(3, device="sim:0")
    host = torch.zeros(3, pin_memory=True)
    assert host.is_pinned()
    host.copy_(x, non_blocking=True)
    assert host.isnan().all()
    expected = "aten::isnan on the host (thread MainThread) reads pinned memory before copy to the host on the default"
    assert any(found.startswith(expected) for found in reported())
    current("sim:0").synchronize()
    assert host.clone().tolist() == [1, 1, 1]


def test_pinned_memory_is_written_too_early():
    host = torch.ones(3, pin_memory=True)
    x = host.to("sim:0", non_blocking=True)
    host.zero_()
    torch.accelerator.synchronize("sim:0")
    (found,) = reported()
    assert "the host wrote into pinned memory before copy from the host on the default stream of sim:0" in found
    assert x.tolist() == [1, 1, 1]


def test_pinned_memory_is_sent_on_before_it_has_arrived():
    x = torch.ones(3, device="sim:0")
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    host.to("sim:1", non_blocking=True)
    (found,) = reported()
    assert "copy from the host on the default stream of sim:1" in found
    assert "reads pinned memory that copy to the host on the default stream of sim:0" in found


def test_pinned_memory_is_received_into_while_it_is_sent():
    x, y = torch.ones(3, device="sim:0"), torch.zeros(3, pin_memory=True)
    z = y.to("sim:1", non_blocking=True)
    y.copy_(x, non_blocking=True)
    (found,) = reported()
    assert "copy to the host on the default stream of sim:0" in found
    assert "writes over pinned memory that copy from the host on the default stream of sim:1" in found
    torch.accelerator.synchronize("sim:0")
    assert (y.tolist(), z.tolist()) == ([1, 1, 1], [0, 0, 0])


def test_pinned_memory_is_used_again_and_again():
    x, host = torch.zeros(3, device="sim:0"), torch.zeros(3, pin_memory=True)
    for _ in range(3):  # in one stream, which is order enough
        x.add_(1)
        host.copy_(x, non_blocking=True)
        x.copy_(host, non_blocking=True)
        host.copy_(x.mul(2), non_blocking=True)
    torch.accelerator.synchronize("sim:0")
    assert host.tolist() == [6, 6, 6]


def sent(x, target, without=None):
    """A copy on streams of its own, and the four things it needs."""
    out, into = torch.Stream(x.device), torch.Stream(target)
    if without != "the copy waits":
        out.wait_event(current(x.device).record_event())
    with out, into:
        y = x.to(target, non_blocking=True)
    if without != "record_stream at the source":
        x.record_stream(out)
    if without != "the receiver waits":
        current(target).wait_event(into.record_event())
    if without != "record_stream at the target":
        y.record_stream(current(target))
    return y


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        (None, None),
        ("the copy waits", "copy from sim:0 to sim:1 on stream .* reads what aten::fill_"),
        ("the receiver waits", "aten::mul on the default stream of sim:1 .* reads what copy from sim:0 to sim:1"),
        ("record_stream at the source", "memory of the default stream of sim:0 was freed .* while copy from sim:0"),
        ("record_stream at the target", "memory of stream .* of sim:1 was freed .* while aten::mul on the default"),
    ],
)
def test_each_part_of_a_copy_is_needed(without, expected):
    x = torch.ones(3, device="sim:0")
    y = sent(x, "sim:1", without)
    z = y * 2
    del x, y
    found = reported()
    assert z.tolist() == [2, 2, 2]
    assert bool(found) == (expected is not None), found
    if expected:
        assert any(re.search(expected, f) for f in found), found


# --- no races: a report fails these tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wait_stream", "wait_event", "stream", "event", "device", "query"])
def test_streams_that_wait(how):
    x = torch.ones(3, device="sim:0")
    stream = torch.Stream("sim:0")
    event = current("sim:0").record_event()
    match how:
        case "wait_stream":
            stream.wait_stream(current("sim:0"))
        case "wait_event":
            stream.wait_event(event)
        case "stream":
            current("sim:0").synchronize()
        case "event":
            event.synchronize()
        case "device":
            torch.accelerator.synchronize("sim:0")
        case "query":
            assert event.query()
    with stream:
        y = x * 2
    x.record_stream(stream)
    del x
    current("sim:0").wait_stream(stream)
    y.record_stream(current("sim:0"))
    assert (y + 1).tolist() == [3, 3, 3]


def test_a_model_over_two_devices_learns_like_one():
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def trained(a, b):
        f, s = copy.deepcopy(first).to(a), copy.deepcopy(second).to(b)
        optimizer = torch.optim.SGD([*f.parameters(), *s.parameters()], 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            s(f(x.to(a)).relu().to(b, non_blocking=True)).square().mean().backward()
            optimizer.step()
        return [p.detach().cpu() for p in (*f.parameters(), *s.parameters())]

    for found, expected in zip(trained("sim:0", "sim:1"), trained("cpu", "cpu"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch 2.11 says it of copies to other devices
def test_replicas_in_threads():
    torch.manual_seed(0)
    module, x = nn.Linear(8, 8).to("sim:0"), torch.randn(4, 8, device="sim:0")
    count = torch.accelerator.device_count()
    inputs = [part.to(f"sim:{i}", non_blocking=True) for i, part in enumerate(x.chunk(count))]
    replicas = [[p.to(f"sim:{i}", non_blocking=True) for p in module.parameters()] for i in range(count)]
    outputs = [None] * count

    def run(i):
        outputs[i] = nn.functional.linear(inputs[i], *replicas[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gathered = torch.cat([y.to("sim:0", non_blocking=True) for y in outputs])
    gathered.square().sum().backward()
    assert torch.allclose(gathered, module(x))
    assert module.weight.grad.isfinite().all()


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.GroupNorm(2, 4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril().logical_not()
        y = self.layer(self.embedding(x), src_mask=mask)
        return self.head(y[torch.arange(len(x), device=x.device), -1])


def train(module, x, optimizer, device):
    module = copy.deepcopy(module).to(device)
    optimizer = optimizer(module.parameters())
    target = (torch.arange(len(x)) % 5).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x.to(device)), target).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
        lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
        lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    ],
    ids=["AdamW", "fused Adam", "SGD"],
)
def test_training_has_the_bits_of_the_cpu(optimizer):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        for module, x in (
            (Convolutions(), torch.randn(6, 3, 8, 8)),
            (Language(), torch.randint(5, (6, 7))),
        ):
            assert_same(train(module, x, optimizer, "sim:1"), train(module, x, optimizer, "cpu"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_float16_with_a_scaler():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)).to("sim:0")
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("sim", init_scale=2.0**40)
    x = torch.randn(32, 8, device="sim:0")
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("sim", torch.float16):
            hidden = module[0](x)
            assert hidden.dtype == torch.float16
            normal = module[1](hidden)
            assert normal.dtype == torch.float32
            loss = nn.functional.mse_loss(module[2](normal), x[:, :1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40  # it was too large for the first steps
    assert losses[-1] < losses[0]


def test_checkpointing_draws_the_same_again():
    x = torch.ones(64, device="sim:1", requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: nn.functional.dropout(x, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


# --- time -------------------------------------------------------------------------------------------------------------

SECONDS = 0.2
SLACK = 0.1  # machines are busy


class Watch:
    """Simulated time since it was made."""

    def __init__(self):
        self.start = self.now(torch.Stream("sim:0"))

    def now(self, stream):
        event = torch.Event(stream.device, enable_timing=True)
        event.record(stream)
        return event

    def __call__(self, stream):
        """Seconds until the stream will have done all it has."""
        return self.seconds(self.now(stream))

    def seconds(self, end):
        end.synchronize()
        return self.start.elapsed_time(end) / 1e3


def test_streams_run_beside_each_other():
    x = torch.ones(3, device="sim:0")
    first, second = torch.Stream("sim:0"), torch.Stream("sim:0")
    torch.accelerator.synchronize("sim:0")
    watch = Watch()
    with first:
        y = accelerators.spend(x, SECONDS)
    with second:
        z = accelerators.spend(x, SECONDS)
    assert not first.query()
    third = torch.Stream("sim:0")
    third.wait_stream(first)
    third.wait_stream(second)
    assert SECONDS <= watch(third) < 2 * SECONDS
    del y, z


def test_a_copy_is_hidden_behind_work_where_it_has_streams_of_its_own():
    x = torch.ones(3, device="sim:0")
    accelerators.set_link(0, SECONDS)
    watch = Watch()
    y = sent(x, "sim:1")
    z = accelerators.spend(x, SECONDS)
    assert SECONDS <= watch(current("sim:0")) < SECONDS + SLACK
    assert SECONDS <= watch(current("sim:1")) < SECONDS + SLACK
    del y, z


def test_a_copy_on_the_current_streams_waits_for_both():
    x, y = torch.ones(3, device="sim:0"), torch.ones(3, device="sim:1")
    accelerators.set_link(0, SECONDS)
    watch = Watch()
    z = accelerators.spend(y, SECONDS)  # has nothing to do with the copy
    x.to("sim:1", non_blocking=True)
    assert watch(current("sim:0")) >= 2 * SECONDS
    assert watch(current("sim:1")) >= 2 * SECONDS
    del z


def test_a_link_has_one_copy_at_a_time_in_each_direction():
    x, y = torch.ones(1000, device="sim:0"), torch.ones(1000, device="sim:1")
    accelerators.set_link(4000 / SECONDS, 0)
    torch.accelerator.synchronize("sim:0")
    torch.accelerator.synchronize("sim:1")
    watch = Watch()
    ends = []
    for tensor, target in ((x, "sim:1"), (x, "sim:1"), (y, "sim:0")):
        with torch.Stream(tensor.device) as stream, torch.Stream(target):
            tensor.to(target, non_blocking=True)
        ends.append(watch.now(stream))
    first, second, back = (watch.seconds(end) for end in ends)
    assert SECONDS <= first < SECONDS + SLACK
    assert 2 * SECONDS <= second < 2 * SECONDS + SLACK
    assert SECONDS <= back < SECONDS + SLACK
    reported()  # the copies were freed at once


def test_one_link_may_be_slower_than_others():
    accelerators.set_link(0, SECONDS, source=0, target=1)
    x, y = torch.ones(3, device="sim:0"), torch.ones(3, device="sim:1")
    watch = Watch()
    y.to("sim:0", non_blocking=True)
    assert watch(current("sim:0")) < SLACK
    x.to("sim:1", non_blocking=True)
    assert watch(current("sim:1")) >= SECONDS
    with pytest.raises(ValueError, match=r"expected the index of one of .* was given 99"):
        accelerators.set_link(0, 0, source=99)
    with pytest.raises(ValueError, match="of 0 or more, was given -1 and 0"):
        accelerators.set_link(-1, 0)


def test_what_the_host_waits_for_is_counted():
    module = nn.Linear(8, 8).to("sim:0")
    x, target = torch.randn(4, 8).pin_memory(), torch.randn(4, 8, device="sim:1")
    accelerators.clear()
    loss = nn.functional.mse_loss(module(x.to("sim:0", non_blocking=True)).to("sim:1"), target)
    loss.backward()
    counts = accelerators.counts()
    assert counts["host_waits"] == 0
    assert counts["crossings"] == 2
    assert counts["copies"] == 3
    assert counts["kernels"] >= 4
    loss.item()
    (target > 0).nonzero()
    target[target > 0]
    torch.accelerator.synchronize("sim:1")
    assert accelerators.waits() == {"item": 1, "aten::nonzero": 1, "aten::index": 1, "device": 1}


def test_the_page_lists_all_that_the_host_waits_in():
    x = torch.ones(4, device="sim:0")
    mask, repeats = x > 0, torch.ones(4, dtype=torch.int64).to("sim:0")
    accelerators.clear()
    x.cpu()
    x.copy_(torch.zeros(4))
    x.sum().item()
    current("sim:0").synchronize()
    event = torch.Event("sim:0")
    event.record()
    event.synchronize()
    torch.accelerator.synchronize("sim:0")
    mask.nonzero()
    x.masked_select(mask)
    torch.equal(x, x)
    torch.ops.aten._unique2(x)
    torch.unique(x, dim=0)
    torch.unique_consecutive(x)
    torch.repeat_interleave(repeats)
    x[mask]
    page = (Path(__file__).parent.parent / "docs" / "simulated_accelerators.md").read_text()
    listed = set(re.findall("`([^`]+)`", page.split("The host waits in\n")[1].split("\n\nThey are built")[0]))
    assert set(accelerators.waits()) <= listed
    assert {name for name in listed if name.startswith("aten::")} <= set(accelerators.waits())
    assert len(accelerators.waits()) == 14


def test_wrong_settings():
    with pytest.raises(ValueError, match="expected a capacity of 0 to 9223372036854775807 bytes, was given -1"):
        accelerators.set_capacity(0, -1)
    with pytest.raises(ValueError, match="expected a bandwidth and a latency of 0 or more, was given nan and 0"):
        accelerators.set_link(float("nan"), 0)
    with pytest.raises(ValueError, match="expected a bandwidth and a latency of 0 or more, was given 1 and inf"):
        accelerators.set_link(1, float("inf"))


# --- memory, devices, random numbers ----------------------------------------------------------------------------------


def test_a_device_runs_out_of_its_memory():
    accelerators.set_capacity(1, torch.accelerator.memory_allocated(1) + 10_000)
    x = torch.ones(2000, device="sim:1")
    with pytest.raises(
        torch.OutOfMemoryError, match=r"out of memory: sim:1 holds \d+ of \d+ bytes and was asked for 8192"
    ):
        x + 1
    torch.ones(2000, device="sim:0")
    del x
    torch.ones(2000, device="sim:1")


def test_memory_is_counted():
    before = torch.accelerator.memory_allocated(0)
    torch.accelerator.reset_peak_memory_stats(0)
    x = torch.ones(1000, device="sim:0")
    y = x + 1
    del x
    assert torch.accelerator.memory_allocated(0) - before == 4096
    assert torch.accelerator.max_memory_allocated(0) - before == 2 * 4096
    free, total = torch.accelerator.get_memory_info(0)
    assert total - free == torch.accelerator.memory_allocated(0)
    assert torch.get_device_module("sim").get_device_properties(0).total_memory == total
    del y


def test_tensors_of_different_devices():
    x = torch.ones(3, device="sim:0")
    with pytest.raises(
        RuntimeError, match=r"same device, but found at least two devices, sim:0 and sim:1! \(in aten::add"
    ):
        x + torch.ones(3, device="sim:1")
    with pytest.raises(RuntimeError, match="same device, but found at least two devices, sim:0 and cpu!"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="there is no sim:99: this process has"):
        torch.ones(3, device="sim:99")
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_a_device_without_a_number_is_the_current_one():
    torch.accelerator.set_device_index(1)
    try:
        assert torch.rand(3, device="sim").device == torch.device("sim:1")
        assert torch.get_device_module("sim").current_device() == 1
    finally:
        torch.accelerator.set_device_index(0)
    with torch.Stream("sim:1"):
        assert torch.accelerator.current_device_index() == 1
    assert torch.rand(3, device="sim").device == torch.device("sim:0")


def test_draws_depend_on_seed_and_offset_alone():
    sim = torch.get_device_module("sim")
    torch.manual_seed(7)
    state = sim.get_rng_state(1)
    assert state.numel() == 16
    x = torch.rand(100, device="sim:1")
    y = torch.nn.functional.dropout(x, 0.5)
    assert sim.default_generators[1].get_offset() == 8
    assert sim.default_generators[0].get_offset() == 0
    assert not torch.equal(x, torch.rand(100, device="sim:1"))
    sim.set_rng_state(state, 1)
    assert torch.equal(x, torch.rand(100, device="sim:1"))
    assert torch.equal(y, torch.nn.functional.dropout(x, 0.5))
    generator = torch.Generator("sim:1").manual_seed(7)
    assert torch.equal(x, torch.rand(100, device="sim:1", generator=generator))


def test_others_cannot_be_started():
    count = torch.accelerator.device_count()
    accelerators.start(count, torch.accelerator.get_memory_info(0)[1])
    with pytest.raises(RuntimeError, match=f"this process has {count} simulated accelerators .* asked for {count + 1}"):
        accelerators.start(count + 1)
    with pytest.raises(ValueError, match="expected 1 to 127 devices"):
        accelerators.start(0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_cells_of_their_own(kind):
    torch.manual_seed(0)
    module = kind(6, 5, num_layers=2, batch_first=True)
    ours = copy.deepcopy(module).to("sim:1")
    x = torch.randn(3, 4, 6)
    for m, device in ((module, "cpu"), (ours, "sim:1")):
        m(x.to(device))[0].square().sum().backward()
    for p, q in zip(module.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad.cpu(), p.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.to("sim:1"))[0].cpu(), module(x)[0])


def test_attention_takes_the_kernel_that_the_cpu_takes():
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    ours = q.detach().to("sim:0").requires_grad_()
    for x in (q, ours):
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        assert "FlashAttentionForCpu" in type(y.grad_fn).__name__
        y.square().sum().backward()
    assert torch.equal(q.grad, ours.grad.cpu())


def test_a_thread_is_named_whatever_builtins_the_frame_has_that_launches():
    """An import would need them; where memory is freed, its error could only end the process."""
    x, found = torch.ones(3, device="sim:0"), []

    def launch():
        found.append(eval("neg(x)", {"__builtins__": {}, "neg": torch.neg, "x": x}))

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert found[0].tolist() == [-1.0, -1.0, -1.0]
