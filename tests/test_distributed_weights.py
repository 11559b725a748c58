"""Modules built without memory, whose values are made later, slice by slice."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from gpipe.models.clip import clip
from gpipe.partitioning.cells import cells_of
from gpipe.ranks.deferred import recorded
from gpipe.ranks.slicing import initialised, keep_slice, materialise

CPU = torch.device("cpu")


def sliced(factory, own, seed=5):
    built = recorded(factory)
    assert all(t.is_meta for t in (*built.module.parameters(), *built.module.buffers()))
    cells = cells_of(built.module)
    materialise(built, [cells[i] for i in own], own[0], seed, CPU)
    keep_slice(built.module, cells, own)
    return built.module


def assert_slices_of_the_whole(factory, cells):
    whole = initialised(factory, 5).state_dict()
    for cuts in ([cells], [1, cells - 1], [1] * cells):
        found, first = {}, 0
        for count in cuts:
            found |= sliced(factory, range(first, first + count)).state_dict()
            first += count
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(found[key], value), key
            assert found[key].stride() == value.stride()
    return whole


class Inventive(nn.Module):
    """Initialises itself by every means."""

    def __init__(self):
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(6, 4) * 4**-0.5)
        self.turned = nn.Parameter(torch.empty(4, 6).normal_().t())
        self.cut = nn.Parameter(torch.cat([torch.zeros(2), torch.ones(2)]))
        self.listed = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.learned = nn.Parameter(torch.rand(3), requires_grad=False)
        self.learned.mark = "kept"
        self.embedding = nn.Embedding(5, 4, padding_idx=2)
        self.norm = nn.BatchNorm1d(4)
        self.spectral = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.register_buffer("steps", torch.linspace(0, 1, 4)[::2])
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1), persistent=False)
        self.low = nn.Linear(4, 4).half()
        nn.init.trunc_normal_(self.low.weight, std=0.1)
        with torch.no_grad():
            self.scaled[0] = self.cut
            self.norm.bias.copy_(self.scaled[1])

    def forward(self, x):
        return x


def inventive():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    cells = [Inventive(), copy.deepcopy(layer), nn.Linear(4, 4), layer, nn.MultiheadAttention(8, 2), Inventive()]
    for cell in (cells[2], cells[5].embedding):
        nn.init.constant_(cell.weight, 0.5)
    return nn.Sequential(*cells)


def test_every_initialisation_is_made_again_slice_by_slice():
    whole = assert_slices_of_the_whole(inventive, 6)
    module = inventive()
    assert whole.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert whole[key].dtype == value.dtype
        assert whole[key].stride() == value.stride()
        if value.dtype.is_floating_point and value.numel() > 3:
            assert (whole[key].std() > 0) == (value.std() > 0), key
    assert torch.equal(whole["0.scaled"][0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(whole["0.norm.bias"], whole["0.scaled"][1])
    assert torch.equal(whole["0.listed"], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(whole["0.embedding.weight"][2], torch.zeros(4))
    assert torch.equal(whole["5.embedding.weight"], torch.full((5, 4), 0.5))
    assert not torch.equal(whole["0.scaled"], whole["5.scaled"])
    made = sliced(inventive, range(1))[0]
    assert (made.learned.mark, made.learned.requires_grad, type(made.learned)) == ("kept", False, nn.Parameter)
    assert made.mask[0, 1] == float("-inf")


SMALL = {
    **{"image_size": 8, "patch_size": 4, "vision_width": 8, "vision_layers": 2, "vision_heads": 2, "embed_dim": 6},
    **{"text_width": 8, "text_layers": 2, "text_heads": 2, "context_length": 5, "vocabulary_size": 9},
    "activation": "gelu",
}


def test_a_module_with_cells_is_made_by_slices_under_its_own_names():
    factory = partial(clip, **SMALL)
    whole = assert_slices_of_the_whole(factory, len(cells_of(factory())))
    assert whole.keys() == factory().state_dict().keys()
    deviation = whole["transformer.resblocks.0.mlp.c_proj.weight"].std().item()
    assert deviation == pytest.approx(8**-0.5 * 4**-0.5, rel=0.2)  # as the model's own constructor has it


def test_the_callers_generator_stays():
    state = torch.get_rng_state()
    initialised(inventive, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shared_parameter_stays_shared():
    def factory():
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(nn.Sequential(first, nn.ReLU(), last), nn.Linear(4, 4))

    made = initialised(factory, 5)
    assert made[0][0].weight is made[0][2].weight
    assert len(list(made.parameters())) == 5


def test_values_that_nobody_knows_are_refused():
    with torch.device("meta"):
        outside = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"the values of '0\.weight' are not known from building the module on the meta"
    ):
        initialised(lambda: nn.Sequential(outside), 5)
    with pytest.raises(TypeError, match="the factory must return"):
        recorded(lambda: 3)
    with pytest.raises(RuntimeError, match="meta") as caught:
        recorded(lambda: nn.Linear(int(torch.ones(1).item()), 4))
    assert "compute numbers from tensors made with device='cpu'" in caught.value.__notes__[0]


def test_a_slice_keeps_nothing_of_the_others():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    keep_slice(module, cells_of(module), range(1, 2))
    assert list(module.state_dict()) == [f"1.{n}" for n in nn.BatchNorm1d(4).state_dict()]
