"""What is printed: times, payloads, sizes, tables, progress."""

from __future__ import annotations

import io
import sys

import pytest

from mmapwal.cli import output


@pytest.mark.parametrize(
    ("timestamp_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (2**63 - 1, "2262-04-11T23:47:16.854775807Z"),
        (-(2**63), "1677-09-21T00:12:43.145224192Z"),
    ],
)
def test_every_timestamp_has_an_iso_form_with_all_its_digits(timestamp_ns, text):
    assert output.iso_time(timestamp_ns) == text


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", ""),
        (b"plain", "plain"),
        (b"two\nlines", "0x74776f0a6c696e6573"),
        (b"\xff", "0xff"),
        ("ü".encode()[:1], "0xc3"),
        ("né".encode(), "né"),
    ],
)
def test_a_payload_is_text_when_printable_else_hex(payload, text):
    assert output.payload_text(memoryview(payload)) == text


@pytest.mark.parametrize("length", range(285, 292))
def test_a_long_payload_is_cut_and_a_character_on_the_cut_does_not_make_it_binary(length):
    text = output.payload_text(memoryview(("x" * (length - 285) + "€" * 200).encode()))
    assert text.endswith("€…") and len(text) <= output.SHORT_TEXT_CHARS


def test_a_long_binary_payload_is_cut():
    text = output.payload_text(memoryview(bytes(range(256)) * 1000))
    assert text.startswith("0x000102") and text.endswith("…") and len(text) <= output.SHORT_TEXT_CHARS


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1,024 bytes (1.0 KiB)"),
        (3 << 40, "3,298,534,883,328 bytes (3.0 TiB)"),
    ],
)
def test_sizes_are_exact_and_readable(size, text):
    assert output.bytes_text(size) == text


def test_a_table_is_plain_aligned_text_when_nobody_looks(capsys):
    output.table("title", [("a", "1"), ("longer name", "2")])
    assert capsys.readouterr().out == "title\n  a            1\n  longer name  2\n"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_table_on_a_terminal_works_with_rich_and_without(monkeypatch):
    for rich in (True, False):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            if not rich:
                patch.setitem(sys.modules, "rich.console", None)
            output.table("a [title]", [("name", "[bold]value\udcff")])
        assert "a [title]" in terminal.getvalue()
        assert "[bold]value\\udcff" in terminal.getvalue()


def test_progress_is_silent_for_a_second_and_off_a_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    for terminal, shown in ((Terminal(), True), (io.StringIO(), False)):
        now[0] = 0.0
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = output.Progress("working")
        progress(10, 100)
        assert terminal.getvalue() == ""
        now[0] = 1.5
        progress(50, 100)
        assert ("working: 50 %" in terminal.getvalue()) is shown
        progress.close()
        assert terminal.getvalue().endswith("\r\x1b[K") is shown
