"""What holds for every input, however strange, and how a try is watched for it.

No traceback; exit codes 0, 1, 2 and 130; no file outside of the try's folder; at most 1 GB of memory beyond the start;
at most 10 s of computing and 120 s of waiting; no control codes in what is printed; no error that condit does not raise
on purpose."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MEMORY, SECONDS = 1_000_000_000, 10
WAITING = 12  # a machine that is busy gives a try a part of its time
CODES = (0, 1, 2, 130)
# What a caller's mistake may raise. Anything else is an error that nobody thought of.
EXPECTED = (ValueError, OSError, KeyError, TypeError)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree", "os.truncate"}
_HARMLESS = ("/dev/", "/proc/")


class Broken(AssertionError):
    """A rule does not hold."""


class _Watch:
    """The folder of the running try, and the paths outside of it that were written. One for the process: an audit hook
    cannot be removed."""

    folder: Path | None = None
    outside: list[str] = []

    def see(self, event: str, arguments: Sequence[object]) -> None:
        if self.folder is None or not (event == "open" or event in _WRITES):
            return
        path = arguments[0]
        if event == "open" and not _opens_for_writing(arguments):
            return
        if not isinstance(path, str | bytes | Path) or threading.current_thread() is not threading.main_thread():
            return
        whole = os.path.abspath(os.fsdecode(path))
        if not whole.startswith((str(self.folder), *_HARMLESS)) and "__pycache__" not in whole:
            self.outside.append(f"{event} {whole}")


def _opens_for_writing(arguments: Sequence[object]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(sign in mode for sign in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


WATCH = _Watch()
sys.addaudithook(WATCH.see)


def peak_memory() -> int:
    """The largest resident size since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


@contextlib.contextmanager
def watched(folder: Path, seconds: float = SECONDS) -> Iterator[None]:
    """A try in `folder`, which becomes the current one. Raises Broken where a rule does not hold."""

    def late(number: int, frame: object) -> None:
        raise Broken(f"it took more than {seconds:g} s")

    here, alarms = Path.cwd(), {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = peak_memory()
    os.chdir(folder)
    WATCH.folder, WATCH.outside = folder, []
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in alarms.items():
            signal.signal(number, handler)
        WATCH.folder = None
        os.chdir(here)
    if WATCH.outside:
        raise Broken(f"written outside of the folder: {WATCH.outside}")
    if peak_memory() - start > MEMORY:
        raise Broken(f"{(peak_memory() - start) / 1e6:.0f} MB of memory")


def run_command(arguments: Sequence[str]) -> None:
    """A command in this process. Raises Broken for a code, a text or an exception that users must not see."""
    from condit.cli import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    text = out.getvalue() + err.getvalue()
    if code not in CODES:
        raise Broken(f"exit code {code!r}")
    if "Traceback" in text or "run again with --debug" in text:
        raise Broken(f"an error that nobody thought of: {text.strip()[-600:]}")
    if code in (1, 2) and not err.getvalue().strip():
        raise Broken("it failed without a word")
    if sign := _CONTROL.search(text):
        raise Broken(f"{sign[0]!r} is printed: {text[max(0, sign.start() - 200) : sign.end()]!r}")


def expect(call: Callable[[], object]) -> bool:
    """Whether a call succeeds; what is raised on purpose is no failure of the library."""
    try:
        call()
    except EXPECTED as error:
        if not str(error):
            raise Broken(f"{type(error).__name__} without a word") from error
        return False
    return True
