"""A durable log for PySyncObj: a replicated object whose every node survives a power cut.

    class Counter(SyncObj):
        def __init__(self, node, others, folder):
            super().__init__(node, others, **use_mmapwal(folder))

PySyncObj (https://github.com/bakwc/PySyncObj) is Raft in pure Python. Its own file journal never syncs and
keeps all entries on the heap as well. Here the log is a `mmapwal.Journal`: op is the Raft index, an entry its
term and command. It is synced once before a message leaves that promises what is new in it, so that thousands
of entries share a sync; term and vote are durable before any message that depends on them.
"""

from __future__ import annotations

import copy
import os
import queue
import time
from pathlib import Path
from typing import Any

import pysyncobj.serializer
import pysyncobj.syncobj
from pysyncobj import FAIL_REASON, SyncObjConf
from pysyncobj.fast_queue import FastQueue
from pysyncobj.transport import TCPTransport

from mmapwal import JournalError, PayloadTooLargeError
from mmapwal.integrations.folders import make_folders
from mmapwal.integrations.raft_log import SLOTS_MIN, JournalFailedError, MmapJournal, logger

__all__ = ["JournalFailedError", "MmapJournal", "MmapJournalFile", "SyncedTransport", "use_mmapwal"]

UNPROMISING = {"apply_command", "apply_command_response", "timeout_now"}  # they say nothing of the log


class MmapJournalFile:
    """What stands for the journal's file in a SyncObjConf: opened when the SyncObj is made."""

    def __init__(self, path: Path, cluster: str, dump: Path | None, options: dict[str, Any]) -> None:
        self.path, self.cluster, self.dump, self.options = path, cluster, dump, options
        self.log: MmapJournal | None = None
        self.transport: SyncedTransport | None = None

    def open(self) -> MmapJournal:
        """The log. JournalError when what it gave to the dump is in no dump."""
        log = MmapJournal(self.path, **self.options)
        if log.journal.snapshot_op and self.dump is not None and not self.dump.exists():
            log.journal.close()
            gone = log.journal.snapshot_op
            raise JournalError(f"{self.path}: entries up to {gone} are in {self.dump} only, which is missing")
        self.log = log
        return log


class QueueSize(int):
    """The commandsQueueSize of a SyncObjConf; the queue that is made of it finds the log by it."""

    file: MmapJournalFile


class CommandQueue(FastQueue):  # type: ignore[misc]
    """The library's queue; commands stay in it while the log cannot take them. The library takes one out
    before it adds it, so one that the log refused comes again, and its callback with it. One that is too long
    for any log does not get in: its caller is told, and the node undisturbed."""

    def __init__(self, size: QueueSize) -> None:
        super().__init__(size)
        self._file = size.file
        self._taken: tuple[bytes | None, Any] = (None, None)

    def put_nowait(self, value: tuple[bytes, Any]) -> None:
        """Adds a command with its callback, or the node and the number of a request; queue.Full."""
        command, callback = value
        log, transport = self._file.log, self._file.transport
        if log is None or transport is None or len(command) <= log.command_bytes_max:
            super().put_nowait(value)
            return
        told = "%s: a command of %d bytes is denied; max_payload_bytes leaves %d for one"
        logger.error(told, self._file.path, len(command), log.command_bytes_max)
        if isinstance(callback, tuple):
            answer = {"type": "apply_command_response", "request_id": callback[1]}
            transport.send(callback[0], answer | {"error": FAIL_REASON.REQUEST_DENIED})
        elif callback is not None:
            callback(None, FAIL_REASON.REQUEST_DENIED)

    def get_nowait(self) -> tuple[bytes | None, Any]:
        """The next command and its callback; queue.Empty."""
        log = self._file.log
        if log is None or not log.takes_commands:
            raise queue.Empty
        if log.refused is None or log.refused is not self._taken[0]:
            self._taken = super().get_nowait()
        log.refused = None
        return self._taken


