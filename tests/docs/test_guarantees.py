"""docs/GUARANTEES.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_guarantees_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "GUARANTEES.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^\s*def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert named - defined == set()


def test_every_fault_class_has_a_row():
    text = (ROOT / "docs" / "GUARANTEES.md").read_text()
    numbers = [
        int(n) for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for n in cell.split(",")
    ]
    assert numbers == list(range(1, 36))
