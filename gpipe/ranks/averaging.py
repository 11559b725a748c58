"""Data parallelism: what the replicas of a stage have in common after a step.

Their gradients are averaged over all rows, once a mini-batch; buffers become the first replica's. The sums begin when a
rank has done its own backwards, while others still work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.memory import window
from gpipe.ranks.direct import UnderWay, backend
from gpipe.ranks.mesh import Position
from gpipe.ranks.routes import reaching

_REPLICA = "a replica of this rank's stages"
_BUCKET = 25 * 2**20  # bytes of gradients that are summed at a time
_PAUSE = 1e-4  # seconds between two looks whether a sum is there


class Averaging:
    """The sums of one rank with those that hold the same.

    Args:
        position: Where the rank stands.
        parameters: Those that are averaged: trainable, the same on all replicas.
        device: Where they live.
    """

    def __init__(self, position: Position, parameters: Sequence[Tensor], device: torch.device) -> None:
        assert position.group is not None
        self.group = position.group
        self.accelerated = device.type != "cpu" and backend(device, position.group) != "gloo"
        """Whether an accelerator, not the host, waits for the other replicas."""
        self._parameters = parameters
        self._under_way = UnderWay()
        self._due = False
        self._there: list[bool] = []
        self._works: list[dist.Work] = []
        self._sums: list[Tensor] = []

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Refuse parameters that were frozen, or thawed, since.

        Raises:
            RuntimeError: They are others.
        """
        if {id(p) for p in parameters} != {id(p) for p in self._parameters}:
            raise RuntimeError(
                "replicas average the gradients of the parameters that were trainable when the pipe was made, but "
                "requires_grad of some was changed since: set it before, or make a new pipe on every rank"
            )

    def expect(self) -> None:
        """A step begins; the other replicas count on this one until ``end``."""
        self._due = True

    def begin(self, gradients: Sequence[Tensor | None], rows: int) -> None:
        """Begin to sum.

        Args:
            gradients: For every parameter that of this replica, a mean over its rows; of none it counts as zero.
            rows: How many.

        Raises:
            TypeError: A gradient is sparse.
        """
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise TypeError(
                    f"replicas average dense gradients, but that of a parameter of shape {tuple(parameter.shape)} is "
                    "sparse: make the layer that uses it with sparse=False"
                )
        self._due = False
        if not self._parameters:
            return
        gradients = gradients if rows else [None] * len(gradients)  # 0 rows times what is no number is none either
        self._there = [g is not None for g in gradients]
        self._sums = [_flags(self._there, self._parameters[0].device)]
        for bucket in _buckets(self._parameters):
            dtype = torch.promote_types(self._parameters[bucket[0]].dtype, torch.float32)
            flat = [_or_zeros(gradients[i], self._parameters[i]).reshape(-1).to(dtype) for i in bucket]
            self._sums.append(torch.cat(flat).mul_(rows))
        with reaching(_REPLICA):
            self._works = [dist.all_reduce(t, group=self.group, async_op=True) for t in self._sums]
        if self.accelerated:
            self._under_way.keep(self._works, self._sums)

    def end(self, gradients: Sequence[Tensor | None], rows: int, check: Callable[[], None]) -> list[Tensor | None]:
        """Wait for the sums; where accelerators add up, their current stream does.

        Args:
            gradients: As begun with.
            rows: Of all replicas together.
            check: Raises if the step was given up.

        Returns:
            For every parameter the mean over all rows; None where no replica had a gradient.
        """
        with reaching(_REPLICA):
            for work in self._works:
                work.wait()
        used = self._used(check)
        sums = self._sums[1:]
        self._works, self._sums = [], []
        means: list[Tensor | None] = [None] * len(self._parameters)
        for bucket, flat in zip(_buckets(self._parameters), sums, strict=True):
            parts = torch.split(flat.div_(rows), [self._parameters[i].numel() for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                if used[i]:
                    like = _or_zeros(gradients[i], self._parameters[i])
                    means[i] = torch.empty_like(like).copy_(part.view(like.shape))
        return means

    def _used(self, check: Callable[[], None]) -> list[bool]:
        """For every parameter whether a replica had a gradient: known here, or read once it is there."""
        if all(self._there):
            return self._there
        while self.accelerated and not self._works[0].is_completed():  # to read would wait for a rank that is gone
            check()
            time.sleep(_PAUSE)
        return [count > 0 for count in self._sums[0].tolist()]

    def give_up(self) -> None:
        """Release the replicas that count on this one: what they get, nobody uses."""
        if self._due and not self.accelerated:
            self.begin([None] * len(self._parameters), 0)

    def busy(self) -> bool:
        """Whether accelerators still add up."""
        return self._under_way.count() > 0


def equalise(tensors: Sequence[Tensor], position: Position) -> None:
    """Give every replica the first one's values, whatever their type and layout, in few broadcasts.

    On the CPU a tensor is written to only where it differs: whoever has used it keeps what it knows of it.
    """
    first = position.grid[0][position.worker]
    every = [_without_overlap(t.detach()) for t in tensors if t.numel()]
    for bucket in _buckets(every, one_type=False):
        places = [every[i] for i in bucket]
        dense = [p.resolve_conj().resolve_neg().contiguous() for p in places]  # gloo takes any for plain, dense memory
        own = torch.cat([d.reshape(-1).view(torch.uint8) for d in dense])
        received = own.clone()
        with reaching(_REPLICA):
            dist.broadcast(received, src=first, group=position.group)
        if position.rank == first:
            continue
        sizes = [d.nbytes for d in dense]
        for place, old, new, like in zip(
            places, torch.split(own, sizes), torch.split(received, sizes), dense, strict=True
        ):
            if place.device.type != "cpu" or not torch.equal(new, old):
                place.copy_(_as(new, like))


def _as(memory: Tensor, like: Tensor) -> Tensor:
    """Bytes as what they are of, in memory of their own, for they may stand at any address."""
    return memory.clone().view(like.dtype).view(like.shape)


def _without_overlap(tensor: Tensor) -> Tensor:
    """``tensor``, or, if it is an expanded one, the memory that it shows several times."""
    if torch._debug_has_internal_overlap(tensor) != 1:
        return tensor
    _, size = window([tensor])
    return tensor.as_strided((size,), (1,), tensor.storage_offset())


def _flags(values: Sequence[bool], device: torch.device) -> Tensor:
    """The values as numbers; the host does not wait for an accelerator."""
    if all(values):
        return torch.ones(len(values), device=device)
    found = torch.tensor(values, dtype=torch.float32, pin_memory=device.type != "cpu")
    return found.to(device, non_blocking=True)


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _buckets(tensors: Sequence[Tensor], one_type: bool = True) -> list[list[int]]:
    """Indices of neighbours that go together: of one device and, if so asked, type, up to so many bytes."""
    found: list[list[int]] = []
    size, kind = 0, None
    for i, t in enumerate(tensors):
        before, kind = kind, (t.device, t.dtype if one_type else None)
        if kind == before and size + t.nbytes <= _BUCKET:
            found[-1].append(i)
            size += t.nbytes
        else:
            found.append([i])
            size = t.nbytes
    return found
