"""NCCL of simulated accelerators: the torch.distributed backend ``simccl`` for devices of type ``sim``.

    dist.init_process_group("cpu:gloo,sim:simccl", ...)
    dist.new_group([0, 1], backend="simccl")

Ranks are processes of one machine. ``communicator.py`` has what operations do in time, ``issuing.py`` what is reported.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import PrefixStore, Store

from gpipe.testing.accelerators.communicator import Communicator, Members, Operation, Plan, contents, fill
from gpipe.testing.accelerators.issuing import Part, places
from gpipe.testing.accelerators.mail import post_office

BACKEND = "simccl"
POISON = 0xFF

REDUCTIONS = {"sum": ReduceOp.SUM, "avg": ReduceOp.AVG, "max": ReduceOp.MAX, "min": ReduceOp.MIN}


@functools.cache
def register() -> None:
    """Make the backend known to torch.distributed."""
    _define_operators()
    dist.Backend.register_backend(BACKEND, SimulatedNccl, devices=["sim"])


def _poison(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).fill_(POISON)


OPERATORS: dict[str, Callable[..., None]] = {
    "send(Tensor sent) -> ()": lambda sent: None,
    "recv(Tensor(a!) received) -> ()": _poison,
    "broadcast(Tensor sent) -> ()": lambda sent: None,
    "broadcast.received(Tensor(a!) received) -> ()": _poison,
    "all_reduce(Tensor(a!) reduced) -> ()": _poison,
    "all_gather(Tensor(a!)[] gathered, Tensor own) -> ()": lambda gathered, own: _poison(*gathered),
}
"""What the race detector sees of a communicator: operators that read and write on its stream."""


@functools.cache
def _define_operators() -> torch.library.Library:
    library_of: Any = torch.library.Library
    library = library_of(BACKEND, "DEF")
    for schema, function in OPERATORS.items():
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    return cast(torch.library.Library, library)


class SimulatedNccl(dist.ProcessGroup):
    """A group of ranks; its tensors on the CPU go over gloo, if its backends name gloo."""

    supports_coalescing = True
    supports_splitting = False

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._store = store
        if rank == 0:
            store.set("name", f"group {secrets.token_hex(4)}")
        own = post_office().address
        store.set(f"rank {rank}", "\n".join([own, *places.lost()]))
        ranks = [store.get(f"rank {r}").decode().splitlines() for r in range(size)]
        for address, *lost in ranks:
            if own in lost or address in ranks[rank][1:]:
                places.begin(address)
        self._members = Members(store.get("name").decode(), rank, [r[0] for r in ranks], timeout.total_seconds())
        self._communicators: dict[tuple[str, torch.device], Communicator] = {}
        self._batch: list[tuple[int, Part, Tensor]] | None = None
        self._closed = ""
        gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout=timeout)
        kind = dist.ProcessGroup.BackendType.GLOO
        self._set_default_backend(kind)
        self._register_backend(torch.device("cpu"), kind, gloo)

    def getBackendName(self) -> str:
        """What ``name()`` gives."""
        return BACKEND

    def get_group_store(self) -> Store:
        """What the ranks of the group have in common."""
        return self._store

    def _get_backend(self, device: torch.device) -> Any:
        return self if device.type == "sim" else super()._get_backend(device)

    # --- point to point

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Any:
        """Send one tensor; the sender never waits."""
        if not self._is_ours(tensors):
            return super().send(tensors, dst, tag)
        (tensor,) = tensors
        return self._exchange(dst, Part("send", tensor.nbytes), tensor)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Any:
        """Receive one tensor."""
        if not self._is_ours(tensors):
            return super().recv(tensors, src, tag)
        (tensor,) = tensors
        return self._exchange(src, Part("recv", tensor.nbytes), tensor)

    def _start_coalescing(self, device: torch.device) -> None:
        if device.type != "sim":
            return super()._start_coalescing(device)
        self._batch = []
        return None

    def _end_coalescing(self, device: torch.device) -> Any:
        if device.type != "sim":
            return super()._end_coalescing(device)
        batch, self._batch = self._batch, None
        assert batch, "torch.distributed starts a batch for operations of it"
        return self._communicator("", batch[0][2]).issue(_exchange_plan(batch))

    def _exchange(self, peer: int, part: Part, tensor: Tensor) -> Operation | None:
        if peer == self._members.rank:
            raise ValueError(f"tensors go from one rank to another, and rank {peer} is this one; copy them")
        if self._batch is not None:
            self._batch.append((peer, part, tensor))
            return None
        key = "{}:{}".format(*sorted((peer, self._members.rank)))
        return self._communicator(key, tensor).issue(_exchange_plan([(peer, part, tensor)]))

    # --- collectives

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Reduce in the order of ranks, so that all get the same bits."""
        if not self._is_ours(tensors):
            return super().allreduce(tensors, opts)
        (tensor,) = tensors
        name = next((name for name, value in REDUCTIONS.items() if opts is None or opts.reduceOp == value), None)
        if name is None:
            raise ValueError(f"simulated accelerators reduce by {', '.join(REDUCTIONS)}; got {opts.reduceOp}")
        own = contents(tensor)

        def deliver(parts: dict[int, list[Part]]) -> None:
            payloads = [parts[r][0].payload if r in parts else own for r in range(self.size())]
            fill(tensor, _reduced(name, [p or b"" for p in payloads], tensor.dtype))

        part = Part("all_reduce", tensor.nbytes, f"{name} of {tensor.dtype}", own)
        return self._collective([tensor], part, lambda: torch.ops.simccl.all_reduce(tensor), deliver)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:  # type: ignore[override]
        """Send one rank's tensor to all others."""
        if not self._is_ours(tensors):
            return super().broadcast(tensors, opts)
        (tensor,) = tensors
        root, detail = opts.rootRank, f"from rank {opts.rootRank}"
        if root == self._members.rank:
            part = Part("broadcast", tensor.nbytes, detail, contents(tensor))
            return self._collective([tensor], part, lambda: torch.ops.simccl.broadcast(tensor), needs=())

        def deliver(parts: dict[int, list[Part]]) -> None:
            fill(tensor, parts[root][0].payload or b"")

        part = Part("broadcast", tensor.nbytes, detail)
        return self._collective([tensor], part, lambda: torch.ops.simccl.broadcast.received(tensor), deliver, (root,))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Gather a tensor of every rank in a list."""
        if not self._is_ours(inputs):
            return super().allgather(outputs, inputs, opts)
        return self._all_gather(outputs[0], inputs[0])

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        if not self._is_ours([output, input]):
            return super()._allgather_base(output, input, opts)
        return self._all_gather(list(output.view(self.size(), -1).unbind()), input)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Gather a tensor of every rank in one, one after the other."""
        if not self._is_ours([output, input]):
            return super().all_gather_single(output, input, opts)
        return self._allgather_base(output, input, opts)

    def _all_gather(self, outputs: list[Tensor], own: Tensor) -> Operation:
        payload = contents(own)

        def deliver(parts: dict[int, list[Part]]) -> None:
            for rank, output in enumerate(outputs):
                fill(output, parts[rank][0].payload or b"" if rank in parts else payload)

        part = Part("all_gather", own.nbytes, payload=payload)
        return self._collective([own, *outputs], part, lambda: torch.ops.simccl.all_gather(outputs, own), deliver)

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all ranks; the host does, too."""
        device = opts.device if opts is not None and opts.device is not None else torch.device("cpu")
        if device.type != "sim":
            return super().barrier(opts)
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        tensor = torch.empty(1, device=torch.device("sim", index))
        part = Part("barrier", 0, payload=b"")
        return self._collective([tensor], part, lambda: torch.ops.simccl.all_reduce(tensor), host_waits=True)

    def _collective(
        self,
        tensors: list[Tensor],
        part: Part,
        run: Any,
        deliver: Any = lambda parts: None,
        needs: Sequence[int] | None = None,
        host_waits: bool = False,
    ) -> Operation:
        peers = [rank for rank in range(self.size()) if rank != self._members.rank]
        needed = frozenset(peers if needs is None else needs)
        plan = Plan(part.kind, {peer: [part] for peer in peers}, needed, tensors, run, deliver, host_waits)
        return self._communicator("", tensors[0]).issue(plan)

    # --- the end

    def abort(self) -> None:
        """End all waiting, on this rank, with an error."""
        own = self._members.addresses[self._members.rank]
        places.lose(address for address in self._members.addresses if address != own)
        self._close("was aborted")
        super().abort()

    def shutdown(self) -> None:
        """End for good."""
        self._close("was destroyed")
        super().shutdown()

    def _close(self, how: str) -> None:
        self._closed = f"{self._members.name} {how}"
        for communicator in list(self._communicators.values()):
            communicator.close(f"{communicator.name} {how}")

    # --- which tensors, which communicator

    def _is_ours(self, tensors: Sequence[Tensor]) -> bool:
        kinds = {tensor.device.type for tensor in tensors}
        if kinds == {"cpu"} and "cpu" not in dist.get_backend_config(self):
            raise RuntimeError("No backend type associated with device type cpu")  # torch's words
        if kinds == {"sim"} and not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("NCCL takes tensors that are contiguous; call .contiguous() first")
        return kinds == {"sim"}

    def _communicator(self, key: str, tensor: Tensor) -> Communicator:
        if self._closed:
            raise dist.DistBackendError(self._closed)
        which = key, tensor.device
        if which not in self._communicators:
            self._communicators[which] = Communicator(self._members, key, tensor.device)
        return self._communicators[which]


def _exchange_plan(batch: Sequence[tuple[int, Part, Tensor]]) -> Plan:
    """Sends and receives, issued together."""
    parts: dict[int, list[Part]] = {}
    for peer, part, tensor in batch:
        sends = part.kind == "send"
        parts.setdefault(peer, []).append(Part(part.kind, part.size, payload=contents(tensor)) if sends else part)
    received = [(peer, tensor) for peer, part, tensor in batch if part.kind == "recv"]

    def run() -> None:
        for _, part, tensor in batch:
            torch.ops.simccl.send(tensor) if part.kind == "send" else torch.ops.simccl.recv(tensor)

    def deliver(theirs: dict[int, list[Part]]) -> None:
        payloads = {peer: iter([p.payload for p in parts if p.kind == "send"]) for peer, parts in theirs.items()}
        for peer, tensor in received:
            fill(tensor, next(payloads[peer]) or b"")

    kind = " and ".join(dict.fromkeys(part.kind for _, part, _ in batch))
    needs = frozenset(peer for peer, _ in received)
    return Plan(kind, parts, needs, [tensor for *_, tensor in batch], run, deliver)


def _reduced(how: str, payloads: Sequence[bytes], dtype: torch.dtype) -> bytes:
    if not payloads[0]:
        return b""
    first, *others = (torch.frombuffer(bytearray(payload), dtype=dtype) for payload in payloads)
    for other in others:
        if how in ("sum", "avg"):
            first += other
        else:
            first = torch.maximum(first, other) if how == "max" else torch.minimum(first, other)
    if how == "avg":
        first = first / len(payloads)
    return contents(first)
