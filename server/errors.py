"""Every failure that a user or a client may see: one sentence in Chinese and one in English, a status and a code.

Nothing here knows HTTP or torch; a dialect turns a ServerError into its own shape, the command line into one line and
an exit code.
"""

from __future__ import annotations


class ServerError(Exception):
    """A failure with a sentence for its reader.

    ``zh`` and ``en`` say what was wrong and what to do next; ``param`` names the field or option at fault.
    """

    status = 500
    code = "internal_error"

    def __init__(self, zh: str, en: str, *, param: str | None = None):
        super().__init__(en)
        self.zh = zh
        self.en = en
        self.param = param

    def text(self, language: str) -> str:
        """The sentence in ``language`` ("zh" or "en")."""
        return self.zh if language == "zh" else self.en


class BadRequest(ServerError):
    status = 400
    code = "invalid_request"


class ContextOverflow(BadRequest):
    """The prompt does not fit; the sentence says how many tokens it has and how many are allowed."""

    code = "context_length_exceeded"


class NotFound(ServerError):
    status = 404
    code = "not_found"


class MethodNotAllowed(ServerError):
    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(ServerError):
    status = 413
    code = "payload_too_large"


class Overloaded(ServerError):
    """No room for this request now; ``retry_after`` is in seconds."""

    status = 503
    code = "overloaded"

    def __init__(self, zh: str, en: str, *, retry_after: int = 5):
        super().__init__(zh, en)
        self.retry_after = retry_after


class ShuttingDown(Overloaded):
    """The server is being stopped; another one may answer soon."""

    code = "shutting_down"

    def __init__(self):
        super().__init__("服务器正在关闭。", "The server is shutting down.")


class Unavailable(ServerError):
    """Something that this server could do is missing now; the sentence says how to get it."""

    status = 503
    code = "unavailable"


class GenerationFailed(ServerError):
    """This one request failed while its answer was being made; others go on."""

    code = "generation_failed"


class StartupError(ServerError):
    """The program cannot start as asked: printed as one sentence, and ``exit_code`` is the program's."""

    code = "startup_error"
    exit_code = 2


class Interrupted(StartupError):
    """Ctrl+C while something was under way that can be gone on with; the sentence says so."""

    code = "interrupted"
    exit_code = 130


class ModelError(StartupError):
    """A model folder that cannot be loaded; the sentence names the file or the tensor."""

    code = "model_error"
