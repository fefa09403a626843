"""From a model's name to a folder that holds it."""

from server.download.editions import ensure_edition
from server.download.fetch import ensure_model
from server.download.folder import CHAT, SENTENCE

__all__ = ["CHAT", "SENTENCE", "ensure_edition", "ensure_model"]
