"""What goes from device to device: the same bits, on streams of its own, and the caller finds everything as it was."""

import copy
import threading

import pytest
import torch
from nets import accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpipe
from gpipe import lanes
from gpipe.skip import pop, skippable, stash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]

TWO = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
FOUR_ROWS = 4


def mlp(cells=4, width=16):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(cells)))


def two_stages(module=None, first=0, **options):
    devices = [accelerator(first), accelerator(first + 1)]
    return gpipe.GPipe(mlp() if module is None else module, [2, 2], devices=devices, chunks=2, **options)


def given(index=0):
    return torch.randn(FOUR_ROWS, 16, device=accelerator(index))


# --- the same memory layout there ------------------------------------------------------------------------------------


def layouts(tensors):
    return [(t.shape, t.stride(), t.data_ptr() % 512, t.untyped_storage().data_ptr()) for t in tensors]


def views(x):
    """Of x (8, 16): tensors that kernels may sum in another order than contiguous ones, alone and together."""
    return {
        "a part of every row": [x[:, 1:9]],
        "one column, expanded": [x[:, :1].expand(-1, 16)],
        "transposed": [x.t()],
        "a part that starts late": [x.view(-1)[3:100]],
        "a few elements far apart": [x[:, ::15]],
        "two halves of one tensor": [x[:4], x[4:]],
        "a tensor and its view": [x, x[:, 2:5]],
        "a row": [x[2:3]],
        "nothing": [x[:0]],
    }


@TWO
@pytest.mark.parametrize("name", views(torch.zeros(8, 16)))
def test_copies_keep_strides_alignment_and_overlaps(name):
    sent = views(torch.randn(8, 16, device=accelerator(0)))[name]
    arrived = lanes.cross(sent, accelerator(0), accelerator(1)).landed()
    assert all(t.device == accelerator(1) for t in arrived)
    assert [t.cpu().tolist() for t in arrived] == [t.cpu().tolist() for t in sent]
    shared = [len({entry[3] for entry in layouts(tensors)}) for tensors in (sent, arrived)]
    assert shared[0] == shared[1]
    assert [entry[:3] for entry in layouts(arrived)] == [entry[:3] for entry in layouts(sent)]


class OwnTensor(torch.Tensor):
    pass


@TWO
def test_other_values_and_tensors_of_other_devices_stay():
    here, there = accelerator(0), accelerator(1)
    mask, own = torch.ones(3, device="cpu"), torch.arange(3.0, device=here).as_subclass(OwnTensor)
    values = lanes.cross([mask, "text", None, own], here, there).landed()
    assert values[0] is mask
    assert values[1:3] == ["text", None]
    assert (type(values[3]), values[3].device) == (OwnTensor, there)
    assert values[3].tolist() == [0.0, 1.0, 2.0]


class Stashes(nn.Module):
    def forward(self, x):
        yield stash("early", x[:, ::2])
        return x.tanh()


class Pops(nn.Module):
    def forward(self, x):
        early = yield pop("early")
        return torch.cat([x[:, :8] + early, x[:, 8:]], 1)


