"""How a script ends: what is wrong with data, settings or the disk is one line, not a traceback."""

import sys
from collections.abc import Callable

import torch.distributed


def run(main: Callable[[], object], interrupted: str = "Interrupted.") -> None:
    """Run a script's main, and end the process with 1 after an error, 130 after Ctrl-C.

    Args:
        main: what to do; it may raise ``SystemExit`` with a code of its own.
        interrupted: what Ctrl-C leaves behind, and how to go on.
    """
    try:
        main()
        end_group()
    except (ValueError, OSError) as error:
        # A loader's process wraps the error in its traceback; the last of it says what is wrong.
        print(str(error).rsplit("ValueError: ", 1)[-1].strip(), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        end_group()
        print(f"\n{str(stop) or interrupted}", file=sys.stderr)
        sys.exit(130)


def end_group() -> None:
    """Leave the other processes, if there are some: left open, gloo may abort at the exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
