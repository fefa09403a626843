"""From a model's name to a folder that holds it."""

from server.download.editions import ensure_edition
from server.download.fetch import Origin, ensure_model
from server.download.folder import CHAT, SENTENCE

__all__ = ["CHAT", "SENTENCE", "Origin", "ensure_edition", "ensure_model"]