def trained(devices, balance):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), skippable(stash=["early"])(Stashes)(), nn.Linear(16, 16)]
    module = nn.Sequential(*layers, nn.Linear(16, 16), skippable(pop=["early"])(Pops)(), nn.Linear(16, 16))
    module[5].weight = module[0].weight
    pipe = gpipe.GPipe(module, balance, devices=devices, chunks=4, seed=1)
    optimizer = torch.optim.Adam(pipe.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(7, 16, generator=torch.Generator().manual_seed(step))
        pipe.train_step(x, x.sin(), nn.functional.mse_loss, "micro_batch", schedule="one_f_one_b")
        optimizer.step()
    return {name: value.cpu() for name, value in pipe.state_dict().items()}


@TWO
def test_skips_and_tied_parameters_have_the_same_bits_on_one_device_and_on_several():
    expected = trained([accelerator()], [6])
    count = torch.accelerator.device_count()
    for devices in ([0, 1, 0], [1, 0, 1], [k % count for k in range(3)]):
        found = trained([accelerator(i) for i in devices], [2, 2, 2])
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- the caller's device and streams ---------------------------------------------------------------------------------


@TWO
@pytest.mark.parametrize("balance", [[4], [2, 2]])
def test_the_callers_current_device_stays(balance):
    devices = [accelerator(1), accelerator(0)][: len(balance)]
    pipe = gpipe.GPipe(mlp(), balance, devices=devices, chunks=2)
    torch.accelerator.set_device_index(0)
    pipe(given(1)).sum().backward()
    assert torch.accelerator.current_device_index() == 0
    pipe.train_step(given(1), given(0), nn.functional.mse_loss, "micro_batch", schedule="one_f_one_b")
    assert torch.accelerator.current_device_index() == 0


class Counts(nn.Module):
    def forward(self, x):
        return x + torch.arange(16.0)


@TWO
def test_under_a_default_device_cells_make_tensors_on_their_own_stages():
    torch.set_default_device(accelerator().type)
    try:
        pipe = gpipe.GPipe(nn.Sequential(Counts(), Counts()), [1, 1], devices=[accelerator(0), accelerator(1)])
        found = pipe(torch.zeros(2, 16))
    finally:
        torch.set_default_device(None)
    assert found.device == accelerator(1)
    assert torch.equal(found.cpu(), 2 * torch.arange(16.0, device="cpu").expand(2, 16))


class MakesItsOwn(nn.Module):
    def forward(self, x):
        return x + torch.ones(16, device=accelerator(0))


@TWO
def test_a_cell_that_makes_a_tensor_on_another_device_is_named():
    pipe = gpipe.GPipe(
        nn.Sequential(nn.Linear(16, 16), MakesItsOwn()), [1, 1], devices=[accelerator(0), accelerator(1)]
    )
    with pytest.raises(RuntimeError, match="same device") as raised:
        pipe(given())
    assert "cell 1 (MakesItsOwn), micro-batch 0, action 1F0" in raised.value.__notes__[0]


class Returns(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, x):
        return x.to(self.place)


@TWO
def test_a_stage_that_returns_a_tensor_on_another_device_is_named_not_the_next():
    first, second = accelerator(0), accelerator(1)
    pipe = gpipe.GPipe(nn.Sequential(Returns("cpu"), nn.Linear(16, 16)), [1, 1], devices=[first, second])
    with pytest.raises(RuntimeError, match="same device") as raised:
        pipe(given())
    named = f"tensors on cpu, not on {second}: stage 0 (cells 0 to 0, {first}) returned"
    assert named in raised.value.__notes__[0]


@TWO
def test_a_stage_may_return_a_tensor_where_the_next_one_is():
    first, second = accelerator(0), accelerator(1)
    module = nn.Sequential(Returns(second), nn.Linear(16, 16))
    assert gpipe.GPipe(module, [1, 1], devices=[first, second])(given()).device == second


@pytest.mark.parametrize("name", ["too high", "mtia", "mps"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name):
    count = torch.accelerator.device_count()
    wrong = f"{accelerator().type}:{count}" if name == "too high" else name
    known = accelerator() if count == 1 else f"{accelerator(0)} to {accelerator(count - 1)}"
    with pytest.raises(IndexError, match=f"devices names {wrong}, and there is {known}: name these, or cpu"):
        gpipe.GPipe(mlp(2), [1, 1], devices=[accelerator(0), wrong])


def streams(count):
    """New streams of the first devices, behind what their current ones have been given."""
    made = [torch.Stream(accelerator(i)) for i in range(count)]
    for stream in made:
        stream.wait_event(torch.accelerator.current_stream(stream.device).record_event())
    return made


def joined(others):
    for stream in others:
        torch.accelerator.current_stream(stream.device).wait_event(stream.record_event())


@TWO
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("where", ["forward elsewhere", "backward elsewhere"])
def test_forward_and_backward_on_different_streams(where, chunks):
    pipe = two_stages()
    pipe.chunks = chunks
    x, weight = given(), torch.ones(16, device=accelerator(), requires_grad=True)

    def gradients(forward, backward):
        pipe.zero_grad()
        weight.grad = None
        h = x * weight
        others = streams(2)
        if forward:
            with others[0], others[1]:
                y = pipe(h)
            joined(others)
            h.record_stream(others[0])
            y.record_stream(torch.accelerator.current_stream(y.device))
            y.sum().backward()
        elif backward:
            loss = pipe(h).sum()
            others = streams(2)
            with others[0], others[1]:
                loss.backward()
                kept = [p.grad * 1 for p in (weight, *pipe.parameters())]
            joined(others)
            for g in kept:
                g.record_stream(torch.accelerator.current_stream(g.device))
            return [g.cpu() for g in kept]
        else:
            pipe(h).sum().backward()
        return [p.grad.cpu() for p in (weight, *pipe.parameters())]

    expected = gradients(False, False)
    found = gradients(where == "forward elsewhere", where == "backward elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_backward_inside_a_backward_is_refused_where_it_would_wait_for_itself():
    devices = [accelerator(0), accelerator(torch.accelerator.device_count() - 1)]
    module = mlp()
    pipe = gpipe.GPipe(module, [2, 2], devices=devices, chunks=2)
    x = given().requires_grad_()
    found = []

    def backward():
        try:
            checkpoint(pipe, x, use_reentrant=True).sum().backward()
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=backward, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert found
    assert "use_reentrant=False" in found[0]
    checkpoint(pipe, x, use_reentrant=False).sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    alone = gpipe.GPipe(copy.deepcopy(module), [4], devices=[accelerator()], chunks=2)
    alone.zero_grad()
    checkpoint(alone, x, use_reentrant=True).sum().backward()  # a single stage's runs where it is called
    for a, b in zip(expected, alone.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.grad.cpu())


# --- every pair of devices is tried ----------------------------------------------------------------------------------


@TWO
def test_a_pipe_over_devices_that_lose_what_they_send_is_refused(monkeypatch):
    lanes._check.cache_clear()
    two_stages()
    monkeypatch.setattr(
        lanes, "copied", lambda leaves, device: tuple(torch.zeros_like(t, device=device) for t in leaves)
    )
    two_stages()  # the same pair, tried already
    lanes._check.cache_clear()
    with pytest.raises(RuntimeError, match=f"what {accelerator(0)} sends to {accelerator(1)} does not arrive"):
        two_stages()


@TWO
def test_only_pairs_that_a_pipe_uses_are_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(lanes, "_check", lambda a, b: tried.append((a.index, b.index)))
    gpipe.GPipe(mlp(3), [1, 1, 1], devices=[accelerator(0), accelerator(1), accelerator(1)])
    assert sorted(tried) == [(0, 1), (1, 0)]
    tried.clear()
    gpipe.GPipe(mlp(2), [1, 1], devices=[accelerator(0), accelerator(0)])
    gpipe.GPipe(mlp(2), [1, 1], devices=["cpu", accelerator(0)])
    assert not tried
