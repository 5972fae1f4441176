"""Refuse calls of one module by several threads at once, where a call keeps what is its own in the module's layers."""

import threading


class OneThread:
    """The thread whose call of a module runs. Modules that are replicas of one another have one each.

    Args:
        kept: what a call keeps in the layers, for the error.
    """

    def __init__(self, kept: str) -> None:
        self._kept = kept
        self._runs: dict[int, int] = {}  # threads by module: `setdefault` lets one of them in

    def begin(self, module: object) -> bool:
        """Let this thread in, and return whether no call of its own is around this one.

        Raises:
            RuntimeError: while a call of another thread runs.
        """
        own = threading.get_ident()
        is_inner = self._runs.get(id(module)) == own
        other = self._runs.setdefault(id(module), own)
        if other != own and any(thread.ident == other for thread in threading.enumerate()):
            raise RuntimeError(
                f"adapt.module: expected this module to run in one thread at a time, since a call keeps {self._kept} in its layers, found "
                "that another thread runs it. Make a module for each thread: they share the frozen weights. Or call adapt itself, which "
                "any thread may."
            )
        self._runs[id(module)] = own
        return not is_inner

    def end(self, module: object) -> None:
        """Leave the module to other threads, if this thread has it."""
        if self._runs.get(id(module)) == threading.get_ident():
            del self._runs[id(module)]
