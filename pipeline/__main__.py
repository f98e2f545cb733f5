"""``python -m pipeline``."""

import atexit
import os
import sys
from contextlib import suppress

_code = 1
"""Exit status, once it is known."""


def _leave() -> None:
    """End the process after its threads and all registered exit handlers.

    What would come is the interpreter's look through all that is in memory, a third of a second, and the destructors of
    C++ libraries: Arrow's now and then abort a process whose work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(_code)


if __name__ == "__main__":
    # First to be registered, last to be called.
    atexit.register(_leave)

    from pipeline.common.imports import frozen_imports

    with frozen_imports():
        from pipeline.cli import main

    try:
        main(prog_name="python -m pipeline")
        _code = 0
    except SystemExit as end:
        _code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
