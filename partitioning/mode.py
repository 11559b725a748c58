"""A dispatch mode that threads may enter and leave in any order."""

from __future__ import annotations

from typing import Self

from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode


class ThreadMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators of the threads that are inside, and leaves no trace in the process."""

    def __enter__(self) -> Self:
        # Not as inherited: that keeps flags of the process, which threads leaving in another order than they came
        # would leave set for ever, and torch.compile would silently do nothing from then on.
        _push_on_torch_dispatch_stack(self)
        return self

    def __exit__(self, *error: object) -> None:
        _pop_torch_dispatch_stack(None)
