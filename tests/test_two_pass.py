"""``two_pass=True``: a loss over the whole mini-batch without a boundary of every micro-batch, to the same bits."""

import gc
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, Island, assert_same, every_keep, gradients, linears, make_pipe
from test_buffers import Counter
from test_clip import SMALL
from test_clip import batch as clip_batch
from test_exact import data, net
from test_memory import BOUNDARY, CHUNKS, ROWS, WIDTH, booked_pipe, python_tensor_bytes, reference_counting_alone
from test_train_step import LearnedLoss
from torch import nn

from gpipe import Action, Kind, Schedule, ScheduleError, is_checkpointing, is_recomputing, record, schedules
from gpipe.models.clip import clip
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.schedules import BUILDERS
from gpipe.two_pass import last_first, passes, window


def cross_entropy(output, target):
    return F.cross_entropy(output.transpose(1, 2), target)


def mean_square(output, target):
    return ((output - target) ** 2).mean()


def pairs(rows):
    images, tokens, end = clip_batch(rows)
    return images, tokens, end % 7


def both(make, inputs, targets, loss_fn=mean_square, balance=None, steps=2, **options):
    """Gradients and buffers after some steps in one pass, and in two; ``inputs`` get gradients too."""
    found = []
    schedule = options.pop("schedule", None)
    for two_pass in (False, True):
        torch.manual_seed(1)
        module = make()
        pipe = make_pipe(module, balance, **options)
        x = inputs.clone().requires_grad_(inputs.is_floating_point())
        loss = {}
        for step in range(steps):
            loss[f"loss {step}"] = pipe.train_step(
                x, targets, loss_fn, two_pass=two_pass, schedule=schedule if two_pass else None
            )
        assert pipe.step == steps
        found.append(gradients(module) | {"x": x.grad} | loss | {k: b.clone() for k, b in module.named_buffers()})
    return found


def assert_both(*args, **options):
    one, two = both(*args, **options)
    assert_same(two, one)
    return two


# --- the schedules of the passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_the_second_pass_begins_with_the_last_micro_batch(name):
    schedule = last_first(BUILDERS[name](stages=4, micro_batches=6)).validate()
    assert last_first(schedule) == schedule
    for actions in schedule.workers:
        for k in {a.stage for a in actions}:
            for kind in ("B", "I", "W"):
                order = [a.micro_batch for a in actions if a.kind == kind and a.stage == k]
                assert order in ([], [5, 4, 3, 2, 1, 0])
    first, second = passes(schedule)
    assert second == schedule.workers
    for actions in first:
        assert {a.kind for a in actions} == {Kind.FORWARD}
        for k in {a.stage for a in actions}:
            assert [a.micro_batch for a in actions if a.stage == k] == [0, 1, 2, 3, 4, 5]


def test_one_micro_batch_has_one_order():
    for build in BUILDERS.values():
        schedule = build(stages=2, micro_batches=1)
        assert last_first(schedule) == schedule


# --- the same bits ----------------------------------------------------------------------------------------------------


@every_keep
@pytest.mark.parametrize(
    ("schedule", "balance"),
    [
        (name, balance)
        for name in (None, *BUILDERS)
        for balance in ([6], [4, 2], [1, 2, 1, 2])
        if name != "interleaved_one_f_one_b" or len(balance) > 1
    ],
)
def test_gradients_are_those_of_one_pass_to_the_last_bit(schedule, balance, keep):
    x, y = data(11)
    assert_both(lambda: net(0.1), x, y, cross_entropy, balance, schedule=schedule, checkpoint=keep, chunks=4, steps=2)


def test_a_ready_schedule_runs_as_it_is():
    ready = schedules.one_f_one_b(stages=3, micro_batches=4)
    pipe = make_pipe(linears(), chunks=4)
    x = torch.randn(8, 4)
    pipe.train_step(x, x, mean_square, schedule=ready, two_pass=True)
    for spans, actions in zip(pipe.timeline.workers, ready.workers, strict=True):
        assert [a._replace(kind=Kind.RECOMPUTE) if a.kind == Kind.FORWARD else a for a in actions] == [
            span.action for span in spans[4:]
        ]


@every_keep
def test_a_loss_with_parameters_is_called_once(keep):
    found = []
    for two_pass in (False, True):
        torch.manual_seed(1)
        module, loss_fn = linears(), LearnedLoss()
        make_pipe(module, checkpoint=keep).train_step(torch.ones(6, 4), torch.ones(6, 4), loss_fn, two_pass=two_pass)
        assert loss_fn.calls == 1
        found.append(gradients(module) | gradients(loss_fn))
    assert_same(*found)
    assert found[0]["scale"] != 0


