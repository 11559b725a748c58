"""What a rank has of a wrapped module, as a module: the slice's parameters and state under the whole module's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Self

import torch
from torch import nn

from gpipe.cells import registries, shared_buffers, switched
from gpipe.ranks.joining import Joined


class SliceModule(nn.Module):
    """A slice that stands in for the module it was taken from.

    Args:
        joined: What the rank got when it joined the pipeline.
        loss_fn: The pipeline's loss, which the last stage's rank keeps.
    """

    module: nn.Module
    loss_fn: Any

    def __init__(self, joined: Joined, loss_fn: Any) -> None:
        super().__init__()
        vars(self).update(registries(joined.module), module=joined.module)
        vars(self)["loss_fn"] = loss_fn if joined.share.is_last else None  # no child: state_dict() is the module's
        self._cells, self._share, self._names = joined.cells, joined.share, joined.names
        self._order, self._first_names = joined.order, joined.first_names
        self.balance, self.device = joined.balance, joined.share.device

    @property
    def state_keys(self) -> frozenset[str]:
        """Keys of the whole module's ``state_dict()``: this rank's and all others'."""
        return self._names

    @property
    def _slice(self) -> nn.Module:
        return vars(self)["module"]  # type: ignore[no-any-return]

    @property
    def _modules_here(self) -> list[nn.Module]:
        """The slice, and the loss where it is computed, if it is a module."""
        loss_fn = vars(self)["loss_fn"]
        return [self._slice, loss_fn] if isinstance(loss_fn, nn.Module) else [self._slice]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of this rank's slice, and on the last stage's rank the loss's as ``loss_fn.*``.

        Each once, under the first name that the whole module has for it.
        """
        seen: set[nn.Parameter] = set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            seen.add(parameter)
            first = self._first_names.get(parameter) if remove_duplicate else None
            yield (name if first is None else f"{prefix}.{first}" if prefix else first), parameter
        loss = vars(self)["loss_fn"]
        if isinstance(loss, nn.Module) and recurse:
            inner = f"{prefix}.loss_fn" if prefix else "loss_fn"
            for name, parameter in loss.named_parameters(inner, recurse, remove_duplicate):
                if parameter not in seen:
                    yield name, parameter

    def train(self, mode: bool = True) -> Self:
        """Set training mode on this rank's cells and, where it is, the loss."""
        switched(self._slice, self._cells, mode)
        self.training = mode
        if isinstance(vars(self)["loss_fn"], nn.Module):
            vars(self)["loss_fn"].train(mode)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load this rank's part of a state, which may be the whole module's: other ranks' keys are passed over.

        Args:
            state_dict: Tensors by the module's own names.
            strict: Refuse keys that are missing here, or that the module has not.
            assign: Must be False: values are copied into the parameters there are.

        Raises:
            ValueError: ``assign`` is True. RuntimeError: As ``nn.Module.load_state_dict``.
        """
        if assign:
            raise ValueError("assign=True would replace parameters that the stages hold: leave it out")
        own = set(self.state_dict())
        mine = {key: value for key, value in state_dict.items() if key in own or key not in self._names}
        return super().load_state_dict(mine, strict)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._slice._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._slice._load_from_state_dict(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Cast the parameters; refuses to move them."""
        if torch._C._nn._parse_to(*args, **kwargs)[0] is not None:
            self._refuse_move()
        return super().to(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with shared_buffers(self._slice, self._cells):
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]

    def cuda(self, device: Any = None) -> NoReturn:
        """Refused: a rank's stages stay on its device."""
        self._refuse_move()

    def cpu(self) -> NoReturn:
        """Refused: a rank's stages stay on its device."""
        self._refuse_move()

    def _refuse_move(self) -> NoReturn:
        raise TypeError(f"a rank's stages stay on its device, {self.device}: give device= when wrapping")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a DistributedGPipe is tied to its process and cannot be pickled: save state_dict()")

    def extra_repr(self) -> str:
        """Rank, own stages, balance and chunks, for ``repr``."""
        stages = ", ".join(map(str, self._share.stages.values()))
        return f"rank={self._share.rank}, {stages}, balance={self.balance}, chunks={self.chunks}"
