"""Training logged for TensorBoard."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saccade_demo import DemoError
from saccade_demo.evaluation import Counts


def require_tensorboard() -> None:
    """See that TensorBoard is there.

    Raises:
        DemoError: It is not installed.
    """
    if find_spec("tensorboard") is None:
        raise DemoError(
            "--tensorboard: tensorboard is not installed; `pip install 'saccade-ops[tensorboard]'` brings it"
        )


class Journal:
    """Numbers written to a directory for TensorBoard; without a directory it writes nothing.

    Args:
        directory: Made if it is not there.
        step: Whatever was logged for later steps, by a run that was killed, is not to be shown.

    Raises:
        DemoError: The directory cannot be written into.
    """

    def __init__(self, directory: Path | None, step: int = 0):
        self.writer: Any = None
        if directory is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(str(directory), purge_step=step + 1)
        except OSError as error:
            raise DemoError(f"--tensorboard {directory}: cannot write there ({error.strerror})") from error

    def step(self, step: int, losses: dict[str, float], learning_rate: float, seconds: float) -> None:
        """Log a step of training."""
        if self.writer is not None:
            for name, value in losses.items():
                self.writer.add_scalar(f"loss/{name}", value, step)
            self.writer.add_scalar("training/learning_rate", learning_rate, step)
            self.writer.add_scalar("training/step_ms", 1e3 * seconds, step)

    def evaluation(self, step: int, what: str, counts: Counts) -> None:
        """Log an evaluation after a step."""
        if self.writer is not None:
            self.writer.add_scalar(f"{what}/recall_at_2m", counts.recall, step)
            self.writer.add_scalar(f"{what}/precision", counts.precision, step)

    def flush(self) -> None:
        """Write what is not yet written: a resumed run does not log it again."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write what is not yet written, and write no more."""
        if self.writer is not None:
            self.writer.close()
