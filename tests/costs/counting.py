"""What code costs, in units that no machine changes: bytecode instructions of our packages, and bytes that are held.

An instruction counts when its frame is of one of our packages; what C code or a library does in between does not.
Its calls are instructions of ours, and what it allocates is seen by `memory`.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
COUNTED: Final = tuple(f"{ROOT / package}/" for package in ("broker", "gateway"))


class StillLoop(asyncio.SelectorEventLoop):
    """Time stands still: no timer fires, however long a run takes. Counting makes everything some fifty times
    slower, and a busy machine slower again. No longer `still`, it goes on: what is to end may wait for timers."""

    still = True

    def time(self) -> float:
        return 1.0 if self.still else super().time()


class Instructions:
    """Counts on this thread while `counting`; what runs there already does not count, but for what it calls."""

    def __init__(self) -> None:
        self._functions: dict[int, _Function | None] = {}  # by the identity of their code; None: not ours

    def by_function(self) -> dict[str, int]:
        return {function.name: function.count for function in self._functions.values() if function}

    @contextmanager
    def counting(self) -> Iterator[None]:
        sys._getframe().f_trace_opcodes = True  # or Python 3.12 counts none in the frames below
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before)

    def _entered(self, frame: FrameType, _event: str, _argument: Any) -> _Function | None:
        code = frame.f_code
        try:
            function = self._functions[id(code)]
        except KeyError:
            ours = code.co_filename.startswith(COUNTED)
            function = self._functions[id(code)] = _Function(code) if ours else None
        if function is not None:
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
        return function


class _Function:
    """Called for each of its instructions."""

    __slots__ = ("code", "count")

    def __init__(self, code: CodeType) -> None:
        self.code = code  # kept, so that no other gets its identity
        self.count = 0

    @property
    def name(self) -> str:
        file = Path(self.code.co_filename).relative_to(ROOT)
        return f"{file}:{self.code.co_firstlineno} {self.code.co_qualname}"

    def __call__(self, _frame: FrameType, event: str, _argument: Any) -> _Function:
        self.count += event == "opcode"
        return self


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """Gives what tells the bytes that Python objects take, of all that was made inside."""

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        yield held
    finally:
        tracemalloc.stop()
