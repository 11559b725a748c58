"""DistributedGPipe: a pipeline whose stages are the ranks of a torch.distributed world."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gpipe.batchnorm import Statistics, commit, defer
from gpipe.boundary import Boundary
from gpipe.cells import refuse_graphed, refuse_hooks
from gpipe.choosing import AnySchedule, chosen
from gpipe.context import autocast_off, refuse_transforms
from gpipe.gradients import collected, trainable
from gpipe.loss import LossFunction, MicroBatchLoss, check_scaler, checked_loss, first_gradient
from gpipe.microbatch import has_rows, moved, row_count, scatter, split_sizes
from gpipe.minibatch import Finished
from gpipe.ranks import norms
from gpipe.ranks.averaging import Averaging, equalise
from gpipe.ranks.calls import Calls
from gpipe.ranks.flush import Flush, borrowed
from gpipe.ranks.group_transport import GroupTransport
from gpipe.ranks.joining import Settings, join
from gpipe.ranks.rank_batch import RankBatch, deliver, gradients_of, outputs_with_graph
from gpipe.ranks.relay import Relay
from gpipe.ranks.slice_module import SliceModule
from gpipe.ranks.slicing import Factory
from gpipe.recording import Recording
from gpipe.schedule import Schedule
from gpipe.settings import Checkpoint, kept_micro_batches
from gpipe.timeline import Timeline

_pipes = count()  # of this process; ranks make their pipes in the same order


class DistributedGPipe(SliceModule):
    """Trains a sequence of cells as a pipeline over processes: stage k on rank k of a torch.distributed world.

    Made and called on every rank alike. A rank keeps its own stages' cells only: ``parameters()`` and ``state_dict()``
    are those of its slice, under the wrapped module's own names. With the same seed and the same number of intra-op
    threads the weights after n steps equal those of ``GPipe`` to the last bit.

    ``torch.distributed.init_process_group()`` comes first. Messages go over gloo; where each rank has an accelerator of
    its own and the world a backend for it (``"cpu:gloo,cuda:nccl"``), tensors go straight from one to the other. All
    that is issued there comes from the thread that calls the pipe.

    Args:
        module: As for ``GPipe``: it is taken over, and other ranks' parameters are removed from it. Or a callable
            without arguments that makes it: it is called on the meta device, and the own slice alone gets memory and
            initial values, every cell from a seed of its own (``gpipe.ranks.slicing.initialised`` makes the same as a
            whole).
        balance: Number of cells of every stage. None divides by parameter count.
        chunks: Number of micro-batches M; a mini-batch of fewer rows is split into its rows.
        loss_fn: ``loss_fn(outputs, targets)`` gives one number, on the last stage's rank. A module's parameters are
            among that rank's ``parameters()``, as ``loss_fn.*``.
        mesh: A ``DeviceMesh`` of all ranks with one dimension, the pipeline, or with two: replicas of the pipeline,
            each with its own part of the data, and the pipeline (the dimension named "pp", or the last). Gradients
            are averaged over all rows. Micro-batch m of replica r draws as micro-batch r * chunks + m of one pipeline.
            None makes all ranks one pipeline.
        schedule: A name of ``gpipe.schedules.BUILDERS``, such a builder, or a ready ``Schedule``. Worker w is rank w.
            None is ``"gpipe"``, and ``"one_f_one_b"`` with ``two_pass``.
        loss_over: ``"mini_batch"`` calls the loss once on all outputs; ``"micro_batch"`` on every micro-batch, the
            results weighted by rows, which schedules that interleave forward and backward need.
        two_pass: For huge mini-batches under a loss over all of them: a rank keeps no boundary of a micro-batch until
            the loss has come, and runs forward again; as for ``GPipe.train_step``.
        checkpoint: Which micro-batches keep their activations; as for ``GPipe``.
        deferred_batch_norm: Update batch-norm running statistics once per mini-batch; as for ``GPipe``.
        seed: Base seed of random draws and of a factory's weights. None takes one from rank 0's default generator.
        device: Where this rank's stages live. None takes the accelerator of this process's ``LOCAL_RANK``, or the CPU.
            Make it the current one first, as in any program of ranks (``torch.accelerator.set_device_index``): each
            process opens its current device, and CUDA takes half a GiB for that.

    Raises:
        RuntimeError: There is no process group.
        TypeError, ValueError: An argument is not what is described here, does not fit the world, or differs between
            ranks; raised on every rank.
    """

    def __init__(
        self,
        module: nn.Module | Factory,
        balance: Iterable[int] | None = None,
        *,
        chunks: int,
        loss_fn: LossFunction,
        mesh: DeviceMesh | None = None,
        schedule: AnySchedule = None,
        loss_over: Literal["mini_batch", "micro_batch"] = "mini_batch",
        two_pass: bool = False,
        checkpoint: Checkpoint = "except_last",
        deferred_batch_norm: bool = False,
        seed: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        settings = Settings(
            balance,
            chunks,
            loss_fn,
            mesh,
            schedule,
            loss_over,
            two_pass,
            checkpoint,
            deferred_batch_norm,
            seed,
            device,
        )
        joined = join(module, settings, number=next(_pipes))
        super().__init__(joined, loss_fn)
        self.chunks, self.checkpoint, self.seed = chunks, joined.checkpoint, joined.seed
        self.schedule, self.loss_over = schedule, loss_over
        self.two_pass, self.deferred_batch_norm = two_pass, deferred_batch_norm
        self.step = 0
        self.recording = Recording()
        self.metered = False
        self._began = False
        self._averaging: Averaging | None = None
        if joined.share.position.group is not None:
            self._averaging = Averaging(joined.share.position, self._averaged(), self.device)
            joined.wires.take_in(self._averaging.group, self._averaging.accelerated, self._averaging.busy)
        self._statistics: Statistics | None = {} if deferred_batch_norm else None
        if deferred_batch_norm:
            for _, cell in self._cells:
                defer(cell)
        give_up = None if self._averaging is None else self._averaging.give_up
        self._calls = Calls(joined.wires, joined.board, self._share.rank, give_up)
        weakref.finalize(self, self._calls.close)

    def train_step(
        self, inputs: Any = None, targets: Any = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Forward, loss and backward; gradients are added to ``parameter.grad``. Called on every rank.

        Args:
            inputs: What the first cell takes, any pytree with a tensor (rows, ...); used on the first stage's rank.
            targets: Any pytree but None, for ``loss_fn``; used on the last stage's rank.
            scaler: Scales the loss that goes backward, for float16; on every rank one of the same scale, such as
                ``torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler``, whose step all ranks skip together.

        Returns:
            The loss, without graph and not scaled, on every rank; of replicas the mean over their rows.

        Raises:
            TypeError: ``scaler`` is none; the pipe stays as it was.
            OtherRankFailed: Another rank failed; the message says which, where and why. RankLost: It cannot be reached.
            RuntimeError: The pipe is broken by an earlier failure, or the wrapped module has forward or backward hooks.
            BaseException: What a cell of this rank raised, with a note naming stage, cell, micro-batch and action.
        """
        check_scaler(scaler)
        with self._calls.running(self.step) as transport:
            if self._averaging is not None:
                self._averaging.expect()
            relay = Relay(self._share.position, transport)
            rows = self._started(relay, "train_step", inputs)
            relay.will_be_done()
            self._check_step(targets, rows)
            scale = first_gradient(scaler, self.device)
            parts = self._parts(inputs)
            own = self._mini_batch_step if self.loss_over == "mini_batch" else self._micro_batch_step
            mine, done, batch = own(transport, parts, targets, rows, scale)
            flush = Flush(self._share, transport, self._averaging)
            flush.begin(done, batch.parts, rows)
            told = relay.all_done({} if mine is None else {self._share.position.replica: (mine.cpu(), rows)})
            flush.end(sum(count for _, count in told.values()))
            self._commit()
            self._equalise_buffers()
            transport.flush()
            deliver(done, parts)
            self.step += self.training
        return self._here(_mean(told))

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale down the gradients of all ranks where their norm together is larger. Called on every rank.

        A parameter that several ranks have counts once. The result is that of ``torch.nn.utils.clip_grad_norm_`` on the
        whole module's parameters followed by the loss's.

        Args:
            max_norm: The largest norm.
            norm_type: p of the p-norm; ``inf`` is the largest absolute value.
            error_if_nonfinite: Raise where the norm is no finite number.

        Returns:
            The norm before, on every rank.

        Raises:
            RuntimeError: The norm is not finite, on every rank; or as ``train_step``.
        """
        with self._calls.running(self.step) as transport:
            relay = Relay(self._share.position, transport)
            relay.start("clip_grad_norm_", "training" if self.training else "eval", self.step)
            relay.will_be_done()
            named = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
            told = relay.all_done(norms.norms(named, norm_type))
            transport.flush()
        total = self._here(norms.total([told[name] for name in self._in_order(told)], norm_type, error_if_nonfinite))
        nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, total)
        return total

    def forward(self, inputs: Any = None) -> Any:
        """Run a mini-batch forward without graph, in the cells' present mode. Called on every rank.

        Args:
            inputs: As for ``train_step``.

        Returns:
            What the last cell returns, the micro-batches' tensors concatenated, on the last stage's rank; elsewhere
            None.

        Raises:
            OtherRankFailed, RuntimeError, BaseException: As ``train_step``.
        """
        with self._calls.running(self.step) as transport, torch.no_grad():
            relay = Relay(self._share.position, transport)
            rows = self._started(relay, "forward", inputs)
            equal = self.training and self._averaging is not None
            if equal:
                relay.will_be_done()
            batch = self._batch(transport, rows, None, [])
            outputs = batch.forward([Boundary.of(part) for part in self._parts(inputs)])
            if equal:
                relay.all_done({})
            self._commit()
            if equal:
                self._equalise_buffers()
            transport.flush()
            self.step += self.training
            return None if outputs is None else batch.gathered([output.tree() for output in outputs])

    def eval_step(self, inputs: Any = None) -> Any:
        """The same as ``forward``; call ``eval()`` before, as with any module."""
        return self(inputs)

    @property
    def devices(self) -> list[torch.device]:
        """Of every stage of this rank."""
        return [self.device] * len(self._share.stages)

    @property
    def timeline(self) -> Timeline:
        """When this rank did what in the latest mini-batch; waits until an accelerator has done it."""
        return self.recording.timeline()

    def _mini_batch_step(
        self, transport: GroupTransport, parts: list[Any], targets: Any, rows: int, scale: Tensor
    ) -> tuple[Tensor | None, Finished, RankBatch]:
        batch = self._batch(transport, rows, None, trainable(self._slice), self.two_pass)
        outputs = batch.forward([Boundary.of(part) for part in parts])
        if outputs is None:
            return None, batch.backward([]), batch
        trees, collector = outputs_with_graph(outputs)
        loss_fn = self.loss_fn
        loss = checked_loss(loss_fn(batch.gathered(trees), moved(targets, self.device)))
        own = trainable(loss_fn) if isinstance(loss_fn, nn.Module) else []
        with autocast_off(), collected(own) as of_loss:
            loss.backward(scale.to(loss.dtype))  # type: ignore[no-untyped-call]
        arrived = gradients_of(collector, outputs)
        del trees, outputs  # the backward has its own use for their memory
        done = batch.backward(arrived)
        done.and_also(own, of_loss)
        return loss.detach(), done, batch

    def _micro_batch_step(
        self, transport: GroupTransport, parts: list[Any], targets: Any, rows: int, scale: Tensor
    ) -> tuple[Tensor | None, Finished, RankBatch]:
        head = self._head(targets, rows) if self._share.is_last else None
        batch = self._batch(transport, rows, head, trainable(*self._modules_here))
        shares, done = batch.forward_and_backward([Boundary.of(part) for part in parts], scale)
        loss = None if shares is None else torch.stack([share.leaves[0] for share in shares]).sum()
        return loss, done, batch

    def _commit(self) -> None:
        """Update running statistics, once the mini-batch has gone through on this rank, or in a step on all."""
        if self._statistics:
            commit(self._statistics)
            self._statistics.clear()

    def _equalise_buffers(self) -> None:
        """Give the first replica's to the others, once all ranks have run their cells: none is waited for in vain."""
        if self._averaging is not None:
            equalise([b for m in self._modules_here for b in m.buffers()], self._share.position)

    def _head(self, targets: Any, rows: int) -> MicroBatchLoss:
        sizes, there = split_sizes(rows, self.chunks), moved(targets, self.device)
        aims = scatter(there, self.chunks) if has_rows(there) else [there] * len(sizes)
        return MicroBatchLoss(self.loss_fn, aims, sizes)

    def _rows(self, inputs: Any) -> int | None:
        if not self._share.is_first:
            return None
        if inputs is None:
            raise ValueError(
                f"rank {self._share.rank} hosts the first stage and was given no inputs: give them to it, at least"
            )
        return row_count(inputs)

    def _started(self, relay: Relay, call: str, inputs: Any) -> int:
        if not self._began:
            refuse_graphed(self._cells)  # since it was wrapped, before the first mini-batch
            self._began = True
        rows = relay.start(call, "training" if self.training else "eval", self.step, self._rows(inputs))
        assert rows is not None
        return rows

    def _parts(self, inputs: Any) -> list[Any]:
        return scatter(moved(inputs, self.device), self.chunks) if self._share.is_first else []

    def _batch(
        self,
        transport: GroupTransport,
        rows: int,
        head: MicroBatchLoss | None,
        parameters: list[Tensor],
        two_pass: bool = False,
    ) -> RankBatch:
        stages, micro_batches = len(self._share.hosts), len(split_sizes(rows, self.chunks))
        keep = kept_micro_batches(self.checkpoint, stages, micro_batches)
        if not torch.is_grad_enabled():
            keep = (micro_batches,) * stages
        refuse_transforms(parameters)
        schedule: Schedule = chosen(self.schedule, stages, micro_batches, keep, two_pass)
        batch = RankBatch(
            self._share,
            schedule,
            transport,
            seed=self.seed,
            step=self.step,
            first=self._share.position.replica * self.chunks,
            head=head,
            parameters=parameters,
            two_pass=two_pass,
            statistics=self._statistics,
            metered=self.metered,
        )
        self.recording = batch.recording
        return batch

    def _check_step(self, targets: Any, rows: int) -> None:
        """Raise what speaks against a training step on this rank."""
        if not torch.is_grad_enabled():
            raise RuntimeError("train_step computes gradients: call it outside torch.no_grad() and inference_mode()")
        refuse_hooks(self, "train_step")
        if self._averaging is not None:
            self._averaging.check(self._averaged())
        if not self._share.is_last:
            return
        if targets is None:
            raise ValueError(
                f"rank {self._share.rank} hosts the last stage and was given no targets: give them to train_step "
                "there, or () if loss_fn takes none"
            )
        if has_rows(targets) and (given := row_count(targets)) != rows:
            raise ValueError(f"inputs have {rows} rows, targets have {given}: give one target per row")

    def _averaged(self) -> list[Tensor]:
        """The parameters whose gradients this rank averages with the other replicas."""
        return [p for p in trainable(*self._modules_here) if p not in borrowed(self._share)]

    def _here(self, number: Tensor) -> Tensor:
        """A number on the CPU as one on the rank's device, for which the host does not wait."""
        return torch.full((), number.item(), dtype=number.dtype, device=self.device)

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """Names as the whole module has them, then the loss's."""
        places = {name: i for i, name in enumerate(self._order)}
        return sorted(names, key=lambda name: places.get(name, len(places)))


def _mean(told: Mapping[int, tuple[Tensor, int]]) -> Tensor:
    """The loss over all rows, from every replica's and its number of rows."""
    shares = [told[replica] for replica in sorted(told)]
    shares = [(loss, rows) for loss, rows in shares if rows] or shares[:1]  # a mean over no rows is no number
    if len(shares) == 1:
        return shares[0][0]
    return torch.stack([loss * rows for loss, rows in shares]).sum() / sum(rows for _, rows in shares)
