"""`python -m engine` is `engine`."""

from engine.cli import main

if __name__ == "__main__":
    main()
