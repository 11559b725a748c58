"""Data parallelism: what the replicas of a stage have in common after a step.

Their gradients are averaged over all rows, once a mini-batch; buffers become the first replica's. The sums begin when a
rank has done its own backwards, while others still work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.memory import window
from gpipe.ranks.mesh import Position
from gpipe.ranks.routes import ConnectionLost

_BUCKET = 25 * 2**20  # bytes of gradients that are summed at a time


class Averaging:
    """The sums of one rank with those that hold the same.

    Args:
        position: Where the rank stands.
        parameters: Those that are averaged: trainable, the same on all replicas.
    """

    def __init__(self, position: Position, parameters: Sequence[Tensor]) -> None:
        self._position = position
        self._parameters = parameters
        self._due = False
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
        there = [g is not None for g in gradients]
        self._sums = [torch.tensor(there, dtype=torch.float32, device=self._parameters[0].device)]
        for bucket in _buckets(self._parameters):
            dtype = torch.promote_types(self._parameters[bucket[0]].dtype, torch.float32)
            flat = [_or_zeros(gradients[i], self._parameters[i]).reshape(-1).to(dtype) for i in bucket]
            self._sums.append(torch.cat(flat).mul_(rows))
        group = self._position.group
        self._works = [dist.all_reduce(t, group=group, async_op=True) for t in self._sums]

    def end(self, gradients: Sequence[Tensor | None], rows: int) -> list[Tensor | None]:
        """Wait for the sums.

        Args:
            gradients: As begun with.
            rows: Of all replicas together.

        Returns:
            For every parameter the mean over all rows; None where no replica had a gradient.
        """
        with _connected():
            for work in self._works:
                work.wait()
        there, *sums = self._sums or [torch.empty(0)]
        self._works, self._sums = [], []
        means: list[Tensor | None] = [None] * len(self._parameters)
        used = there.tolist()
        for bucket, flat in zip(_buckets(self._parameters), sums, strict=True):
            parts = torch.split(flat.div_(rows), [self._parameters[i].numel() for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                if used[i]:
                    like = _or_zeros(gradients[i], self._parameters[i])
                    means[i] = torch.empty_like(like).copy_(part.view(like.shape))
        return means

    def give_up(self) -> None:
        """Release the replicas that count on this one: what they get, nobody uses."""
        if self._due:
            self.begin([None] * len(self._parameters), 0)


def equalise(tensors: Sequence[Tensor], position: Position) -> None:
    """Give every replica the first one's values, whatever their type and layout."""
    for tensor in tensors:
        place = _without_overlap(tensor.detach())
        own = place.resolve_conj().resolve_neg().contiguous()  # gloo takes any tensor for plain, dense memory
        memory = own.reshape(-1).view(torch.uint8)
        received = memory.clone()
        with _connected():
            dist.broadcast(received, src=position.grid[0][position.worker], group=position.group)
        if not torch.equal(received, memory):
            place.copy_(received.view(own.dtype).view(own.shape))


def _without_overlap(tensor: Tensor) -> Tensor:
    """``tensor``, or, if it is an expanded one, the memory that it shows several times."""
    if torch._debug_has_internal_overlap(tensor) != 1:
        return tensor
    _, size = window([tensor])
    return tensor.as_strided((size,), (1,), tensor.storage_offset())


@contextmanager
def _connected() -> Iterator[None]:
    """Talk to the other replicas inside; what torch raises of a lost one becomes a ``ConnectionLost``."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionLost(f"a replica of this rank's stages cannot be reached: {error}") from error


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _buckets(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of parameters that are summed together: of one type and device, up to so many bytes."""
    found: list[list[int]] = []
    for i, p in enumerate(parameters):
        last = [parameters[j] for j in found[-1]] if found else []
        alike = bool(last) and (last[0].dtype, last[0].device) == (p.dtype, p.device)
        if alike and sum(q.nbytes for q in last) + p.nbytes <= _BUCKET:
            found[-1].append(i)
        else:
            found.append([i])
    return found
