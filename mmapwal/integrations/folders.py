"""Folders that journals are put into."""

from __future__ import annotations

from pathlib import Path

from mmapwal import SystemDirectory
from mmapwal.format import SUPERBLOCK_NAME


def make_folders(path: Path) -> None:
    """The folder and what is missing above it, each name durable before anything is put in."""
    if not path.is_dir():
        make_folders(path.parent)
        with SystemDirectory(path) as directory:
            directory.sync_parent()


def has_journal(path: Path) -> bool:
    """Whether a journal was made there, whose sizes it keeps."""
    return (path / SUPERBLOCK_NAME).exists()
