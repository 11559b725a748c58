"""GPipe: the module users wrap with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations, pairwise
from typing import Any, Literal, NoReturn, Self, overload

import torch
from torch import Tensor, nn

from gpipe import batchnorm, lanes
from gpipe.autograd import attach
from gpipe.balancing import MemoryLimit, planned
from gpipe.boundary import Boundary
from gpipe.cells import entry, links, refuse_graphed, refuse_hooks, registries, shared_buffers, switched
from gpipe.choosing import AnySchedule, chosen
from gpipe.context import autocast_off, refuse_transforms
from gpipe.gradients import trainable
from gpipe.loss import LossFunction, MicroBatchLoss, check_scaler, checked_loss, first_gradient
from gpipe.microbatch import gather, has_rows, moved, row_count, scatter, split_sizes
from gpipe.minibatch import MiniBatch, Pipeline
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.skips import skips_of
from gpipe.recording import Recording
from gpipe.settings import (
    Checkpoint,
    check_checkpoint,
    check_chunks,
    check_devices,
    check_passes,
    check_seed,
    kept_micro_batches,
)
from gpipe.stage import Head, Stage
from gpipe.tied import Ties
from gpipe.timeline import Timeline
from gpipe.ways import Ways, ways_of
from gpipe.worker import CallersThread, Workers, workers_for

_MADE_AGAIN = ("_stages", "_workers", "_lock", "_ties", "_links", "recording")  # by _build: no pickle keeps them


class GPipe(nn.Module):
    """Trains a sequence of cells as a pipeline, with the results of the module it wraps.

    ``y = pipe(x)`` splits the mini-batch into micro-batches and runs them through the stages at the same time; the
    output
    belongs to autograd, and ``loss.backward()`` runs the backward pipeline. Parameters, buffers, ``state_dict()``
    and hooks are those of the wrapped module, under its own names. GPipe, arXiv 1811.06965.

    Args:
        module: An ``nn.Sequential``, whose children are the cells, or a module with a method ``cells()`` that
            returns its cells in order. Its parameters are moved to the stages' devices in place.
        balance: Number of cells of every stage. None divides by parameter count into as many stages as there are
            devices.
        devices: One for every stage; a device may be named several times. None takes every accelerator, or the CPU once
            per stage where there is none.
        chunks: Number of micro-batches M; a mini-batch of fewer rows is split into its rows.
        checkpoint: Which micro-batches keep their activations instead of re-materialising them: ``"always"`` none,
            ``"except_last"`` the last (it goes backward first, so this costs no memory), ``"never"`` all, an int the
            last so many, or one int per stage; ``"auto"`` as many as fit ``memory_limit``, stage by stage.
        deferred_batch_norm: Update batch-norm running statistics once per mini-batch, as one pass over it would.
        sample: A mini-batch of inputs to profile the cells on; ``pipe.partition`` then says what was found, and why.
        memory_limit: Bytes, or text such as ``"20GiB"``, for every device or one per device: what parameters,
            gradients, Adam's state, boundaries and activations may take. The partition keeps to it; needs ``sample``.
            Of an accelerator leave room for what is not counted: the driver's context (about 0.5 GB), workspaces of
            libraries, NCCL's buffers, what the allocator cannot use of its free pieces, and with replicas a float32
            copy of the gradients. 1.5 GB less than the device has, and the copy, is a start.
        seed: Base seed of random draws in the cells. None draws it from torch's default generator.

    Raises:
        TypeError, ValueError: An argument is not what is described here; the message says what to do.
        IndexError: Fewer devices than stages.
    """

    def __init__(
        self,
        module: nn.Module,
        balance: Iterable[int] | None = None,
        *,
        devices: Iterable[int | str | torch.device] | None = None,
        chunks: int = 1,
        checkpoint: Checkpoint | Literal["auto"] = "except_last",
        deferred_batch_norm: bool = False,
        sample: Any = None,
        memory_limit: MemoryLimit | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        cells = cells_of(module)
        if isinstance(devices, Iterator):
            devices = list(devices)
        self.chunks = check_chunks(chunks)
        plan = planned(module, cells, balance, devices, self.chunks, checkpoint, sample, memory_limit)
        self.balance, self.partition = plan.balance, plan.partition
        self.devices = check_devices(devices, len(self.balance)) if self.balance else []
        self.checkpoint = check_checkpoint(plan.checkpoint, len(self.balance))
        self.deferred_batch_norm = deferred_batch_norm
        self.seed = check_seed(seed)
        self.step = 0
        self._intra_op_threads = max(1, torch.get_num_threads() // max(1, len(self.balance)))
        refuse_graphed(cells)
        vars(self).update(registries(module), module=module)
        self._build(cells)
        if deferred_batch_norm:
            batchnorm.defer(module)

    def forward(self, inputs: Any) -> Any:
        """Run a mini-batch through the pipeline.

        Args:
            inputs: What the first cell takes: any pytree with at least one tensor (rows, ...); all tensors of one or
                more dimensions have the same number of rows and are split along it.

        Returns:
            What the last cell returns, the micro-batches' tensors concatenated; on the last stage's device.

        Raises:
            TypeError, ValueError: The inputs cannot be split, or the outputs cannot be put together.
            BaseException: What a cell raised, with a note naming stage, cell, micro-batch and action.
        """
        if not self._stages:
            return inputs
        return self._run(inputs)

    def _run(self, inputs: Any, schedule: AnySchedule = None, two_pass: bool = False) -> Any:
        """All forwards of a mini-batch; autograd runs the rest of the schedule, or the second pass."""
        with self._taken():
            parts = self._scattered(inputs)
            batch = self._mini_batch(len(parts), schedule, two_pass=two_pass)
            outputs = batch.forward([Boundary.of(part) for part in parts])
            self.step += self.training
        trees = attach(batch, parts, outputs) if torch.is_grad_enabled() else [output.tree() for output in outputs]
        meters = batch.recording.meters
        with nullcontext() if meters is None else meters.counting(len(self._stages) - 1):
            return gather(trees)

    def train_step(
        self,
        inputs: Any,
        targets: Any,
        loss_fn: LossFunction,
        loss_over: Literal["mini_batch", "micro_batch"] = "mini_batch",
        *,
        schedule: AnySchedule = None,
        two_pass: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Forward, loss and backward in one call; gradients are added to ``parameter.grad``.

        With float16 on an accelerator, for instance::

            scaler = torch.amp.GradScaler("cuda")
            for inputs, targets in data:
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.float16):
                    loss = pipe.train_step(inputs, targets, loss_fn, "micro_batch", scaler=scaler)
                scaler.step(optimizer)
                scaler.update()

        Args:
            inputs: As for ``forward``.
            targets: Any pytree; its tensors have as many rows as those of ``inputs``. Moved to the last stage's device.
            loss_fn: ``loss_fn(outputs, targets)`` gives one number. If it is a module, its parameters get gradients
                too.
            loss_over: ``"mini_batch"`` calls it once on all outputs. ``"micro_batch"`` calls it in the last stage on
                every micro-batch and adds the results weighted by rows, which is the same for a mean over rows.
            schedule: A name of ``gpipe.schedules.BUILDERS``, or such a builder. Those that interleave forward and
                backward need ``loss_over="micro_batch"`` or ``two_pass``. Or a ``Schedule`` for as many stages and
                micro-batches as there are, with its own recompute: ``checkpoint`` then does not count. None is
                ``"gpipe"``, and ``"one_f_one_b"`` with ``two_pass``.
            two_pass: For huge mini-batches under a loss over all of them: first all forwards, of which the outputs
                alone are kept, and the loss; then every micro-batch forward again, and backward, as ``schedule`` and
                ``checkpoint`` say. The same bits for a forward more; a stage holds the micro-batches under way instead
                of a boundary of each. ``schedule`` goes from the last micro-batch to the first, so that gradients are
                added up as in one pass, unless it is a ``Schedule``. ``checkpoint="never"`` spares a third forward, and
                under 1F1B a stage then keeps the activations of no more micro-batches than there are stages. In the
                second pass ``is_recomputing()`` is true, and the timeline shows its forwards as recomputes, R.
            scaler: Scales the loss that goes backward, for float16; its ``unscale_``, ``step`` and ``update`` are the
                caller's.

        Returns:
            The loss, without graph and not scaled.

        Raises:
            TypeError, ValueError: An argument is not what is described here; the message says what to do.
            RuntimeError: Gradients are off; the wrapped module has forward or backward hooks of its own, which only the
                default way runs; or a cell or ``loss_fn`` calls the pipe within its own mini-batch.
            BaseException: What a cell raised, as for ``forward``.
        """
        if loss_over not in ("mini_batch", "micro_batch"):
            raise ValueError(f"loss_over must be 'mini_batch' or 'micro_batch', got {loss_over!r}")
        check_passes(two_pass, loss_over)
        check_scaler(scaler)
        if not torch.is_grad_enabled():
            raise RuntimeError("train_step computes gradients: call it outside torch.no_grad() and inference_mode()")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable with outputs and targets, got {type(loss_fn).__name__}")
        rows = row_count(inputs)
        self._check_targets(targets, rows)
        if loss_over == "mini_batch" or not self._stages:
            default = schedule is None and not two_pass
            if not default:
                refuse_hooks(self, "train_step with a schedule or two_pass")
            outputs = self(inputs) if default or not self._stages else self._run(inputs, schedule, two_pass)
            loss = checked_loss(loss_fn(outputs, self._on_last(targets)))
            del outputs
            with autocast_off():
                (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        refuse_hooks(self, "train_step with loss_over='micro_batch'")
        return self._micro_batch_step(inputs, targets, loss_fn, rows, schedule, scaler)

    def _micro_batch_step(
        self,
        inputs: Any,
        targets: Any,
        loss_fn: LossFunction,
        rows: int,
        schedule: AnySchedule,
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor:
        with self._taken():
            parts = self._scattered(inputs)
            aims = scatter(self._on_last(targets), len(parts)) if has_rows(targets) else [targets] * len(parts)
            head = MicroBatchLoss(loss_fn, aims, split_sizes(rows, self.chunks))
            batch = self._mini_batch(len(parts), schedule, head)
            summed, done = batch.forward_and_backward(
                [Boundary.of(part) for part in parts], first_gradient(scaler, self.devices[-1])
            )
            self.step += self.training
        (loss,) = attach(done, parts, [summed])
        if loss.requires_grad:
            loss.backward()
        total: Tensor = loss.detach()
        return total

    @property
    def timeline(self) -> Timeline:
        """When every worker did what in the latest mini-batch; waits until accelerators have done it."""
        return self.recording.timeline()

    def train(self, mode: bool = True) -> Self:
        """Set training mode on the wrapped module and its cells."""
        switched(vars(self)["module"], self._cells, mode)
        self.training = mode
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        vars(self)["module"]._save_to_state_dict(*args, **kwargs)  # which may be of the module's own making

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        vars(self)["module"]._load_from_state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of the wrapped module; parameters stay on, or come to, their stage's device."""
        result = super().load_state_dict(*args, **kwargs)
        if kwargs.get("assign") or len(args) > 2:
            self._build(cells_of(vars(self)["module"]))
        return result

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Cast the parameters; refuses to move them, since every stage has a device of its own."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self._refuse_move(str(device))
        return super().to(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with shared_buffers(vars(self)["module"], self._cells):
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]

    def cuda(self, device: Any = None) -> NoReturn:
        """Refused: every stage has a device of its own."""
        self._refuse_move("cuda")

    def cpu(self) -> NoReturn:
        """Refused: every stage has a device of its own."""
        self._refuse_move("cpu")

    def _refuse_move(self, target: str) -> NoReturn:
        raise TypeError(
            f"a pipe's stages stay on their own devices ({', '.join(map(str, self.devices))}) and cannot all be moved "
            f"to {target}: give devices= when wrapping, or move the wrapped module before"
        )

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[nn.Module]:
        return (cell for _, cell in self._cells)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...
    def __getitem__(self, index: int | slice) -> nn.Module:
        cells = [cell for _, cell in self._cells]
        if isinstance(index, slice):
            return nn.Sequential(*cells[index])
        if not -len(cells) <= index < len(cells):
            raise IndexError(f"the pipe has {len(cells)} cells, there is none at index {index}")
        return cells[index]

    def extra_repr(self) -> str:
        """Balance, devices, chunks and checkpoint, for ``repr``."""
        devices = [str(d) for d in self.devices]
        return f"balance={self.balance}, devices={devices}, chunks={self.chunks}, checkpoint={self.checkpoint!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _MADE_AGAIN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build(self._cells)

    def _build(self, cells: list[tuple[str, nn.Module]]) -> None:
        """Make the stages; everything here can be made again from what a pickle keeps."""
        self._cells = cells
        ends = [sum(self.balance[:k]) for k in range(len(self.balance) + 1)]
        groups = [cells[left:right] for left, right in pairwise(ends)]
        self._ties = Ties(groups)
        self._links = links(vars(self)["module"], cells)
        ways = ways_of(skips_of(cells), self.balance)
        with shared_buffers(vars(self)["module"], cells):
            for group, device in zip(groups, self.devices, strict=True):
                for _, cell in group:
                    cell.to(device)
        self._stages = [
            Stage(k, group, ends[k], device, self.devices.count(device) == 1, ways[k])
            for k, (group, device) in enumerate(zip(groups, self.devices, strict=True))
        ]
        lanes.check(self._crossings(ways))
        self._workers: Workers | CallersThread | None = None
        self._lock = threading.RLock()
        self.recording = Recording()
        self.metered = False

    def _crossings(self, ways: Sequence[Ways]) -> Iterator[tuple[torch.device, torch.device]]:
        """From which device to which something goes: boundaries, values that skip stages, tied parameters; and back."""
        together = [*pairwise(range(len(ways))), *((k, t) for k, one in enumerate(ways) for t in one.targets)]
        for _, groups in self._ties.current():
            together += combinations(dict.fromkeys(place.stage for places in groups for place in places), 2)
        for a, b in together:
            yield self.devices[a], self.devices[b]
            yield self.devices[b], self.devices[a]

    def _mini_batch(
        self, micro_batches: int, schedule: AnySchedule, head: Head | None = None, two_pass: bool = False
    ) -> MiniBatch:
        module = vars(self)["module"]
        others = isinstance(module, nn.Sequential) and list(module._modules.values()) != [c for _, c in self._cells]
        if others or any(entry(parent._modules, name) is not part for part, (parent, name) in self._links.items()):
            raise RuntimeError("the wrapped module's cells were replaced after wrapping: wrap the module again")
        if self._workers is None or not self._workers.usable():
            refuse_graphed(self._cells)  # since it was wrapped, before the first mini-batch
            self._workers = workers_for(len(self._stages), self._intra_op_threads)
        keep = kept_micro_batches(self.checkpoint, len(self._stages), micro_batches)
        if not torch.is_grad_enabled():
            keep = (micro_batches,) * len(self._stages)
        modules = [self] if head is None or head.module is None else [self, head.module]
        parameters = trainable(*modules)
        refuse_transforms(parameters if torch.is_grad_enabled() else ())
        batch = MiniBatch(
            Pipeline(self._stages, self._workers, self._lock, parameters, self._ties.current()),
            chosen(schedule, len(self._stages), micro_batches, keep, two_pass),
            seed=self.seed,
            step=self.step,
            defer_batch_norm=self.deferred_batch_norm,
            head=head,
            metered=self.metered,
            two_pass=two_pass,
        )
        self.recording = batch.recording
        return batch

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """One mini-batch at a time."""
        if self._workers is not None and self._workers.inside():
            raise RuntimeError(
                "the pipe is called from within its own mini-batch, by a cell or by loss_fn on a micro-batch, and "
                "would wait for itself: call the unwrapped module there, or use loss_over='mini_batch'"
            )
        with self._lock:
            yield

    def _scattered(self, inputs: Any) -> list[Any]:
        return scatter(moved(inputs, self.devices[0]), self.chunks)

    def _on_last(self, targets: Any) -> Any:
        return moved(targets, self.devices[-1]) if self.devices else targets

    def _check_targets(self, targets: Any, rows: int) -> None:
        if has_rows(targets) and (given := row_count(targets)) != rows:
            raise ValueError(f"inputs have {rows} rows, targets have {given}: give one target per row")
