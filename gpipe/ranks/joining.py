"""How a rank joins a distributed pipeline: arguments checked and compared, its slice taken, its routes made."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from gpipe.cells import refuse_graphed, shared_buffers
from gpipe.choosing import AnySchedule, chosen
from gpipe.partitioning.cells import Cell, cells_of
from gpipe.partitioning.skips import skips_of
from gpipe.partitioning.split import split_evenly
from gpipe.ranks.agreement import Facts, agree, told
from gpipe.ranks.averaging import equalise
from gpipe.ranks.deferred import Recorded, recorded
from gpipe.ranks.direct import accelerator
from gpipe.ranks.error_board import ErrorBoard
from gpipe.ranks.group_transport import GroupTransport, Key, Wires
from gpipe.ranks.mesh import position, with_own_group
from gpipe.ranks.routes import Route
from gpipe.ranks.routing import Plan, connected
from gpipe.ranks.share import Share
from gpipe.ranks.slicing import Factory, keep_slice, materialise
from gpipe.ranks.tied_ranks import Shared, SharedValues, shared_parameters, ways
from gpipe.schedule import Schedule
from gpipe.settings import (
    Checkpoint,
    check_balance,
    check_checkpoint,
    check_chunks,
    check_devices,
    check_passes,
    check_seed,
    kept_micro_batches,
)
from gpipe.stage import Stage
from gpipe.tied import Tied, tied_parameters
from gpipe.ways import ways_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_MOST_STAGES = 8  # a worker of a schedule by name


@dataclass(frozen=True)
class Settings:
    """The arguments of ``DistributedGPipe``, as given."""

    balance: Iterable[int] | None
    chunks: Any
    loss_fn: Any
    mesh: Any
    schedule: AnySchedule
    loss_over: Any
    two_pass: Any
    checkpoint: Any
    deferred_batch_norm: Any
    seed: Any
    device: Any


@dataclass
class Joined:
    """What a rank needs to take part."""

    module: nn.Module
    cells: list[Cell]  # the own ones
    names: frozenset[str]  # keys of the whole module's state
    order: list[str]  # of the whole module's parameters
    first_names: dict[nn.Parameter, str]  # of the own parameters in the whole module
    balance: list[int]
    checkpoint: Checkpoint
    seed: int
    share: Share
    wires: Wires
    board: ErrorBoard


def join(module: nn.Module | Factory, settings: Settings, number: int) -> Joined:
    """Join the pipeline number ``number`` of this world.

    Raises:
        RuntimeError: There is no process group.
        TypeError, ValueError: An argument is wrong here or on another rank, or ranks differ; raised on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "DistributedGPipe needs a process group: start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    world = dist.group.WORLD
    assert world is not None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive processes that failed
    store = dist.PrefixStore(f"gpipe {attempt} {number}", world.get_group_store())  # type: ignore[attr-defined]
    joining = _Joining(module, settings)
    seed = int(agree(store, rank, ranks, joining.settle)["_seed"])
    slices = dist.PrefixStore("slice", store)  # type: ignore[attr-defined]
    agree(slices, rank, ranks, lambda: joining.take(seed), "failed to take its stages")
    return joining.join(seed, store)


def _checked(routes: Mapping[Key, Route]) -> Facts:
    """Raise a RuntimeError for a route between accelerators on which something was lost."""
    for route in routes.values():
        if route.direct is not None:
            route.direct.check()
    return {}


