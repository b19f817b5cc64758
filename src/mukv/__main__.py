"""`python -m mukv`, and the command `mukv`."""

import signal


def main() -> None:
    """Load the command line and run it."""
    # While modules load nothing is open: SIGINT may end the process without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mukv.cli import main as run

    run()


if __name__ == "__main__":
    main()
