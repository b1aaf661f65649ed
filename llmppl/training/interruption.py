"""Ctrl-C while a run with a folder trains: the step is ended, its checkpoint written, and then the run stops."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from tqdm.auto import tqdm


class Interruption:
    """Holds SIGINT back for a block, until its owner asks at a moment that suits.

    A step that is half taken has no state to go on from, so that the first Ctrl-C waits for its end. The second stops
    at once, and what was written before stays.

    :param waits: whether to hold it back at all. It is left as it is outside of the main thread, to which signals go,
        and where somebody else has a handler.
    """

    def __init__(self, waits: bool) -> None:
        self.waits = (
            waits
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write(
            "fit: stopping after this step, to write its checkpoint. Once more stops at once, and loses the steps "
            "since the last one.",
            file=sys.stderr,
        )

    def __enter__(self) -> Interruption:
        if self.waits:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self.waits:
            signal.signal(signal.SIGINT, signal.default_int_handler)
