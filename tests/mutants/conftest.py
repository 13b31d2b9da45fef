"""What the crash tests have: how many states to look at, and silence about journals that were killed."""

from ..crash.conftest import crash_states, quiet

__all__ = ["crash_states", "quiet"]
