"""Puts a mutant in the place of a module of mmapwal: in this process, before anything imports it.

The folder MMAPWAL_PLANTED holds the mutated modules under their full names. This file's folder is the first
in PYTHONPATH, so children of the process get the mutant too.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

PLANTED = {path.name.split(".")[1]: path for path in Path(os.environ["MMAPWAL_PLANTED"]).glob("mmapwal.*")}


class Planted:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        found = PLANTED.get(module) if package == "mmapwal" else None
        return importlib.util.spec_from_file_location(name, found) if found is not None else None


sys.meta_path.insert(0, Planted)  # type: ignore[arg-type]
