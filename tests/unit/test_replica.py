"""The promises of Replica: what it submits and commits is applied once, in order, and answered."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmapwal import BusyError, ClosedError, Durability, Entry, JournalError, Replica, StateMachineError

from .ledger import SIZES, WAIT_S, Ledger, in_thread, open_replica, reopened

if TYPE_CHECKING:
    from tests.conftest import Home


class Pause:
    """Stops a call of the journal in one thread, before or after its effect, until it is told to go on."""

    def __init__(self, replica: Replica, *, after: bool) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        append, self.thread = replica.journal.append, 0

        def paused(payload: Any, **options: Any) -> int:
            if threading.get_ident() != self.thread:
                return append(payload, **options)
            op = append(payload, **options) if after else 0
            self.reached.set()
            assert self.go.wait(WAIT_S)
            return op or append(payload, **options)

        replica.journal.append = paused  # type: ignore[method-assign]

    def submit(self, replica: Replica, payload: bytes) -> tuple[threading.Thread, list[Any]]:
        def work() -> Any:
            self.thread = threading.get_ident()
            return replica.submit(payload)

        thread, results = in_thread(work)
        assert self.reached.wait(WAIT_S)
        return thread, results


def test_every_submitter_gets_the_result_of_its_own_entry(home: Home) -> None:
    replica = open_replica(home, slots=1024, segment_bytes=64 << 10)

    def work(name: int) -> list[str]:
        return [replica.submit(b"%d-%d" % (name, i), kind=name) for i in range(50)]

    running = [in_thread(lambda name=name: work(name)) for name in range(6)]
    while any(thread.is_alive() for thread, _ in running):
        with suppress(BusyError):
            replica.checkpoint()
    given: dict[int, str] = {}
    for name, (_, results) in enumerate(running):
        assert [r.split(": ")[1] for r in results[0]] == [f"{name}-{i}" for i in range(50)]
        given |= {int(r.split(": ")[0]): r.split(": ")[1] for r in results[0]}
    assert replica.machine.applied == list(range(1, 301))
    assert [p.decode() for p in replica.machine.payloads] == [given[op] for op in range(1, 301)]
    assert replica._results == {} == replica._submitting
    assert reopened(home, replica).machine.entries == replica.machine.entries


def test_submitters_journal_at_the_same_time(single: Replica) -> None:
    append, together = single.journal.append, threading.Barrier(3, timeout=WAIT_S)

    def meet(payload: Any, **options: Any) -> int:
        together.wait()  # passes only when all three are inside
        return append(payload, **options)

    single.journal.append = meet  # type: ignore[method-assign]
    running = [in_thread(lambda: single.submit(b"x")) for _ in range(3)]
    for thread, _ in running:
        thread.join()
    assert sorted(results[0] for _, results in running) == ["1: x", "2: x", "3: x"]


@pytest.mark.parametrize("durability", Durability)
def test_submits_work_at_every_durability(home: Home, durability: Durability) -> None:
    replica = open_replica(home, durability=durability, **SIZES)
    assert [replica.submit(b"a"), replica.submit(b"b")] == ["1: a", "2: b"]
    assert replica.checkpoint().op == 2
    replica.submit(b"c")
    assert reopened(home, replica).machine.payloads == [b"a", b"b", b"c"]


def test_entries_journaled_directly_are_applied_by_commit_or_by_the_next_submit(single: Replica) -> None:
    single.journal.append_many([b"1", b"2", b"3"], kinds=[7, 8, 9])
    single.commit(2)
    assert single.machine.entries == [(1, 7, b"1"), (2, 8, b"2")]
    assert single._results == {}
    assert single.submit(b"4") == "4: 4"
    assert single.machine.applied == [1, 2, 3, 4]
    for op, error in ((-1, ValueError), (2**63, ValueError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="op must be"):
            single.commit(op)  # type: ignore[arg-type]


def test_what_the_journal_refuses_is_raised_and_the_replica_goes_on(single: Replica) -> None:
    for payload, kind, error in (
        ("text", 0, TypeError),
        (b"", -1, ValueError),
        (bytes(2 << 20), 0, ValueError),
    ):
        single.journal._max_payload_bytes = 1 << 20
        with pytest.raises(error):
            single.submit(payload, kind=kind)  # type: ignore[arg-type]
    assert single.submit(b"x") == "1: x"


def test_an_exception_goes_to_its_submitter_and_then_everything_refuses(home: Home, replica: Replica) -> None:
    replica.machine.bad = b"bad"
    replica.submit(b"good")
    with pytest.raises(ArithmeticError, match="cannot take op 2"):
        replica.submit(b"bad")
    for call in (lambda: replica.submit(b"x"), lambda: replica.commit(2), replica.checkpoint):
        with pytest.raises(StateMachineError, match="op 2 failed") as caught:
            call()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    assert (replica.last_applied_op, replica.last_journaled_op) == (1, 2)
    with pytest.raises(StateMachineError, match="op 2 failed"):
        reopened(home, replica, Ledger(bad=b"bad"))
    again = open_replica(home)
    assert again.machine.payloads == [b"good", b"bad"]
    assert again.submit(b"x") == "3: x"


@pytest.mark.parametrize("bad", [False, True])
def test_an_entry_that_another_thread_applied_is_answered_to_its_submitter(
    single: Replica, bad: bool
) -> None:
    pause = Pause(single, after=True)
    single.machine.bad = b"first" if bad else None
    thread, results = pause.submit(single, b"first")
    if bad:
        with pytest.raises(StateMachineError, match="op 1 failed"):
            single.submit(b"second")
    else:
        assert single.submit(b"second") == "2: second"
    pause.go.set()
    thread.join()
    if bad:
        assert isinstance(results[0], ArithmeticError)
        assert single.machine.applied == [1]
    else:
        assert results == ["1: first"]
        assert single.machine.applied == [1, 2]
    assert single._results == {}


@pytest.mark.parametrize("after", [False, True])
def test_a_submitter_interrupted_while_it_journals_holds_nobody_up(single: Replica, after: bool) -> None:
    append = single.journal.append

    def interrupted(payload: Any, **options: Any) -> int:
        if payload == b"mine" and not after:
            raise KeyboardInterrupt
        op = append(payload, **options)
        if payload == b"mine":
            raise KeyboardInterrupt
        return op

    single.journal.append = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        single.submit(b"mine")
    thread, results = in_thread(lambda: single.submit(b"other"))
    thread.join(WAIT_S)
    assert results == ["2: other" if after else "1: other"]
    assert single.machine.payloads == ([b"mine", b"other"] if after else [b"other"])


def test_results_that_nobody_waits_for_do_not_pile_up(single: Replica) -> None:
    for _ in range(10):
        single.journal.append(b"nobody's")
        single.submit(b"x")
        assert single._results == {}
    first = Pause(single, after=False)
    thread, _ = first.submit(single, b"slow")
    for _ in range(5):
        single.journal.append(b"nobody's")
        single.submit(b"x")
    second = Pause(single, after=True)
    other, _ = second.submit(single, b"later")
    first.go.set()
    thread.join()
    assert all(op > 30 for op in single._results)  # those from before the later one came are gone
    second.go.set()
    other.join()
    assert single._results == {}
    assert single.machine.applied == list(range(1, 33))


@pytest.mark.parametrize("where", ["apply", "keep"])
def test_an_interrupt_inside_apply_stops_the_replica(
    single: Replica, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    if where == "apply":
        single.machine.hook = interrupt
    else:  # behind apply(), before the replica has noted it
        monkeypatch.setattr(single, "_keep", interrupt)
        single.journal.append(b"nobody's")
    with pytest.raises(KeyboardInterrupt):
        single.submit(b"x")
    monkeypatch.undo()
    single.machine.hook = lambda entry: None
    thread, results = in_thread(single.checkpoint)
    thread.join(WAIT_S)
    assert isinstance(results[0], StateMachineError)
    for call in (lambda: single.submit(b"y"), lambda: single.commit(9)):
        with pytest.raises(StateMachineError, match="op 1 failed"):
            call()
    assert single.machine.applied == [1]


@pytest.mark.parametrize("call", ["submit", "commit", "checkpoint", "close"])
def test_a_machine_that_calls_back_is_refused_and_does_not_hang(single: Replica, call: str) -> None:
    arguments = {"submit": (b"again",), "commit": (1,)}
    single.machine.hook = lambda entry: getattr(single, call)(*arguments.get(call, ()))
    with pytest.raises(StateMachineError, match="must not call back"):
        single.submit(b"x")
    assert single.last_journaled_op == 1


def test_a_journal_that_was_cut_below_what_is_applied_refuses_submits(single: Replica) -> None:
    for _ in range(4):
        single.submit(b"x")
    single.journal.truncate_from(3)
    with pytest.raises(StateMachineError, match="op 4 is applied and was cut"):
        single.submit(b"y")
    assert single.journal.last_op == 2


def test_a_watermark_above_what_is_applied_refuses_submits(single: Replica) -> None:
    single.journal.append(b"never applied")
    single.journal.set_snapshot_op(1)
    assert single.gap_op == 2
    with pytest.raises(JournalError, match="gap below op 2"):
        single.submit(b"y")
    assert len(single.journal) == 0


def test_an_uncommitted_suffix_may_be_truncated_and_journaled_anew(home: Home, replica: Replica) -> None:
    replica.journal.append_many([b"1", b"2", b"3"])
    replica.commit(1)
    replica.journal.truncate_from(2)
    assert replica.submit(b"new") == "2: new"
    assert reopened(home, replica).machine.payloads == [b"1", b"new"]


def test_a_closed_replica_refuses_and_its_views_stay_right(replica: Replica) -> None:
    kept = []
    replica.machine.hook = lambda entry: kept.append(entry.payload)
    replica.submit(b"kept" * 100)
    snapshot = replica.checkpoint()
    replica.close()
    replica.close()
    for call in (lambda: replica.submit(b"x"), lambda: replica.commit(1), replica.checkpoint):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        replica.snapshots.load()
    assert bytes(kept[0]) == b"kept" * 100
    assert len(snapshot.data) == 14 + 400


@pytest.mark.parametrize("call", ["checkpoint", "close"])
def test_a_snapshot_and_a_close_wait_for_the_application_under_way(single: Replica, call: str) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(entry: Entry) -> None:
        inside.set()
        assert go.wait(WAIT_S)

    single.machine.hook = slow
    thread, results = in_thread(lambda: single.submit(b"x"))
    assert inside.wait(WAIT_S)
    waiting, waited = in_thread(getattr(single, call))
    waiting.join(0.05)
    assert waiting.is_alive()
    go.set()
    thread.join()
    waiting.join()
    assert results == ["1: x"]
    assert call == "close" or waited[0].op == 1


FORKS = """
import os, signal, sys, threading
from mmapwal import ForkedError, recover

class Machine:
    def apply(self, entry):
        if entry.op == 2:
            inside.set()
            assert go.wait(60)
        return entry.op
    def snapshot(self): return b""
    def restore(self, view): pass

inside, go = threading.Event(), threading.Event()
replica = recover(sys.argv[1], Machine())
replica.submit(b"x")
thread = threading.Thread(target=replica.submit, args=(b"y",))
thread.start()
inside.wait(60)
child = os.fork()  # another thread holds the replica's lock
if child == 0:
    signal.alarm(60)  # one that hangs does not outlive the test
    refused = 0
    for call in (lambda: replica.submit(b"z"), lambda: replica.commit(1), replica.checkpoint):
        try:
            call()
        except ForkedError:
            refused += 1
    replica.close()
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
go.set()
thread.join()
assert replica.submit(b"z") == 3
replica.close()
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path: Path, run_python: Any) -> None:
    result = run_python(FORKS, tmp_path / "j")
    assert (result.returncode, result.stderr) == (0, "")
