"""The program `bench`, see `bench.commands`: all that takes long to import waits until it runs."""

import sys


def main() -> int:
    """Entry point; Ctrl-C is one line from the beginning."""
    try:
        from bench import commands

        return commands.main()
    except KeyboardInterrupt:  # in an import; from there on `cifar.cli.run_program` takes care
        print("bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