@every_keep
def test_clip(keep):
    inputs = pairs(7)
    found = []
    for two_pass in (False, True):
        torch.manual_seed(1)
        model, loss_fn = clip(**SMALL), ContrastiveLoss()
        cells = len(model.cells())
        pipe = make_pipe(model, [cells // 2, cells - cells // 2], 3, keep)
        loss = pipe.train_step(inputs, None, loss_fn, two_pass=two_pass)
        found.append(gradients(model) | gradients(loss_fn) | {"loss": loss})
        assert all(value is not None for value in found[-1].values())
    assert_same(found[1], found[0])
    assert found[0]["logit_scale"] != 0


def with_everything(y):
    return {"y": y, "none": None, "positive": y > 0, "apart": y.detach(), "name": "a", "unused": y * 2}


def of_everything(tree, target):
    assert tree["none"] is None
    assert tree["name"] == "a"
    assert not tree["positive"].requires_grad
    return mean_square(tree["y"] * tree["positive"] + tree["apart"], target)


@every_keep
def test_outputs_of_every_kind(keep):
    def make():
        return nn.Sequential(nn.Linear(4, 4), Apply(with_everything), Apply(lambda tree, f: tree, nn.Tanh()))

    assert_both(make, torch.randn(7, 4), torch.randn(7, 4), of_everything, checkpoint=keep)


class Noticed(torch.autograd.Function):
    """Fills a gradient that did not come with zeros, as Functions do unless told otherwise."""

    @staticmethod
    def forward(ctx, x, w):
        return x * w

    @staticmethod
    def backward(ctx, g):
        return g, g.sum(0)


# A backward that begins at an output without gradient would give its parameters zeros instead of None.
def test_an_output_that_the_loss_does_not_use_gets_no_gradient():
    def make():
        module = nn.Sequential(nn.Linear(4, 4), Apply(lambda x, a, b: (Noticed.apply(x, a.bias), b(x))))
        module[1].parts.extend([nn.Linear(1, 4), nn.Linear(4, 4)])
        return module

    two = assert_both(make, torch.randn(6, 4), None, lambda out, _: out[1].square().mean())
    assert two["1.parts.0.bias"] is None


def test_a_frozen_start_and_a_frozen_net():
    for frozen in (2, 4):

        def make(frozen=frozen):
            module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
            module[:frozen].requires_grad_(False)
            return module

        for keep in ("always", "never"):
            torch.manual_seed(1)
            found = []
            for two_pass in (False, True):
                torch.manual_seed(1)
                module, loss_fn = make(), LearnedLoss()
                make_pipe(module, checkpoint=keep).train_step(
                    torch.ones(6, 4), torch.ones(6, 4), loss_fn, two_pass=two_pass
                )
                found.append(gradients(module) | gradients(loss_fn) | module.state_dict())
            assert_same(*found)


@every_keep
def test_tied_parameters(keep):
    def make():
        module = linears()
        module[2].weight = module[0].weight
        return module

    assert_both(make, torch.randn(7, 4), torch.randn(7, 4), checkpoint=keep)


def test_autocast_is_the_callers_in_both_forwards():
    def make():
        return nn.Sequential(nn.Linear(4, 4), Island(), nn.Linear(4, 4))

    with torch.autocast("cpu", torch.bfloat16):
        assert_both(make, torch.randn(6, 4), torch.randn(6, 4))


def test_gradients_add_up_and_hooks_run_once():
    module = linears()
    pipe = make_pipe(module)
    x, seen = torch.randn(6, 4), []
    module[0].weight.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        pipe.train_step(x, x, mean_square, two_pass=True)
    assert len(seen) == 2
    assert torch.equal(module[0].weight.grad, seen[0] + seen[1])


def test_fewer_rows_than_chunks_and_no_stages():
    for rows in (1, 2):
        assert_both(linears, torch.randn(rows, 4), torch.randn(rows, 4))
    x = torch.randn(3, 4, requires_grad=True)
    make_pipe(nn.Sequential(), []).train_step(x, torch.zeros(3, 4), mean_square, two_pass=True)
    assert x.grad is not None


# --- the second forward repeats the first -----------------------------------------------------------------------------


@every_keep
@pytest.mark.parametrize("how", ["in place", "assigned", "data"])
def test_buffers_change_once(how, keep):
    def make():
        return nn.Sequential(nn.Linear(4, 4), Counter(how), nn.Tanh(), Counter(how))

    two = assert_both(make, torch.randn(6, 4), torch.randn(6, 4), checkpoint=keep)
    assert two["1.calls"] == 6  # two steps of three micro-batches


@every_keep
@pytest.mark.parametrize("deferred", [False, True])
def test_batch_norm(deferred, keep):
    def make():
        return nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4)
        )

    two = assert_both(
        make, torch.randn(11, 4), torch.randn(11, 4), checkpoint=keep, chunks=4, deferred_batch_norm=deferred
    )
    assert two["1.num_batches_tracked"] == (2 if deferred else 8)


