"""The command: reads the options, runs the checks, shows what they found."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.config import COMMAND, ROOT, Config, language_of, parse
from server.doctor.checks import all_checks
from server.doctor.host import SETUP
from server.doctor.machine import Machine
from server.doctor.report import as_json, write_zip
from server.doctor.result import State
from server.doctor.running import Outcome, run_all
from server.doctor.screen import page_for
from server.errors import ServerError, StartupError


def doctor(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 where a check found a problem; raises StartupError for a faulty command line.

    ``argv`` begins with the command's name. A faulty config.toml or environment is what a check says, not an error.
    """
    config, wrong = read_options(argv)
    try:
        outcomes = _show(config, wrong)
    except BrokenPipeError:  # whose reader has left: __main__'s to end quietly
        raise
    except OSError as error:  # a full disk
        if os.name == "nt" and error.errno == errno.EINVAL:  # what Windows says of a pipe whose reader has left
            raise BrokenPipeError from None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise StartupError(f"结果写不出来（{error.strerror}）：请检查磁盘，或者不要重定向输出。",
                           f"The results cannot be written ({error.strerror}): look at the disk, or let them be shown "
                           "in the window.") from None
    if config.zip:
        path = write_zip(outcomes, config, ROOT)
        if not config.json:
            print(_packed(config, path))
    return 1 if any(outcome.result.state is State.PROBLEM for outcome in outcomes) else 0


def read_options(
    argv: Sequence[str], *, env: Mapping[str, str] = os.environ, root: Path = ROOT
) -> tuple[Config, ServerError | None]:
    """The options, and what is wrong with those that the command line does not give, which are then the defaults."""
    program = env.get(COMMAND) or "python -m server"
    try:
        return parse(argv, env=env, root=root, program=program), None
    except StartupError as error:
        wrong: ServerError = error
    except ImportError as error:  # Python 3.10 reads config.toml with a package
        wrong = StartupError(f"读不了 config.toml（{error}）：请{SETUP[0]}。",
                             f"config.toml cannot be read ({error}): {SETUP[1]}.")
    except Exception as error:  # RecursionError, say, of a file full of brackets
        words = f"{type(error).__name__}: {error}"
        wrong = StartupError(f"读不了设置（{words}）：请检查 config.toml，或者删掉它。",
                             f"The settings cannot be read ({words}): look at config.toml, or delete it.")
    quiet = {"CHATGLM_LANG": language_of(argv, env)}
    return parse(argv, env=quiet, root=root / "no config.toml here", program=program), wrong


def _show(config: Config, wrong: ServerError | None) -> list[Outcome]:
    """Each check's lines as soon as it has ended, or the JSON when all have."""
    checks = all_checks(Machine(config), wrong)
    if config.json:
        outcomes = list(run_all(checks))
        print(json.dumps(as_json(outcomes, config), indent=1), flush=True)  # ASCII, whatever the encoding is
        return outcomes
    page, outcomes = page_for(config.language), []
    print(page.head(), flush=True)
    for outcome in run_all(checks):
        outcomes.append(outcome)
        for line in page.fine(outcome):
            print(line, flush=True)
    print("\n".join(page.summary(outcomes)), flush=True)
    return outcomes


def _packed(config: Config, path: Path) -> str:
    zh = f"结果已打包（不含聊天内容、用户名和密钥）：{path}"
    en = f"packed, without chats, user name and keys: {path}"
    return f"{zh}\n{en}" if config.language == "zh" else f"{en}\n{zh}"
