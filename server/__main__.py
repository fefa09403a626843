"""``python -m server [command] [options]``: finds the command and imports nothing but it."""

from __future__ import annotations

import logging
import sys

from server.config import language_of, parse
from server.errors import StartupError


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl+C while starting."""
    if argv[:1] == ["serve"]:
        argv = argv[1:]
    try:
        return _serve(argv)
    except StartupError as error:
        print(error.text(language_of(argv)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(argv: list[str]) -> int:
    config = parse(argv)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from server.serve import serve

    return serve(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