@every_keep
def test_spectral_norm(keep):
    def make():
        norm = nn.utils.parametrizations.spectral_norm
        return nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), norm(nn.Linear(5, 4), n_power_iterations=2))

    assert_both(make, torch.randn(7, 4), torch.randn(7, 4), checkpoint=keep)


class Draws(nn.Module):
    """Multiplies by draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * torch.rand(x.shape, generator=self.generator)


@every_keep
def test_generators_that_cells_bring(keep):
    made = []

    def make():
        made.append(nn.Sequential(Draws(), nn.Linear(4, 4), Draws()))
        return made[-1]

    assert_both(make, torch.randn(7, 4), torch.randn(7, 4), checkpoint=keep)
    one, two = made
    for i in (0, 2):
        assert torch.equal(one[i].generator.get_state(), two[i].generator.get_state())


def test_cells_may_ask_which_forward_runs():
    seen = {}
    for keep in ("always", "never"):
        told = seen[keep] = []
        module = nn.Sequential(
            nn.Linear(4, 4), Apply(lambda x, told=told: told.append((is_checkpointing(), is_recomputing())) or x)
        )
        make_pipe(module, [2], 2, keep).train_step(torch.ones(2, 4), torch.ones(2, 4), mean_square, two_pass=True)
    first, dropping, last = (True, False), (True, True), (False, True)
    assert seen == {"always": [first, first, dropping, last, dropping, last], "never": [first, first, last, last]}


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_nothing_but_features_is_held_when_the_loss_is_computed():
    held = {}

    def loss_fn(output, target):
        gc.collect()
        held["loss"] = python_tensor_bytes([x, y, output])
        return mean_square(output, target)

    x, y = torch.randn(2, ROWS, WIDTH)
    with reference_counting_alone():
        for keep in (0, CHUNKS):
            pipe, ledger = booked_pipe(keep)
            before = python_tensor_bytes([x, y])
            pipe.train_step(x, y, loss_fn, two_pass=True)
            assert held["loss"] - before <= 64, keep
            assert not any(ledger.live.values())
            pipe.train_step(x, y, loss_fn)
            assert held["loss"] - before >= (3 * CHUNKS * BOUNDARY if keep == 0 else 0)
            pipe.zero_grad()


def test_few_micro_batches_are_under_way():
    pipe, ledger = booked_pipe(CHUNKS)
    x, y = torch.randn(2, ROWS, WIDTH)
    pipe.train_step(x, y, mean_square, two_pass=True)
    one = 2 * 2 * BOUNDARY
    assert [ledger.peak[k] for k in range(3)] == [3 * one, 2 * one, one]  # of CHUNKS = 4 in one pass


def test_no_stage_runs_away_from_the_next():
    begun, ahead = [], []

    def fast(x):
        begun.append(None)
        return x

    def slow(x):
        time.sleep(0.005)
        ahead.append(len(begun) - len(ahead))
        return x

    pipe = make_pipe(nn.Sequential(Apply(fast), nn.Linear(4, 4), Apply(slow)), [2, 1], 12, "never")
    x = torch.ones(12, 4)
    pipe.train_step(x, x, mean_square, two_pass=True)
    assert len(ahead) == 24
    assert max(ahead) <= 3  # one that computes, two ahead of it


def test_a_window_needs_one_order_and_a_stage_a_worker():
    assert window(last_first(schedules.one_f_one_b(stages=3, micro_batches=5))) == 3
    assert window(schedules.gpipe(stages=4, micro_batches=2)) == 4
    assert window(schedules.interleaved_one_f_one_b(stages=4, micro_batches=4)) is None
    crossed = [[Action(k, kind, m) for kind in "FB" for m in order] for k, order in enumerate([(0, 1), (1, 0)])]
    crossed = Schedule("crossed", 2, 2, tuple(crossed)).validate()
    assert window(crossed) is None
    x = torch.ones(4, 4)
    make_pipe(linears(2), chunks=2).train_step(x, x, mean_square, schedule=crossed, two_pass=True)


def test_outputs_of_the_second_pass_are_let_go():
    made, alive = [], []

    def note(x):
        y = x + 1
        alive.append(sum(storage() is not None for storage in made))
        made.append(weakref.ref(y.untyped_storage()))
        return y

    with reference_counting_alone():
        pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Apply(note)), [2], 4, "never")
        pipe.train_step(torch.ones(8, 4), torch.ones(8, 4), mean_square, two_pass=True)
    assert alive == [0, 1, 2, 3, *[0] * 4]


@pytest.mark.parametrize("keep", ["always", "never"])
def test_stage_0_of_clip_holds_less(keep):
    inputs = pairs(24)
    peaks = []
    for two_pass in (False, True):
        torch.manual_seed(1)
        model, loss_fn = clip(**SMALL), ContrastiveLoss()
        cells = len(model.cells())
        pipe = make_pipe(model, [cells // 2, cells - cells // 2], 24, keep)
        with record(pipe, memory=True) as timeline:
            pipe.train_step(inputs, None, loss_fn, two_pass=two_pass)
        peaks.append(timeline.peak_bytes[0] - timeline.memory[0].bytes[0])
    assert peaks[1] < 0.75 * peaks[0], peaks


def test_the_timeline_shows_both_passes():
    pipe = make_pipe(linears(2), chunks=3, checkpoint="never")
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), mean_square, two_pass=True)
    told = [" ".join(str(span.action) for span in spans) for spans in pipe.timeline.workers]
    assert told == [
        "0F0 0F1 0F2 0R2 0R1 0B2 0R0 0B1 0B0",
        "1F0 1F1 1F2 1R2 1B2 1R1 1B1 1R0 1B0",
    ]
    assert all(share > 0 for share in pipe.timeline.recompute)


# --- what it refuses --------------------------------------------------------------------------------------------------


def step(module, x=None, loss_fn=mean_square, **options):
    x = torch.ones(6, 4) if x is None else x
    return make_pipe(module, checkpoint="never").train_step(x, torch.ones(6, 4), loss_fn, two_pass=True, **options)


def test_bad_input():
    with pytest.raises(ValueError, match="two_pass=True is for a loss over the whole mini-batch; with loss_over='micr"):
        step(linears(), loss_over="micro_batch")
    with pytest.raises(TypeError, match="two_pass must be True or False, got 2"):
        make_pipe(linears()).train_step(torch.ones(6, 4), torch.ones(6, 4), mean_square, two_pass=2)
    with pytest.raises(ScheduleError, match="or two_pass=True"):
        make_pipe(linears()).train_step(torch.ones(6, 4), torch.ones(6, 4), mean_square, schedule="one_f_one_b")


def test_an_error_in_the_second_pass_is_located_and_leaves_no_gradients():
    def fail(x):
        if is_recomputing():
            raise ValueError("boom")
        return x

    module = nn.Sequential(nn.Linear(4, 4), Counter("in place"), Apply(fail))
    pipe = make_pipe(module, [1, 2])
    with pytest.raises(ValueError, match="boom") as raised:
        pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), mean_square, two_pass=True)
    assert "stage 1 (cells 1 to 2, cpu), cell 2 (Apply), micro-batch 2, action 1R2" in raised.value.__notes__[0]
    assert all(p.grad is None for p in module.parameters())
    assert module[1].calls == 3


def test_an_error_in_the_first_pass_ends_stages_that_wait_for_the_next():
    def fail(x):
        raise ValueError("boom")

    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Apply(fail)), chunks=6)
    with pytest.raises(ValueError, match="boom") as raised:
        pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), mean_square, two_pass=True)
    assert "action 1F0" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda x: x[:, :2], r"\[\(2, 2\)\], forward \[\(2, 4\)\]"),
        (torch.detach, r"\[None\], forward \[\(2, 4\)\]"),
    ],
)
def test_a_second_forward_that_differs_is_refused(change, shown):
    module = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: change(x) if is_recomputing() else x))
    with pytest.raises(RuntimeError, match=f"the recompute gave other outputs than forward did .*{shown}"):
        step(module)


def test_what_changes_between_the_passes_is_noticed():
    module = linears()

    def modifies_parameters(output, target):
        with torch.no_grad():
            module[1].weight.add_(1)
        return mean_square(output, target)

    with pytest.raises(RuntimeError, match=r"a parameter was modified .*leave two_pass out"):
        step(module, loss_fn=modifies_parameters)
    x = torch.ones(6, 4)
    with pytest.raises(RuntimeError, match="the inputs were modified in place after the first of two passes"):
        step(linears(), x, loss_fn=lambda output, target: (mean_square(output, target), x.add_(1))[0])
