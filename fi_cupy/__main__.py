"""``python -m fi_cupy``: the command line."""

from fi_cupy.cli import main

if __name__ == "__main__":
    main()
