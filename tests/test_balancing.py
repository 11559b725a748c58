from dataclasses import replace

import pytest
import torch
from torch import nn

import gpipe.balancing
from gpipe import GPipe
from gpipe.balancing import memory_bytes
from gpipe.models.unet import unet
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import Infeasible


def uneven():
    """Cells of very different cost and few parameters where the time goes."""
    heavy = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(4)]
    return nn.Sequential(nn.Linear(16, 64), *heavy, nn.Linear(64, 2000), nn.Linear(2000, 8))


def sample(rows=16):
    return torch.randn(rows, 32, 16)


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        (None, None),
        (5, 5),
        ("5", 5),
        ("5 B", 5),
        ("2KB", 2000),
        ("2 KiB", 2048),
        ("1.5GiB", 3 * 2**29),
        ("20 MB", 20_000_000),
        (["1KiB", 3], [1024, 3]),
    ],
)
def test_sizes(given, bytes_):
    assert memory_bytes(given, 2) == bytes_


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ("20 GiBs", ValueError, "such as '20GiB', '500 MB' or a number of bytes, got '20 GiBs'"),
        ("lots", ValueError, "got 'lots'"),
        (0, ValueError, "more than nothing, got 0"),
        (True, TypeError, "got bool True"),
        ([1, 2, 3], ValueError, "gives 3 sizes for 2 stages"),
        ([1, 2.5], TypeError, "got float 2.5"),
        ({1: 2}, TypeError, "one per device, got"),
    ],
)
def test_what_is_no_size_is_refused(given, error, problem):
    with pytest.raises(error, match=problem):
        memory_bytes(given, 2)


def test_a_sample_balances_by_time_and_explains_itself():
    pipe = GPipe(uneven(), devices=["cpu"] * 2, chunks=4, sample=sample())
    assert sum(pipe.balance) == len(pipe) == 7
    assert pipe.balance == list(pipe.partition.balance)
    assert pipe.partition.micro_batches == 4
    assert "2 stages, 4 micro-batches" in str(pipe.partition)
    assert GPipe(uneven(), devices=["cpu"] * 2, chunks=4).partition is None


def in_even_seconds(*arguments, **options):
    """A profile whose seconds no other process disturbs."""
    return [replace(cost, forward_seconds=1.0, backward_seconds=2.0) for cost in profile(*arguments, **options)]


def test_auto_keeps_what_fits_and_a_smaller_limit_keeps_less(monkeypatch):
    monkeypatch.setattr(gpipe.balancing, "profile", in_even_seconds)
    needed = GPipe(uneven(), devices=["cpu"] * 2, chunks=4, sample=sample(), checkpoint="never").partition
    kept = []
    for share in (1.0, 0.75):
        limit = int(share * max(needed.bytes)) + 1
        pipe = GPipe(
            uneven(), devices=["cpu"] * 2, chunks=4, sample=sample(), memory_limit=limit, checkpoint="auto", seed=0
        )
        assert pipe.checkpoint == tuple(pipe.partition.keep)
        assert max(pipe.partition.bytes) <= limit
        pipe(sample()).sum().backward()
        kept.append(sum(pipe.checkpoint))
    assert kept[0] > kept[1]


def test_a_limit_under_which_nothing_fits_says_what_would_do():
    with pytest.raises(Infeasible, match="memory_limit"):
        GPipe(uneven(), devices=["cpu"] * 2, chunks=4, sample=sample(), memory_limit="100KiB")


def test_measuring_changes_neither_module_nor_random_state_nor_threads():
    module, x = uneven(), sample()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    GPipe(module, devices=["cpu"] * 2, sample=x, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"memory_limit": "1GiB"}, "need a sample"),
        ({"checkpoint": "auto"}, "need a sample"),
        ({"checkpoint": "auto", "sample": torch.zeros(4, 3, 16)}, "give memory_limit"),
        ({"balance": [3, 4], "sample": torch.zeros(4, 3, 16)}, "leave one of the two out"),
        ({"devices": ["cpu"] * 9, "sample": torch.zeros(4, 3, 16)}, "name at most 7"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        GPipe(uneven(), **{"devices": ["cpu"] * 2, **options})


def test_an_empty_module_has_nothing_to_measure():
    with pytest.raises(ValueError, match="nothing to balance"):
        GPipe(nn.Sequential(), devices=["cpu"], sample=torch.zeros(2, 2))


def test_a_cell_that_fails_while_it_is_measured_is_named():
    with pytest.raises(RuntimeError) as caught:
        GPipe(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), devices=["cpu"] * 2, sample=torch.zeros(4, 3))
    assert any("profiling cell 1 ('1', Linear)" in note for note in caught.value.__notes__)


def test_skips_are_balanced_under_a_limit(monkeypatch):
    monkeypatch.setattr(gpipe.balancing, "profile", in_even_seconds)
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)

    def planned(**arguments):
        module = unet(depth=2, num_convs=2, base_channels=8)
        return GPipe(module, devices=["cpu"] * 2, chunks=8, sample=x, **arguments)

    needed = max(planned(checkpoint="never").partition.bytes)
    pipe = planned(checkpoint="auto", memory_limit=needed // 2)
    assert max(pipe.partition.bytes) <= needed // 2
    assert min(pipe.partition.keep) < 8
    pipe(x).square().mean().backward()
    assert all(p.grad is not None for p in pipe.parameters())
    with pytest.raises(Infeasible, match="cells 'encoder1_conv1' to"):
        planned(checkpoint="auto", memory_limit="100KB")
