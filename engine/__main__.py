"""`python -m engine` is `engine`."""

from engine.commands.main import main

if __name__ == "__main__":
    main()
