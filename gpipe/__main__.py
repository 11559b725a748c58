"""``python -m gpipe``: the command line, from wherever the package is."""

from gpipe.training.cli import main

if __name__ == "__main__":
    main()
