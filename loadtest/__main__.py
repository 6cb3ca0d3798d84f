"""The load test: `python -m loadtest --help`."""

from loadtest.cli import main

if __name__ == "__main__":  # the processes that make calls import this module too
    main()
