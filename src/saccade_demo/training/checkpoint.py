"""Training that can be stopped and goes on: a file with all that it needs, and what Ctrl-C does."""

import io
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from saccade_demo import DemoError

FORMAT = "saccade demo checkpoint 1"


class Checkpoint:
    """A file that training is saved to and resumed from.

    Args:
        file: Where it is, or will be.
        run: What makes one run differ from another, by the name of the option. A file of another run is refused.
    """

    def __init__(self, file: Path, run: dict[str, Any]):
        self.file = file.resolve()  # a link stays a link
        self.partial = self.file.with_name(self.file.name + ".partial")
        self.run = run

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file as a whole: whenever the process dies, there is the old one or the new one."""
        content = io.BytesIO()
        torch.save({"format": FORMAT, "run": self.run, "state": state}, content)
        try:
            with self.partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.partial, self.file)
        except OSError as error:
            raise DemoError(f"--checkpoint {self.file}: cannot write this file ({error.strerror})") from error
        finally:
            with suppress(OSError):  # as a rule it is not there any more
                self.partial.unlink()

    def load(self) -> dict[str, Any] | None:
        """What was saved, on the CPU; None if nothing was.

        Raises:
            DemoError: The file is damaged, something else, or of another run; or it could not be written later.
        """
        folder = self.file.parent
        if not folder.is_dir():
            raise DemoError(f"--checkpoint {self.file}: there is no directory {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DemoError(f"--checkpoint {self.file}: cannot write into {folder}")
        if not self.file.exists():
            return None
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise DemoError(f"--checkpoint {self.file}: cannot read this file ({error.strerror})") from error
        try:
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # sums that torch.load does not look at
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # what is raised depends on the bytes that happen to be there
            damaged, loaded = content.startswith(b"PK"), None
        if damaged:
            raise DemoError(f"--checkpoint {self.file}: is cut short or damaged; delete it to start anew")
        if (
            not isinstance(loaded, dict)
            or loaded.get("format") != FORMAT
            or not all(isinstance(loaded.get(name), dict) for name in ("run", "state"))
        ):
            raise DemoError(f"--checkpoint {self.file}: is no checkpoint of this version of saccade demo")
        for option, value in self.run.items():
            before = loaded["run"].get(option)
            if before != value:
                before, now = (f"without {option}" if v is None else f"with {option} {v}" for v in (before, value))
                raise DemoError(f"--checkpoint {self.file}: was made {before}, not {now}")
        return loaded["state"]


@contextmanager
def interrupt_noted(say: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a note, which the function given tells, and the second one a KeyboardInterrupt.

    Args:
        say: Called at the first.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield lambda: False
        return
    noted = threading.Event()

    def note(*_: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
