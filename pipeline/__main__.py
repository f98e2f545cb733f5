"""``python -m pipeline``."""

import atexit
import gc

from pipeline.cli import main

if __name__ == "__main__":
    # What is there at the end goes with the process: to look through all of it for cycles takes a third of a second.
    atexit.register(gc.freeze)
    main(prog_name="python -m pipeline")
