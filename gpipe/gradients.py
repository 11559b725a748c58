"""Parameter gradients of one mini-batch.

While the workers run, every micro-batch's backward adds to ``parameter.grad``: autograd's own way, without a second
set of
buffers. What stood there before, and the user's hooks, are set aside. The totals then go back to the caller's autograd
graph, which adds them to what stood there and runs each hook once, on the gradient of the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def trainable(*modules: nn.Module) -> list[Tensor]:
    """The parameters of ``modules`` that need gradients, each once.

    Looked for in every mini-batch, as users may freeze or replace some: so without the names that
    ``nn.Module.parameters`` puts together on its way.
    """
    found: dict[int, Tensor] = {}
    seen: set[nn.Module] = set()
    waiting = list(modules[::-1])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            found.update((id(p), p) for p in module._parameters.values() if p is not None and p.requires_grad)
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


@contextmanager
def collected(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Run backwards inside; afterwards the list given holds each parameter's total, None where none came.

    If the inside raises, partial gradients are dropped and ``parameter.grad`` is as before.
    """
    totals: list[Tensor | None] = []
    before = [p.grad for p in parameters]
    hooked = [p for p in parameters if p._backward_hooks or p._post_accumulate_grad_hooks]
    hooks = [(p, p._backward_hooks, p._post_accumulate_grad_hooks) for p in hooked]
    for p in hooked:
        p._backward_hooks = None
        p._post_accumulate_grad_hooks = {}  # None would leave autograd those it has
    for p in parameters:
        p.grad = None
    try:
        yield totals
        totals.extend(p.grad for p in parameters)
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        for p, backward_hooks, post_hooks in hooks:
            p._backward_hooks = backward_hooks
            p._post_accumulate_grad_hooks = post_hooks
