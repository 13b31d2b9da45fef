"""mmapwal demo: it passes on any tree, and it fails when something is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmapwal import Journal
from mmapwal.cli import demo, demo_crash, demo_tree, main
from mmapwal.cli.demo_check import Acknowledgement


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """500 files of three types in 10 folders."""
    root = tmp_path / "tree"
    for folder in range(10):
        (root / f"folder {folder}").mkdir(parents=True)
        for n in range(50):
            name = f"{n}{('.py', '.TXT', '')[n % 3]}"
            (root / f"folder {folder}" / name).write_bytes(b"x" * n)
    return root


def run_demo(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code = main(["demo", "--json", *map(str, arguments)])
    results = json.loads(capsys.readouterr().out)
    assert code == (1 if results["differences"] else 0)
    return results


@pytest.mark.parametrize("seed", range(6))
def test_nothing_acknowledged_is_lost_whatever_the_moment_of_the_kill(tree, tmp_path, capsys, seed):
    results = run_demo(capsys, tree, "--seed", seed, "--dir", tmp_path / "work")
    assert results["differences"] == []
    assert results["paths"] == {"file": 500, "folder": 10}
    assert results["entries"] == 1010
    assert 1 <= results["acknowledged"] <= results["recovered"] <= results["entries"]
    rest = results["entries"] - results["recovered"]
    assert results["one_a_call"]["entries"] + results["batched"]["entries"] == rest
    assert not (tmp_path / "work").exists()


def test_the_child_really_is_killed_in_the_middle(tree, tmp_path, capsys):
    results = run_demo(capsys, tree, "--seed", 1, "--dir", tmp_path / "work", "--keep")
    with Journal(tmp_path / "work" / "journal") as journal:
        assert journal.snapshot_op == results["entries"]
    assert (tmp_path / "work" / "child.log").read_text() == ""
    assert results["tail"] != "sealed"


def test_the_table_has_what_was_measured(tree, capsys):
    assert main(["demo", str(tree), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    for name in (
        "entries", "acknowledged, then SIGKILL", "recovered", "recovery time", "entries a second",
        "p50 of an append", "p99 of an append", "bytes before compaction", "bytes after compaction",
    ):  # fmt: skip
        assert name in out
    assert "500 files, 10 folders" in out


def test_an_empty_tree_works(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    results = run_demo(capsys, tmp_path / "empty")
    assert (results["entries"], results["acknowledged"], results["recovered"]) == (0, 0, 0)
    assert main(["demo", str(tmp_path / "empty")]) == 0


def test_a_tree_of_one_file_works(tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "only.txt").write_bytes(b"x")
    results = run_demo(capsys, tmp_path / "tree")
    assert results["differences"] == []
    assert results["entries"] == 2


def test_names_that_are_not_utf8_links_in_circles_and_special_files_work(tmp_path, capsys):
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    for name in (b"\xff\xfe.\xe9", "ünï\ncode.tar.gz".encode(), b"a 'quoted' name", b".hidden"):
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(b"12")  # noqa: PTH118
    (root / "deep" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    results = run_demo(capsys, root, "--seed", 5)
    assert results["differences"] == []
    assert results["paths"] == {"file": 4, "folder": 1, "link": 3, "other": 1}


def test_folders_that_cannot_be_read_and_files_that_vanish_are_counted(tree, monkeypatch, capsys):
    listdir, lstat = os.listdir, os.lstat

    def refusing_listdir(path):
        if str(path).endswith("folder 3"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    def forgetful_lstat(path):
        if str(path).endswith("/7.TXT"):
            raise FileNotFoundError(2, "No such file", path)
        return lstat(path)

    monkeypatch.setattr(demo_tree.os, "listdir", refusing_listdir)
    monkeypatch.setattr(demo_tree.os, "lstat", forgetful_lstat)
    collected = demo_tree.collect(str(tree))
    assert (collected.unreadable, collected.vanished) == (1, 9)
    assert collected.counts == {"file": 441, "folder": 10}


def test_a_tree_that_changes_meanwhile_makes_no_false_alarm(tree, monkeypatch, capsys):
    crash = demo.journal_until_killed

    def change_and_crash(*arguments):
        (tree / "folder 1" / "new").write_bytes(b"new")
        (tree / "folder 0" / "0.py").unlink()
        return crash(*arguments)

    monkeypatch.setattr(demo, "journal_until_killed", change_and_crash)
    assert run_demo(capsys, tree)["differences"] == []


def test_the_same_tree_makes_the_same_entries(tree, tmp_path):
    first = demo_tree.collect(str(tree)).entries
    assert demo_tree.collect(str(tree)).entries == first
    demo_tree.save(first, tmp_path / "saved")
    assert demo_tree.load(tmp_path / "saved") == first


def test_the_working_folder_is_left_as_it_was_found(tree, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    run_demo(capsys, tree, "--dir", work)
    assert list(work.iterdir()) == []
    (work / "mine").write_bytes(b"x")
    assert main(["demo", str(tree), "--dir", str(work)]) == 2
    assert [p.name for p in work.iterdir()] == ["mine"]
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_tree_that_is_no_folder_exits_2(tmp_path, capsys, name):
    (tmp_path / "file").write_bytes(b"")
    assert main(["demo", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said and len(said.splitlines()) == 1


def test_a_lost_entry_makes_the_demo_fail_and_keeps_the_journal(tree, tmp_path, monkeypatch, capsys):
    crash = demo.journal_until_killed

    def crash_and_lose(submitted, work, slots, chance):
        acknowledged = crash(submitted, work, slots, chance)
        with Journal(work / "journal") as journal:
            journal.truncate_from(len(acknowledged))
        return acknowledged

    monkeypatch.setattr(demo, "journal_until_killed", crash_and_lose)
    work = tmp_path / "work"
    results = run_demo(capsys, tree, "--seed", 2, "--dir", work)
    assert results["differences"] == [f"op {results['acknowledged']} was acknowledged and is lost"]
    assert results["kept_in"] == str(work)
    assert (work / "journal").exists()

    assert main(["demo", str(tree), "--dir", str(tmp_path / "again")]) == 1
    assert "was acknowledged and is lost" in capsys.readouterr().out


def test_an_acknowledgement_that_was_never_kept_makes_the_demo_fail(tree, monkeypatch, capsys, tmp_path):
    crash = demo.journal_until_killed

    def crash_and_lie(submitted, *rest):
        crash(submitted, *rest)
        return [Acknowledgement(n + 1, n) for n in range(len(submitted) + 1)]

    monkeypatch.setattr(demo, "journal_until_killed", crash_and_lie)
    assert run_demo(capsys, tree, "--dir", tmp_path / "work")["differences"] != []


def test_a_state_machine_that_forgets_makes_the_demo_fail(tree, monkeypatch, capsys, tmp_path):
    apply = demo.Catalog.apply

    def forgetful(self, entry):
        return entry.op if entry.op == 1 else apply(self, entry)

    monkeypatch.setattr(demo.Catalog, "apply", forgetful)
    (difference,) = run_demo(capsys, tree, "--dir", tmp_path / "work")["differences"]
    assert difference.startswith("after the crash, path ")


def test_a_journal_that_does_not_open_after_the_crash_makes_the_demo_fail(
    tree, monkeypatch, capsys, tmp_path
):
    crash = demo.journal_until_killed

    def crash_and_damage(submitted, work, *rest):
        acknowledged = crash(submitted, work, *rest)
        (segment, *_) = sorted((work / "journal").glob("segment-*"))
        data = bytearray(segment.read_bytes())
        data[data.index(submitted[0].payload)] ^= 1
        segment.write_bytes(data)
        return acknowledged

    monkeypatch.setattr(demo, "journal_until_killed", crash_and_damage)
    work = tmp_path / "work"
    results = run_demo(capsys, tree, "--dir", work)
    assert results["differences"][0].startswith(f"CorruptionError: {work / 'journal'}: segment-")
    assert results["kept_in"] == str(work)


def test_a_child_that_ends_by_itself_exits_2_with_its_last_word(tree, monkeypatch, capsys):
    monkeypatch.setattr(demo_crash, "CHILD", "import sys; sys.exit('the disk is full')")
    assert main(["demo", str(tree)]) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_child_that_says_nothing_is_not_waited_for_forever(tree, monkeypatch, capsys):
    monkeypatch.setattr(demo_crash, "SILENCE_S_MAX", 0)
    monkeypatch.setattr(demo_crash, "CHILD", "import sys; sys.stdin.read()")
    assert main(["demo", str(tree)]) == 2
    assert "said nothing" in capsys.readouterr().err


def test_the_demo_works_without_rich_and_psutil(tree):
    script = (
        "import sys; sys.modules['rich'] = sys.modules['psutil'] = None; "
        "from mmapwal.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "demo", str(tree)], capture_output=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert b"All acknowledged entries were recovered" in result.stdout
