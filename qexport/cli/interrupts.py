"""Ctrl-C and SIGTERM as exceptions that unwind the main thread, wherever it is."""

import os
import signal
import sys
import threading

__all__ = ["install"]

_AGAIN = 0.05  # seconds until a signal whose exception was lost is sent once more


def install() -> None:
    """Make SIGTERM end the process by SystemExit(143), and let no signal's exception get lost.

    Python drops what is raised inside a `__del__` or a weakref's callback, and torch's compiler has
    thousands of them: a training that was told to end there would go on.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = sys.unraisablehook

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        match unraisable.exc_value:
            case KeyboardInterrupt():
                lost = signal.SIGINT
            case SystemExit(code=143):
                lost = signal.SIGTERM
            case _:
                report(unraisable)
                return
        timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), lost))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
