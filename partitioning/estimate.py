"""Estimate what the cells of a module cost: nothing is allocated and nothing is computed.

Cells run on fake tensors, which have shapes and no memory, as on the meta device, and which take the CPU's kernels:
fused attention, as on GPUs, where the meta device would count an attention matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from gpipe.partitioning.alone import Alone, Passed, Waiting, alone, cut
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.footprint import Footprint, footprint, opened
from gpipe.partitioning.operations import counting_operations
from gpipe.partitioning.owned import Owned, owned_bytes
from gpipe.partitioning.sample import first_micro_batch


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Attributes:
        flops: Floating-point operations, a multiplication and an addition counted as two.
        bytes: Bytes moved to and from its memory.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """Time for so many operations and bytes: the slower of the two."""
        return max(flops / self.flops, moved / self.bytes)


def estimate(module: nn.Module, sample_spec: Any, *, speed: Speed, chunks: int = 1) -> list[CellCost]:
    """Estimate every cell of ``module`` on one micro-batch.

    Bytes are those ``profile`` would find. Seconds are a roofline: operations as ``counting_operations`` counts them,
    and parameters, activations and output moved once forward and twice backward. Cells that are alike, and get inputs
    that are alike, are estimated once: a Transformer of a thousand layers takes seconds.

    Args:
        module: An ``nn.Sequential``, or a module with ``cells()``; on any device, the meta device too.
        sample_spec: A mini-batch of inputs, tensors (rows, ...), on the meta device too: only shapes and types count.
        speed: Of the device.
        chunks: Number of micro-batches.

    Returns:
        One cost per cell, in order.

    Raises:
        ValueError: The module is empty, or ``sample_spec`` cannot be used.
        TypeError: Declarations of stashes and pops do not match.
        Exception: What a cell raised, with a note that names it.
    """
    cells = alone(cells_of(module))
    if not cells:
        raise ValueError("there is nothing to estimate: the module has no cells")
    fake = _fake_tensor_mode()
    value = tree_map_only(Tensor, partial(_faked, fake), first_micro_batch(sample_spec, chunks))
    waiting: Waiting = {}
    known: dict[Hashable, tuple[_Estimate, Passed]] = {}
    found: list[_Estimate] = []
    for cell in cells:
        entered = cell.entered(value, waiting)
        key = _signature(cell.cell), _shapes(entered), len(cell.stashes)
        if key not in known:
            try:
                with fake:
                    known[key] = _estimate(_without_values(fake, cell), entered)
            except BaseException as error:
                error.add_note(f"gpipe: raised while estimating {cell}")
                raise
        estimated, left = known[key]
        value = cell.went_on(left, waiting)
        found.append(estimated)
    owned = owned_bytes(cells, [e.footprint for e in found])
    return [
        e.cost(cell.name, bytes_, sum(p.numel() * p.element_size() for p in cell.parameters()), speed)
        for e, bytes_, cell in zip(found, owned, cells, strict=True)
    ]


@dataclass(frozen=True)
class _Estimate:
    forward_flops: float
    backward_flops: float
    footprint: Footprint

    def cost(self, name: str, owned: Owned, parameter_bytes: int, speed: Speed) -> CellCost:
        moved = parameter_bytes + owned.activation_bytes + self.footprint.boundary_bytes
        return CellCost(
            name=name,
            forward_seconds=speed.seconds(self.forward_flops, moved),
            backward_seconds=speed.seconds(self.backward_flops, 2 * moved),
            parameter_bytes=parameter_bytes,
            **owned._asdict(),
        )


def _estimate(cell: Alone, entered: Passed) -> tuple[_Estimate, Passed]:
    with counting_operations() as forward:
        left = cell(opened(entered))
    roots = [t for t in tree_leaves(left) if isinstance(t, Tensor) and t.requires_grad]
    with counting_operations() as backward:
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    del left, roots
    found, left = footprint(cell, entered, torch.device("cpu"))
    return _Estimate(forward.get_total_flops(), backward.get_total_flops(), found), cut(left)


def _fake_tensor_mode() -> FakeTensorMode:
    # The first fake tensor of a process puts a device into it that is none, where CUDA finds none. An autograd engine
    # that starts later begins a thread for it, and then refuses to work in forks of the process: so start it first.
    torch.autograd.backward(torch.zeros((), requires_grad=True))
    return FakeTensorMode()


def _faked(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    with fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _without_values(fake: FakeTensorMode, cell: Alone) -> Alone:
    """A copy of ``cell`` with fake tensors for its own."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_faked(fake, p), p.requires_grad) for p in cell.parameters()}
    return copy.deepcopy(cell, memo | {id(b): _faked(fake, b) for b in cell.buffers()})


def _shapes(tree: Any) -> Hashable:
    leaves, spec = tree_flatten(tree)
    return str(spec), tuple(
        (tuple(x.shape), x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else repr(x) for x in leaves
    )


_PLAIN = (int, float, str, bool, type(None), torch.dtype, tuple)


def _signature(module: nn.Module) -> Hashable:
    """Equal for cells that compute alike: class, settings, and shapes of parameters, all the way down."""
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, _PLAIN) and _hashable(v))
    others = tuple(
        (k, id(v))
        for k, v in sorted(vars(module).items())
        if not isinstance(v, _PLAIN) and not k.startswith("_") and k not in ("training",)
    )
    tensors = tuple(
        (name, None if t is None else (tuple(t.shape), t.dtype, t.requires_grad))
        for name, t in (*module._parameters.items(), *module._buffers.items())
    )
    children = tuple((name, None if m is None else _signature(m)) for name, m in module._modules.items())
    return type(module), settings, others, tensors, children


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
