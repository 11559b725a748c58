"""What a mini-batch's forward found in its modules, so that a recompute, whatever came between, finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from gpipe.cells import entry
from gpipe.memory import address, version


class Found:
    """The parameters of some modules, whether they are trained, and the modules' training flags.

    Args:
        modules: The modules, without their children.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._training = {m: m.training for m in modules}
        self._parameters = {(m, name): p for m in modules for name, p in m._parameters.items() if p is not None}
        self._trained = {p: p.requires_grad for p in self._parameters.values()}
        self._values = self._identified()

    def check(self) -> None:
        """Raise a RuntimeError if a parameter has another value since."""
        if self._values != self._identified():
            raise RuntimeError(
                "a parameter was modified in place after forward began - by optimizer.step(), by load_state_dict(), or "
                "by a cell itself, as nn.Embedding(max_norm=...) does - so a recompute would not repeat the forward: "
                "call backward before, or wrap with checkpoint='never' and leave two_pass out"
            )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back in place inside: flags that were set since, parameters that were replaced."""
        training = {m: m.training for m, flag in self._training.items() if m.training != flag}
        parameters = {(m, name): entry(m._parameters, name) for m, name in self._parameters}
        trained = {p: p.requires_grad for p, flag in self._trained.items() if p.requires_grad != flag}
        for p in trained:
            p.requires_grad_(self._trained[p])
        for m in training:
            m.training = self._training[m]
        for (m, name), p in self._parameters.items():
            m._parameters[name] = p
        try:
            yield
        finally:
            for m, flag in training.items():
                m.training = flag
            for p, flag in trained.items():
                p.requires_grad_(flag)
            for (m, name), now in parameters.items():
                m._parameters[name] = now

    def _identified(self) -> list[tuple[int, int]]:
        return [(version(p), address(p)) for p in self._parameters.values()]
