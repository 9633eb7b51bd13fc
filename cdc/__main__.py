"""``python -m cdc`` and the command ``cdc``: signals are handled before anything else is loaded."""

import gc

from cdc.runtime.process import handle_signals

_OBJECTS = 100_000
"""More than loading makes, all of which stays: to look through it for garbage takes a tenth of a command's start."""


def main() -> None:
    gc.set_threshold(_OBJECTS)
    handle_signals()
    from cdc.cli import main as command_line  # noqa: PLC0415 - see above

    command_line()


if __name__ == "__main__":
    main()
