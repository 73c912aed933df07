"""What becomes of broken inputs: configurations, overrides, meshes, run folders and models, mutated at random.

    python -m benchmarks.fuzz --seed 0 --count 2000

Every input is read in this process by what a run reads it with, under a limit of processor time and memory. It may be
taken, or refused by a UserError that gives a reason. Everything else is a fault: another exception, memory or time run
out, a warning, a reason that is only the text of a slip in the reader ("'str' object has no attribute 'get'"). Each
kind of fault, by the line that it comes from, is printed once with the smallest input that shows it. Of each kind of
input it is told how many were taken, and how many lines refused the others: where all die at one check, what is behind
it was not tried.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz.inputs import Inputs
from pipeline.errors import explain
from stages.errors import UserError
from stages.paths import from_home

LIMIT_S = 5.0  # of processor time, for one input
ASLEEP = 60  # times as long may an input take by the clock: a reader that waits takes no processor time
ROOM = 4 * 2**30  # bytes that one input may add to what the process addresses
_TOPS = {"pipeline", "stages"}  # folders whose lines are ours
_SLIP_TEXT = re.compile(r"'\w+' object |(list|tuple|string) ind|unhashable type|argument of type|.{0,20}NoneType")
_SLIPS = (Warning, AttributeError, TypeError, KeyError, IndexError, NameError, ZeroDivisionError, RecursionError)


@dataclass
class Fault:
    """A kind of fault: where it comes from, how often, and the smallest input."""

    what: str
    where: str
    count: int
    smallest: bytes
    index: int


@dataclass
class Ending:
    """What became of one input: "taken", "refused" or "fault", with the words and the line of ours."""

    how: str
    what: str = ""
    where: str = ""


@dataclass
class Report:
    """What became of all inputs.

    faults: each kind of fault once. refusals: by kind of input, how often each line of ours refused one. taken: by kind
    of input, how many were taken.
    """

    faults: list[Fault]
    refusals: dict[str, Counter[str]]
    taken: Counter[str]

    def line(self, kind: str) -> str:
        """Say how far the inputs of a kind came."""
        refusals, taken = self.refusals[kind], self.taken[kind]
        total = max(taken + refusals.total(), 1)
        text = f"{kind}: {100 * taken / total:.0f} % taken, {len(refusals)} lines refuse the others"
        most = refusals.most_common(1)
        return text + "".join(f", most of all {where} with {100 * n / total:.0f} %" for where, n in most)


class _TooLong(BaseException):
    """The time of one input is over; nothing that reads it may take this for an error of its own."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong after that processor time, and MemoryError where far more is asked for than any input needs."""
    import resource

    def stop(*_: object) -> None:
        raise _TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, ASLEEP))
    handlers = {number: signal.signal(number, stop) for number, _, _ in timers}
    for _, timer, times in timers:
        signal.setitimer(timer, times * seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def ending_of(read: Callable[[], object], limit_s: float = LIMIT_S) -> Ending:
    """Return what becomes of an input that `read` reads."""
    try:
        with _limited(limit_s), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            read()
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, _SLIPS) and (_ends_in_ours(cause) or error.why.startswith(str(cause)[:40])):
            what = f"refused for a slip of the reader: {type(cause).__name__}: {cause}"[:200]
            return Ending("fault", what, _place(cause))
        if isinstance(cause, MemoryError):
            return Ending("fault", "memory", _place(cause))
        if _SLIP_TEXT.match(error.why):
            return Ending("fault", f"refused for a slip of the reader: {error.why}"[:200], _place(error))
        where = _place(error)
        return Ending("refused", error.why, where if where.split("/")[0] in _TOPS else error.what)
    except _TooLong as error:
        return Ending("fault", f"more than {limit_s:g} s", _place(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what is looked for; a library in Rust panics by an exception that is no Exception
        answer = explain(error)  # at the command's edge: a file's failure of the system, such as a name too long
        if answer is None or isinstance(error, MemoryError):
            return Ending("fault", f"{type(error).__name__}: {error}"[:200], _place(error))
        return Ending("refused", answer.why, _place(error))
    return Ending("taken")


def _ends_in_ours(error: BaseException) -> bool:
    """Whether the innermost line that raised it is ours: what a library stumbles over is told in words around it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "site-packages" not in frames[-1].filename and not frames[-1].filename.startswith("<")


def _place(error: BaseException) -> str:
    """The innermost line of ours that an error came by."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "site-packages" not in f.filename and _TOPS & {*Path(f.filename).parts}]
    if not ours:
        return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    parts = Path(ours[-1].filename).parts
    start = max(i for i, part in enumerate(parts) if part in _TOPS)
    return f"{'/'.join(parts[start:])}:{ours[-1].lineno}"


def fuzz(seed: int, count: int, kinds: list[str] | None = None, limit_s: float = LIMIT_S) -> Report:
    """Return what became of `count` inputs, by turns of each kind of input; the same seed, the same inputs."""
    faults: dict[tuple[str, str, str], Fault] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        inputs = Inputs(Path(folder))
        names = kinds or list(inputs.kinds)
        report = Report([], {name: Counter() for name in names}, Counter())
        for index in range(count):
            rng = random.Random(f"{seed}/{index}")
            kind = names[index % len(names)]
            data, read = inputs.kinds[kind](rng)
            ending = ending_of(read, limit_s)
            if ending.how == "taken":
                report.taken[kind] += 1
                continue
            if ending.how == "refused":
                report.refusals[kind][ending.where] += 1
                continue
            key = (kind, ending.what.partition(":")[0], ending.where)
            fault = faults.setdefault(key, Fault(f"{kind}: {ending.what}", ending.where, 0, data, index))
            fault.count += 1
            if len(data) < len(fault.smallest):
                fault.what, fault.smallest, fault.index = f"{kind}: {ending.what}", data, index
    report.faults += faults.values()
    return report


def main() -> int:
    """Run the command line; 1 where a fault is left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--count", type=int, default=300, help="inputs")
    parser.add_argument("--kinds", help="of config,override,mesh,run,model,clip,lora, by commas; all by turns")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of processor time for one input")
    parser.add_argument("--keep", type=from_home, help="folder for the smallest input of each kind of fault")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    report = fuzz(args.seed, args.count, args.kinds.split(",") if args.kinds else None, args.limit)
    faults = report.faults
    for number, fault in enumerate(sorted(faults, key=lambda f: -f.count)):
        print(f"{fault.count} x {fault.what}\n    at {fault.where}; input {fault.index}, {len(fault.smallest)} bytes:")
        print(f"    {fault.smallest[:300]!r}")
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{number}.bin").write_bytes(fault.smallest)
    for kind in report.refusals:
        print(report.line(kind))
    print(f"{args.count} inputs of seed {args.seed}: {len(faults)} kinds of fault, {time.perf_counter() - began:.0f} s")
    return 1 if faults else 0
