"""The processes of a run: one that is alone, or the ranks that torchrun started."""

from __future__ import annotations

import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gpipe.ranks.error_board import RankLost
from gpipe.training.ending import Ending
from gpipe.training.errors import ConfigurationError, Silent

T = TypeVar("T")

_ranks = count()  # of this process: those that belong together are made in the same order


class World:
    """A process that is alone.

    Attributes:
        rank: Its number.
        size: How many there are.
        job: What tells this job of torchrun from others; None without torchrun.
        restarted: Whether torchrun started the processes again, after one of them had ended.
        stages: Those this process hosts, as far as that is known; for `name`.
    """

    rank = 0
    size = 1
    job: str | None = None
    restarted = False
    stages: Sequence[int] = ()

    @property
    def leads(self) -> bool:
        """Whether this process talks to the user and writes what is written once."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What lines of this process begin with where several may talk."""
        return ""

    def agreed(self, action: Callable[[], T]) -> T:
        """What ``action`` gives, called in every process; where it fails in one, none goes on.

        Raises:
            Exception: What it raised here. Silent: It failed in another process, which tells.
        """
        return action()

    def led(self, action: Callable[[], T]) -> T:
        """What ``action`` gives in the process that leads, the only one to call it.

        Raises:
            Exception, Silent: As `agreed`.
        """
        return action()

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def stop(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal any process received, the same answer in all of them."""
        return received

    def whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of all processes, in the one that leads; elsewhere none."""
        return dict(weights)


class Ranks(World):
    """One of the ranks of the torch.distributed world this process has joined."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.restarted = _attempt() > 0
        self.job = _job()
        world = dist.group.WORLD
        assert world is not None
        store = dist.PrefixStore(f"gpipe ending {next(_ranks)}", world.get_group_store())  # type: ignore[attr-defined]
        self.ending = Ending(store, self.rank, self.size)

    @property
    def name(self) -> str:
        """Rank and stages."""
        if not self.stages:
            return f"rank {self.rank}: "
        several = "s" if len(self.stages) > 1 else ""
        return f"rank {self.rank}, stage{several} {' and '.join(map(str, self.stages))}: "

    def agreed(self, action: Callable[[], T]) -> T:
        """As described in `World`."""
        return self._outcomes(action)[0]

    def led(self, action: Callable[[], T]) -> T:
        """As described in `World`; what it gives can be pickled."""
        _, results = self._outcomes(lambda: action() if self.leads else None, told=True)
        result: T = results[0]
        return result

    def _outcomes(self, action: Callable[[], T], told: bool = False) -> tuple[T, list[Any]]:
        """What ``action`` gives here and, if ``told``, everywhere; where it fails, the first such rank tells."""
        result, refused = None, None
        try:
            result = action()
        except Exception as error:
            refused = error
        code = 0 if refused is None else getattr(refused, "exit_code", 1)
        outcomes = self.gathered((code, result if told else None))
        failed = [rank for rank, (code, _) in enumerate(outcomes) if code]
        if failed and failed[0] == self.rank:
            assert refused is not None
            raise refused
        if failed:
            raise Silent(outcomes[failed[0]][0]) from refused
        return result, [given for _, given in outcomes]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """As described in `World`; the values can be pickled."""
        values: list[Any] = [None] * self.size
        with _reaching():
            dist.all_gather_object(values, value)
        return values

    def stop(self, received: signal.Signals | None) -> signal.Signals | None:
        """As described in `World`."""
        asked = torch.tensor([received or 0])
        with _reaching():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        return signal.Signals(number) if (number := int(asked.item())) else None

    def whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As described in `World`, tensor by tensor on the CPU; of what several ranks have, the first one's."""
        listed = self.gathered({name: (tuple(t.shape), t.dtype) for name, t in weights.items()})
        found: dict[str, Tensor] = {}
        names: set[str] = set()
        for rank, there in enumerate(listed):
            for name, (shape, dtype) in there.items():
                if name in names:
                    continue
                names.add(name)
                if rank == self.rank == 0:
                    found[name] = weights[name].detach().cpu()
                elif self.leads:
                    found[name] = torch.empty(shape, dtype=dtype)
                    with _reaching():
                        dist.recv(_bytes(found[name]), rank)
                elif rank == self.rank:
                    with _reaching():
                        dist.send(_bytes(weights[name].detach().cpu().contiguous()), 0)
        return found


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor on the CPU, whatever its type."""
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def _reaching() -> Iterator[None]:
    """Other ranks, or fail because of them."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another rank cannot be reached: {error}") from error


def _attempt() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _job() -> str:
    """The job's own name if it has one, else the process that started this one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}, process {os.getppid()}" if name == "none" else name


def started_by_torchrun() -> bool:
    """Whether this process is a rank."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def joined(errors: Console) -> Iterator[World]:
    """The world this process belongs to; what ends it early is told once by one of its processes.

    Args:
        errors: Where that is told, if there are several.

    Raises:
        Silent: One of the ranks has told.
        ConfigurationError: The environment describes no world.
    """
    if not started_by_torchrun():
        yield World()
        return
    own = not dist.is_initialized()
    if own:
        _join()
    ranks = Ranks()
    with _named_warnings(ranks):
        try:
            yield ranks
        except (Exception, KeyboardInterrupt) as error:
            raise Silent(ranks.ending.told(error, ranks.name, errors)) from error
        ranks.gathered(None)  # none leaves while another still needs it
    if own:
        dist.destroy_process_group()


def _join() -> None:
    backend = _backend()
    try:
        store, rank, ranks = next(rendezvous("env://"))
        # torchrun's store may outlive its processes: those it starts again must not find what others left there.
        store = dist.PrefixStore(f"attempt {_attempt()}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    except ValueError as error:
        problem = f"{error}; start ranks with torchrun, or unset WORLD_SIZE for a single process"
        raise ConfigurationError("environment", [problem]) from error


def _backend() -> str:
    """What carries messages: between accelerators what torch has for them, NCCL for CUDA; gloo for all else."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    carrier = None if accelerator is None else dist.Backend.default_device_backend_map.get(accelerator.type)
    if accelerator is None or carrier is None or carrier == "gloo" or not dist.is_backend_available(carrier):
        return "gloo"
    return f"cpu:gloo,{accelerator.type}:{carrier}"


@contextmanager
def _named_warnings(ranks: Ranks) -> Iterator[None]:
    """Have warnings say which rank they are of."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: f"{ranks.name}{plain(*args, **options)}"
    try:
        yield
    finally:
        warnings.formatwarning = plain
