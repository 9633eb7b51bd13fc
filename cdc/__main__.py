"""``python -m cdc`` and the command ``cdc``: signals are handled before anything else is loaded."""

from cdc.runtime.process import handle_signals


def main() -> None:
    handle_signals()
    from cdc.cli import main as command_line  # noqa: PLC0415 - see above

    command_line()


if __name__ == "__main__":
    main()
