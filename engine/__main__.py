"""`engine`, and `python -m engine`: the command line, which an interrupt ends quietly while it is loaded too."""

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
    main()
