"""The language in which the program speaks to its user: Chinese or English."""

from __future__ import annotations

import os
from collections.abc import Mapping

_PRIMARY_CHINESE = 0x04  # LANG_CHINESE, the low ten bits of a Windows LANGID


def system_language(env: Mapping[str, str] = os.environ) -> str:
    """ "zh" or "en": CHATGLM_LANG, else the Windows display language, else LC_ALL, LC_MESSAGES, LANG."""
    chosen = env.get("CHATGLM_LANG", "").lower()
    if chosen[:2] in ("zh", "en"):
        return chosen[:2]
    if os.name == "nt":
        import ctypes

        langid = ctypes.windll.kernel32.GetUserDefaultUILanguage()
        return "zh" if langid & 0x3FF == _PRIMARY_CHINESE else "en"
    # as in POSIX, the first one that is set and not empty decides alone
    locale = next((env[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"
