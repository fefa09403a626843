"""``python -m server [command] [options]``: finds the command and imports nothing but it."""

from __future__ import annotations

import logging
import os
import sys

from server.config import COMMAND, ROOT, VERSION, Config, language_of, parse, split_command
from server.errors import StartupError
from server.logfile import keep_log, starts

_DLL_FAILURES = (126, 127, 193, 1114)  # not found, a function not found, damaged, its start failed


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl+C while starting.

    1 where ``download --verify`` or the doctor found something wrong.
    """
    try:
        if split_command(argv)[0] == "doctor":  # before the settings are read: what is wrong with them is a result
            from server.doctor import doctor

            return doctor(argv)
        config = parse(argv, program=os.environ.get(COMMAND) or "python -m server")
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        name = split_command(argv)[0]
        if name in ("serve", "spool"):
            keep_log(ROOT)
            starts.info("%s %s, Python %s, %s", name, VERSION, sys.version.split()[0], sys.platform)
        return _run_command(name, config)
    except StartupError as error:
        return _say(error, argv)
    except ImportError as error:
        return _say(_broken(error), argv, error)
    except OSError as error:
        if getattr(error, "winerror", None) not in _DLL_FAILURES:
            starts.critical("the program ended", exc_info=error)
            raise
        return _say(_broken(error), argv, error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        starts.critical("the program ended", exc_info=error)
        raise


def _say(error: StartupError, argv: list[str], cause: Exception | None = None) -> int:
    """Returns the exit code."""
    starts.error("%s", error.en, exc_info=cause)
    print(error.text(language_of(argv)), file=sys.stderr)
    return error.exit_code


def _broken(error: Exception) -> StartupError:
    """For a package that is not there or incomplete, or a DLL that it needs."""
    if os.name == "nt":
        zh, en = "双击 setup_offline.bat 修复", "run setup_offline.bat to repair it"
    else:
        zh, en = "删除 .venv 再启动 run.sh", "delete .venv and start run.sh again"
    return StartupError(
        f"Python 的包不完整（{error}）：请{zh}。", f"A Python package is missing or incomplete ({error}): {en}."
    )


def _run_command(name: str, config: Config) -> int:
    if name == "chat":
        from server.chat import chat

        return chat(config)
    if name == "download":
        if config.prune:
            from server.prune import prune

            return prune(config)
        from server.download.command import download

        return download(config)
    if name == "spool":
        from server.serve import spool

        return spool(config)
    from server.serve import serve

    return serve(config)


def _run(argv: list[str]) -> int:
    """main, where the reader of our output may leave (``| head``) and the console may lack Chinese."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start: what is written is for nobody
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")
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