class _Joining:
    """One rank's arguments on the way to its slice."""

    def __init__(self, module: nn.Module | Factory, settings: Settings) -> None:
        self._given, self._settings = module, settings

    def settle(self) -> Facts:
        """Check the arguments; gives what all ranks must have alike."""
        given = self._settings
        self._chunks = check_chunks(given.chunks)
        _check_words(given)
        self._position = position(given.mesh)
        self._workers = len(self._position.pipeline)
        self._seed = check_seed(given.seed)
        self._device = _device(given.device)
        self._built = None if isinstance(self._given, nn.Module) else _recorded(self._given)
        module = self._given if self._built is None else self._built.module
        assert isinstance(module, nn.Module)
        self._module, self._cells = module, cells_of(module)
        refuse_graphed(self._cells)
        self._balance, self._hosts = self._divided()
        self._checkpoint = check_checkpoint(given.checkpoint, len(self._balance))
        keep = kept_micro_batches(self._checkpoint, len(self._balance), self._chunks)
        schedule = chosen(given.schedule, len(self._balance), self._chunks, keep, given.two_pass)
        if given.loss_over == "mini_batch" and not given.two_pass:
            _ = schedule.halves
        self._ends = [sum(self._balance[:k]) for k in range(len(self._balance) + 1)]
        self._groups = [self._cells[left:right] for left, right in pairwise(self._ends)]
        self._tied = tied_parameters(self._groups)
        skips = skips_of(self._cells)
        self._ways = ways_of(skips, self._balance)
        self._check_loss()
        return {
            "mesh": str([list(ranks) for ranks in self._position.grid]),
            "balance": str(self._balance),
            "chunks": str(self._chunks),
            "checkpoint": repr(self._checkpoint),
            "schedule": f"{schedule.name} (digest {_digest(schedule):08x})",
            "loss_over": given.loss_over,
            "two_pass": str(given.two_pass),
            "deferred_batch_norm": str(bool(given.deferred_batch_norm)),
            "seed": repr(given.seed),
            "module": f"{'a factory of ' if self._built else ''}{type(module).__name__} of {len(self._cells)} cells",
            "torch": torch.__version__,
            "skip connections": ", ".join(f"{key[1]} from {a} to {b}" for key, a, b in skips),
            "_seed": str(self._seed),
            **{f"cell {i}": _described(cell) for i, cell in enumerate(self._cells)},
        }

    def take(self, seed: int) -> Facts:
        """Take the own slice: make the stages, where their memory or initial values may be what is lacking."""
        self._names = frozenset(self._module.state_dict())
        self._first_names = list(self._module.named_parameters())
        me = self._position.worker
        mine = [k for k, host in enumerate(self._hosts) if host == me]
        self._own = [i for k in mine for i in range(self._ends[k], self._ends[k + 1])]
        tied, self._shared = self._own_ties(mine)
        shared = [s for s in self._shared if me in s.workers]
        if self._built is not None:
            for s in shared:
                if s.owner != me:
                    self._built.allocate(s.parameter)
        for k in mine:
            if self._built is not None:
                materialise(self._built, self._groups[k], self._ends[k], seed, self._device)
            with shared_buffers(self._module, self._groups[k]):
                for _, cell in self._groups[k]:
                    cell.to(self._device)
        keep_slice(self._module, self._cells, self._own)
        if isinstance(self._settings.loss_fn, nn.Module) and self._hosts[-1] == me:
            self._settings.loss_fn.to(self._device)
        alone = len(mine) == 1
        stages = {k: Stage(k, self._groups[k], self._ends[k], self._device, alone, self._ways[k]) for k in mine}
        self._share = Share(self._position, self._hosts, self._ways, stages, self._device, tied, shared)
        return {}

    def join(self, seed: int, store: Store) -> Joined:
        """Make the routes to the other ranks, and have common values where that is due."""
        self._position = with_own_group(self._position)
        kept = set(self._module.parameters())
        plan = Plan(self._position, self._hosts, self._ways, ways(self._shared), self._device)
        ranks = dist.get_world_size()
        rank = self._position.rank
        accelerators = told(store, rank, ranks, "accelerator", accelerator(self._device))
        routes = connected(plan, accelerators)
        if any(accelerators):
            greeted = dist.PrefixStore("greeted", store)  # type: ignore[attr-defined]
            agree(greeted, rank, ranks, lambda: _checked(routes), "was not greeted as was sent")
        joined = Joined(
            module=self._module,
            cells=[self._cells[i] for i in self._own],
            names=self._names,
            order=[name for name, _ in self._first_names],
            first_names={p: name for name, p in self._first_names if p in kept},
            balance=self._balance,
            checkpoint=self._checkpoint,
            seed=seed,
            share=replace(self._share, position=self._position),
            wires=Wires(rank, routes),
            board=ErrorBoard(store, ranks),
        )
        self._equalise(joined)
        return joined

    def _own_ties(self, mine: Sequence[int]) -> tuple[list[Tied], list[Shared]]:
        """The tied parameters of this rank with the places in its own stages; and all that several ranks share."""
        own: list[Tied] = [(p, [g for g in groups if g[0].stage in mine]) for p, groups in self._tied]
        return [(p, groups) for p, groups in own if groups], shared_parameters(self._tied, self._hosts)

    def _equalise(self, joined: Joined) -> None:
        """Give replicas, and then copies of shared parameters, the values of the first of them."""
        loss = self._settings.loss_fn if joined.share.is_last else None
        modules = [joined.module, *([loss] if isinstance(loss, nn.Module) else [])]
        if self._position.group is not None:
            equalise([t for m in modules for t in chain(m.parameters(), m.buffers())], self._position)
        transport = GroupTransport(joined.wires)
        SharedValues(joined.share.shared, self._position, transport).spread()
        transport.flush()

    def _check_loss(self) -> None:
        """Refuse a loss with parameters of cells that are not where it is: their gradients would part."""
        loss = self._settings.loss_fn
        if not isinstance(loss, nn.Module):
            return
        own = {id(p): name for name, p in loss.named_parameters()}
        for k, cells in enumerate(self._groups):
            for cell_name, cell in cells if self._hosts[k] != self._hosts[-1] else ():
                for name, p in cell.named_parameters(cell_name):
                    if id(p) in own:
                        raise ValueError(
                            f"loss_fn uses {name!r} of stage {k} as {own[id(p)]!r}, but is computed on the last "
                            "stage's rank: let the last cell use the parameter and hand on what the loss needs"
                        )

    def _divided(self) -> tuple[list[int], list[int]]:
        """Cells per stage, and for every stage the rank that hosts it."""
        cells, schedule = len(self._cells), self._settings.schedule
        if self._settings.balance is not None:
            balance = check_balance(self._settings.balance, cells)
            hosts = self._hosting(len(balance))
            return balance, hosts
        sizes = [sum(p.numel() for p in cell.parameters()) for _, cell in self._cells]
        if isinstance(schedule, Schedule):
            counts: Sequence[int] = [schedule.stages]
        else:
            counts = [self._workers * v for v in range(1, _MOST_STAGES + 1)]
        count = next((n for n in counts if _workers(self._settings, n, self._chunks) == self._workers), counts[0])
        if count > cells:
            raise ValueError(
                f"the pipeline has {self._workers} ranks, which makes {count} stages, but the module has {cells} cells "
                f"and a stage needs at least one: start fewer processes (torchrun --nproc-per-node {cells}), or split "
                "cells"
            )
        return split_evenly(sizes, count), self._hosting(count)

    def _hosting(self, stages: int) -> list[int]:
        given = self._settings
        schedule = chosen(given.schedule, stages, self._chunks, (0,) * stages, given.two_pass)
        workers = len(schedule.workers)
        if workers != self._workers:
            raise ValueError(
                f"schedule {schedule.name!r} runs {stages} stages on {workers} ranks, one a worker, but the pipeline "
                f"has {self._workers}: start {workers} processes (torchrun --nproc-per-node {workers}), or give a "
                "balance for as many stages as the world can host"
            )
        hosts = {int(action.stage): w for w, actions in enumerate(schedule.workers) for action in actions}
        return [hosts[k] for k in range(stages)]


