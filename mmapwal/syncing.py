"""Syncs by themselves, every so many milliseconds: `sync_interval_ms`."""

from __future__ import annotations

import logging
import threading

from mmapwal.engine import Engine
from mmapwal.errors import ClosedError, JournalError, PoisonedError
from mmapwal.threads import start_thread

__all__ = ["BackgroundSync"]

log = logging.getLogger("mmapwal")


class BackgroundSync:
    """A failure poisons like any other; what is no failure of the disk is tried again."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, engine: Engine, interval_ms: float) -> None:
        """OSError: no thread can be had."""
        self._thread = start_thread("sync", self._run, engine, interval_ms / 1000)

    def cancel(self) -> None:
        """No further sync is begun."""
        self._stopped.set()

    def stop(self) -> None:
        """Waits for the one under way."""
        self.cancel()
        if self._thread is not None:
            self._thread.join()

    def _run(self, engine: Engine, interval_s: float) -> None:
        while not self._stopped.wait(interval_s):
            try:
                engine.sync()
            except (PoisonedError, ClosedError):
                return
            except (OSError, JournalError, MemoryError) as e:
                log.warning("a background sync has to be tried again: %s", e)
