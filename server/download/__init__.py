"""From a model's name to a folder that holds it."""

from server.download.fetch import ensure_model

__all__ = ["ensure_model"]
