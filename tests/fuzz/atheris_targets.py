"""The fuzzers under atheris, guided by the coverage of the Python code. atheris is no dependency; where it
is installed, test_atheris.py runs each target for a while.

    pip install atheris; python -m tests.fuzz.atheris_targets [TARGET] [options of libFuzzer]

TARGET is one of segment, index, superblock, snapshot, all (the default), with or without "-repaired" behind
it, or native. Ends at the first input that is a finding, and leaves it in a file.
"""

from __future__ import annotations

import logging
import sys
from types import FunctionType

import atheris

from ..native.frames import Ground
from .mutate import TARGETS, Mutation, Source
from .native import GROUND_BYTES, Bytes
from .native import TARGETS as NATIVE
from .recovering import examine


def instrument(package: str) -> None:
    """Every function and method of a package, so that new branches lead on. The import hook of atheris does
    not see modules that an editable install brings."""
    modules = [m for name, m in sys.modules.items() if name == package or name.startswith(f"{package}.")]
    owned = [v for m in modules for v in vars(m).values() if getattr(v, "__module__", None) == m.__name__]
    classes = [v for v in owned if isinstance(v, type)]
    for function in (*owned, *(v for c in classes for v in vars(c).values())):
        if isinstance(function, FunctionType):
            atheris.instrument_func(function)


def recovery(target: str, *, repaired: bool) -> None:
    def one_input(data: bytes) -> None:
        mutation = Mutation(data, target, repaired=repaired)
        try:
            examine(mutation)
        except Exception as e:
            e.add_note(f"{data.hex()}: {mutation}")
            raise

    atheris.Setup(sys.argv, one_input)


def native() -> None:
    ground = Ground(GROUND_BYTES)
    functions = list(NATIVE.values())

    def one_input(data: bytes) -> None:
        source = Source(data)
        function = source.pick(functions)
        function(Bytes(source, ground))

    atheris.Setup(sys.argv, one_input)


def main() -> None:
    logging.getLogger("mmapwal").setLevel(logging.CRITICAL)
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "all-repaired"
    target = name.removesuffix("-repaired")
    if name == "native":
        native()
    elif target in TARGETS:
        recovery(target, repaired=name != target)
    else:
        raise SystemExit(f"no target {name}: native, or one of {', '.join(TARGETS)}, also with -repaired")
    instrument("mmapwal")
    atheris.Fuzz()


if __name__ == "__main__":
    main()