class SyncedTransport(TCPTransport):  # type: ignore[misc]
    """The library's transport; before a message leaves that promises entries, they are durable. While they
    cannot be, nothing leaves. Entries for which the log has no slot count as not received: the leader sends
    them again, and again, until a dump has made room."""

    def __init__(self, syncObj: Any, selfNode: Any, otherNodes: Any) -> None:  # noqa: N803
        file = syncObj.conf.journalFile
        if not isinstance(file, MmapJournalFile) or file.log is None:
            raise TypeError("SyncedTransport goes with use_mmapwal()")
        self._log = file.log
        file.transport = self
        try:
            if selfNode is not None:
                self._log.claim(str(selfNode.id), file.cluster)
            super().__init__(syncObj, selfNode, otherNodes)
        except BaseException:
            self._log.journal.close()
            raise
        self._looked_at_dump = False
        conf = syncObj.conf  # that of use_mmapwal(), of this node alone
        conf.logCompactionMinEntries = min(conf.logCompactionMinEntries, self._log.journal.slots // 2)
        self._library_tick = syncObj._onTick
        syncObj._onTick = self._tick_while_usable
        syncObj.addOnTickCallback(self._tick)

    def _tick_while_usable(self, timeToWait: float = 0.0) -> None:  # noqa: N803
        """A node that has stopped does not tick: the library would log each one."""
        try:
            self._log.check_usable()
            self._library_tick(timeToWait)
        except JournalFailedError:  # it was logged
            if not self._syncObj.conf.autoTick:
                raise
            time.sleep(timeToWait)

    def _tick(self) -> None:
        """After the commands of a tick were taken, before they are committed in the next one."""
        if not self._looked_at_dump:
            self._looked_at_dump = True
            gone, applied = self._log.journal.snapshot_op, self._syncObj.raftLastApplied
            if applied < gone:  # PySyncObj logs that, and goes on without a state
                what = f"the dump was not loaded, and the log begins behind {gone}"
                self._log.fail(JournalError(what), for_good=True)
        if not self._syncObj.otherNodes:  # a cluster of one sends nothing
            self._log.sync()

    def _onMessageReceived(self, node: Any, message: Any) -> None:  # noqa: N802
        if isinstance(message, dict) and message.get("prevLogIdx") is not None:
            message = self._as_far_as_it_fits(message)
        try:
            super()._onMessageReceived(node, message)
        except PayloadTooLargeError as e:  # the leader may have longer ones; it would send it for ever
            self._log.fail(e, for_good=True)

    def _as_far_as_it_fits(self, message: dict[str, Any]) -> dict[str, Any]:
        log, before = self._log, message["prevLogIdx"]
        entries, part = message.get("entries", []), message.get("transmission")  # of one large entry
        count = len(entries) + (part == "finish")
        rest = message | {"entries": entries[: max(0, log.takes_through - before)], "transmission": None}
        if count and before + count <= log.last_index and log.term(log.last_index) == message["term"]:
            # They were sent again, and the last entry is of this leader, so all are the same. The library
            # would remove what follows, what was applied too, until it is sent again.
            return rest | {"entries": [], "prevLogIdx": log.last_index, "prevLogTerm": message["term"]}
        conflict = log.conflict(before, message["prevLogTerm"])
        if conflict < before:  # the library would go back by one a message, and it may be thousands
            return rest | {"entries": [], "prevLogIdx": conflict}
        return rest if before + count > log.takes_through else message

    def send(self, node: Any, message: Any) -> bool:
        """As the library's; False when the log cannot be made durable."""
        if not (isinstance(message, dict) and message.get("type") in UNPROMISING):
            try:
                self._log.sync()
            except JournalFailedError:  # it was logged, and the log refuses all that follows
                return False
        return bool(super().send(node, message))


def _create_journal(journal_file: Any = None) -> Any:
    return journal_file.open() if isinstance(journal_file, MmapJournalFile) else _CREATE_JOURNAL(journal_file)


def _create_queue(size: int) -> Any:
    return CommandQueue(size) if isinstance(size, QueueSize) else FastQueue(size)


def _replace_durably(old: str, new: str) -> None:
    """For the library's dumps: renamed when their bytes are durable, and durable when it returns."""
    _sync(Path(old))
    Path(old).replace(new)
    _sync(Path(new).absolute().parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_CREATE_JOURNAL = pysyncobj.syncobj.createJournal


def use_mmapwal(
    folder: str | os.PathLike[str], conf: Any = None, *, cluster: str = "", **journal_options: Any
) -> dict[str, Any]:
    """Arguments for `SyncObj.__init__`: conf and transportClass, with the log and the dump below `folder`.

    conf: a SyncObjConf, which is copied. Its journalFile is replaced, its fullDumpFile is set where it has
        none. A serializer of yours has to make its file durable before it returns.
    cluster: a name; a folder of another cluster, or another node, is refused (IncompatibleFormatError).
    journal_options: of `mmapwal.Journal`: `slots` (the longest log, 1,048,576 entries; it is compacted after
        `conf.logCompactionMinEntries`, and when half of the slots are taken), `segment_bytes`, `sync_method`.

    From then on, in the whole process, the library's dumps are synced before they replace the one before.
    ValueError: a log of so few slots cannot work. Errors of the journal are raised by `SyncObj.__init__`: the
    node does not start.
    """
    slots = journal_options.get("slots")
    if slots is not None and slots < SLOTS_MIN:
        raise ValueError(f"slots is {slots}: too few for a log and its new leaders; give {SLOTS_MIN} or more")
    conf = SyncObjConf() if conf is None else copy.copy(conf)
    folder = Path(folder).absolute()
    make_folders(folder)
    if conf.fullDumpFile is None:
        conf.fullDumpFile = str(folder / "dump")
    dump = None if conf.serializer is not None else Path(conf.fullDumpFile)
    conf.journalFile = MmapJournalFile(folder / "journal", cluster, dump, journal_options)
    conf.commandsQueueSize = QueueSize(conf.commandsQueueSize)
    conf.commandsQueueSize.file = conf.journalFile
    pysyncobj.syncobj.createJournal = _create_journal
    pysyncobj.syncobj.FastQueue = _create_queue
    pysyncobj.serializer.atomicReplace = _replace_durably
    return {"conf": conf, "transportClass": SyncedTransport}