def _check_words(given: Settings) -> None:
    if given.loss_over not in ("mini_batch", "micro_batch"):
        raise ValueError(f"loss_over must be 'mini_batch' or 'micro_batch', got {given.loss_over!r}")
    check_passes(given.two_pass, given.loss_over)
    if not callable(given.loss_fn):
        raise TypeError(f"loss_fn must be callable with outputs and targets, got {type(given.loss_fn).__name__}")


def _device(device: Any) -> torch.device:
    """The device of this rank's stages."""
    if device is not None:
        return check_devices([device], 1)[0]
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def _recorded(factory: Any) -> Recorded:
    if not callable(factory):
        raise TypeError(
            "DistributedGPipe takes a module, or a callable without arguments that makes one, got "
            f"{type(factory).__name__}"
        )
    return recorded(cast(Factory, factory))


def _workers(given: Settings, stages: int, chunks: int) -> int:
    """How many workers the schedule has for so many stages; 0 if it has none for them."""
    try:
        return len(chosen(given.schedule, stages, chunks, (0,) * stages, given.two_pass).workers)
    except ValueError:
        return 0


def _digest(schedule: Schedule) -> int:
    return zlib.crc32("; ".join(",".join(map(str, actions)) for actions in schedule.workers).encode())


def _described(cell: Cell) -> str:
    """What the ranks' modules must share: names, shapes and types."""
    name, module = cell
    held = [
        f"{n} {tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}" for n, p in module.named_parameters()
    ]
    held += [f"{n} {tuple(b.shape)} {b.dtype}" for n, b in module.named_buffers()]
    return f"{name!r}, {type(module).__name__} with {', '.join(held) or 'no parameters'}"
