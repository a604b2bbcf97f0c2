"""`engine`, and `python -m engine`: the command line, which an interrupt ends quietly while it is loaded too."""

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The console script."""
    try:
        from engine.commands.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    # Python put the current folder first: it may be a checkpoint, and a `torch.py` there is not ours to run.
    ours = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != ours:
        del sys.path[0]
    main()
