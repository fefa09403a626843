"""``python -m server chat``: a conversation in the terminal."""

from server.chat.command import chat

__all__ = ["chat"]
