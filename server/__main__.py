"""``python -m server [command] [options]``: finds the command and imports nothing but it."""

from __future__ import annotations

import logging
import os
import sys

from server.config import COMMAND, Config, language_of, parse, split_command
from server.errors import StartupError


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl+C while starting.

    The doctor's is 1 where it found a problem.
    """
    try:
        if split_command(argv)[0] == "doctor":  # before the settings are read: what is wrong with them is a result
            from server.doctor import doctor

            return doctor(argv)
        config = parse(argv, program=os.environ.get(COMMAND) or "python -m server")
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        return _run_command(split_command(argv)[0], config)
    except StartupError as error:
        print(error.text(language_of(argv)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run_command(name: str, config: Config) -> int:
    if name == "chat":
        from server.chat import chat

        return chat(config)
    if name == "spool":
        from server.serve import spool

        return spool(config)
    from server.serve import serve

    return serve(config)


def _run(argv: list[str]) -> int:
    """main, where the reader of our output may leave (``| head``) and the console may lack Chinese."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # here, where its failure can be caught, and not in the interpreter's exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
