"""``python -m server doctor``: checks of this machine, which need nothing but the standard library."""

from server.doctor.command import doctor

__all__ = ["doctor"]
