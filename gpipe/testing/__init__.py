"""Checks for a user's own CI: the same training to the last bit, and pipelines over several simulated accelerators."""

from gpipe.testing.exact import assert_exact

__all__ = ["assert_exact"]
