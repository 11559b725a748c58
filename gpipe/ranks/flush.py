"""The end of a rank's mini-batch: from its own gradients to those that all ranks agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gpipe.minibatch import Finished
from gpipe.ranks.averaging import Averaging
from gpipe.ranks.group_transport import GroupTransport
from gpipe.ranks.share import Share
from gpipe.ranks.tied_ranks import SharedValues


class Flush:
    """Adds up what cells on several ranks gave to a parameter, then takes the mean over the replicas.

    Args:
        share: What the rank has.
        transport: The channels of the step.
        averaging: With the replicas, if there are any.
    """

    def __init__(self, share: Share, transport: GroupTransport, averaging: Averaging | None) -> None:
        self._values = SharedValues(share.shared, share.position, transport)
        self._borrowed = borrowed(share)
        self._averaging = averaging
        self._check = transport.check

    def begin(self, done: Finished, parts: Mapping[Tensor, Sequence[Tensor | None]], rows: int) -> None:
        """Start, when the rank's own backwards are done.

        Args:
            done: This rank's gradients, without those of shared parameters.
            parts: For every shared parameter what each of the rank's cells gave.
            rows: Of this pipeline's mini-batch.
        """
        self._done, self._owned = done, self._values.gathered(parts)
        self._place(self._owned)
        if self._averaging is not None:
            self._averaging.begin(self._averaged(), rows)

    def end(self, rows: int) -> None:
        """Bring the gradients into ``done``, when all ranks have begun; ``rows`` are those of all replicas."""
        if self._averaging is not None:
            means = iter(self._averaging.end(self._averaged(), rows, self._check))
            self._place({p: next(means) for p in self._done.parameters if p not in self._borrowed})
        by_parameter = self._by_parameter()
        self._place(self._values.handed_out({p: by_parameter.get(p) for p in self._owned}))

    def _averaged(self) -> list[Tensor | None]:
        return [total for p, total in self._by_parameter().items() if p not in self._borrowed]

    def _by_parameter(self) -> dict[Tensor, Tensor | None]:
        return dict(zip(self._done.parameters, self._done.totals, strict=True))

    def _place(self, totals: Mapping[Tensor, Tensor | None]) -> None:
        self._done.totals = [totals.get(p, t) for p, t in self._by_parameter().items()]


def borrowed(share: Share) -> set[Tensor]:
    """The shared parameters whose gradients another rank adds up."""
    return {s.parameter for s in share.shared if s.owner != share.worker}
