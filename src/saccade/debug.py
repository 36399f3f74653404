"""The switch that turns skipped faults on the GPU into errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# A plain module global: a ContextVar breaks torch.compile(fullgraph=True).
_enabled = os.environ.get("SACCADE_DEBUG", "0") not in ("", "0")


def debug_checks_enabled() -> bool:
    """Whether data-dependent faults on the GPU raise."""
    return _enabled


@contextmanager
def debug_checks(enabled: bool) -> Iterator[None]:
    """Raise on data-dependent faults on the GPU within this context, at the price of a synchronize per call.

    Without it an element with a bad index (a map index out of range, a map that reaches beyond the features) is skipped
    on the GPU: nothing is read or written for it, and no error tells. On the CPU such faults always raise. The
    environment variable ``SACCADE_DEBUG=1`` has the same effect for a whole process.

    Args:
        enabled: ``True`` to check, ``False`` to skip silently.

    Example:
        >>> import saccade
        >>> with saccade.debug_checks(True):
        ...     pass  # the training step that misbehaves
    """
    global _enabled
    before = _enabled
    _enabled = bool(enabled)
    try:
        yield
    finally:
        _enabled = before
