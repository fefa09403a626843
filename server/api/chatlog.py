"""chatlog.log: every question and its answer, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from server.core import RequestOutput, Usage
from server.errors import StartupError

log = logging.getLogger(__name__)

MAX_BYTES = 16 * 1024 * 1024
BACKUPS = 5


class _Handler(RotatingFileHandler):
    """Goes on in the same file where it cannot be renamed: on Windows, while another program has it open too."""

    def doRollover(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            os.rename(self.baseFilename, self.baseFilename)  # else the older ones would move up without it
            super().doRollover()

    def handleError(self, record: logging.LogRecord) -> None:
        log.error("the chat log %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


class ChatLog:
    """Writes the exchanges into a file that is renamed to ``.1`` to ``.5`` when it has grown to 16 MiB."""

    def __init__(self, path: Path):
        self._logger = logging.Logger("chatlog")  # of its own: nobody else's level or handlers
        self._logger.addHandler(
            _Handler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8", delay=True)
        )

    def record(self, *, client: str, request_id: str, query: str, answer: str, final: RequestOutput) -> None:
        """Write one exchange; a full disk is a line in the program's log and disturbs no answer."""
        usage = final.usage or Usage()
        entry = {
            "time": datetime.now().isoformat(" ", "seconds"),
            "client": client,
            "id": request_id,
            "query": query,
            "answer": answer,
            "finish_reason": final.finish_reason.value,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        self._logger.info(json.dumps(entry, ensure_ascii=False))

    def close(self) -> None:
        for handler in self._logger.handlers:
            handler.close()


def open_chat_log(path: str | Path) -> ChatLog:
    """Open the log for appending, before the model is loaded; raises StartupError if that is not possible."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StartupError(
            f"无法写入聊天记录文件 {path}（{error.strerror}）。请换一个位置，或关闭聊天记录。",
            f"The chat log {path} cannot be written ({error.strerror}). Choose another place or switch the log off.",
        ) from error
    return ChatLog(Path(path))
