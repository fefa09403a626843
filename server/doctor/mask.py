"""Takes out of a text what tells who the user is, and what opens doors."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; "1" or "true" says nothing, and stands everywhere
# every length has an end: a text of a million letters shall not take a million times as long as one of one
_VALUE = r"""(?:"{3}[\s\S]*?"{3}|'{3}[\s\S]*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[^\s&]+)"""
# the last one is what every answer begins with, which is the user's own words
_NAMED = r"(?:key|token|secret|passwo?r?d|pwd|credential|\bprefix)(?![a-z])[\w.-]*[\"']?\s*[=:]\s*"
_UNMASKED = r"(?!\*\*\*(?:[\s,&;})]|$))"
_SECRETS = (
    # name and password of an address, with or without its protocol; either may have an @ or a / in it
    (re.compile(r"""(?<=//)[^\s"'<>]{0,300}@"""), "***@"),
    (re.compile(r"""(?<![\w*])[^\s"'=/\\:*]{2,100}:(?!//)[^\s"'<>]{1,300}@"""), "***@"),
    (re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]+"), "***"),  # a mail address
    (re.compile(r"\b(?:(?:sk|hf|ms|pk|ghp|gho|github_pat|glpat)[-_]|AKIA)[\w-]{8,}"), "***"),
    (re.compile(r"(?i)(\bbearer\s+)\S+"), r"\1***"),
    (re.compile(r"(?i)(\bauthorization\b[\"']?\s*[=:]\s*).+"), r"\1***"),
    # without quotes the value is the rest of a line that begins with the name, elsewhere a word
    (re.compile(rf"(?im)^([# \t]*[\w.-]*{_NAMED})(?![\s\"']){_UNMASKED}.+$"), r"\1***"),
    (re.compile(rf"(?i)({_NAMED})(?!\s){_UNMASKED}{_VALUE}"), r"\1***"),
)
_PASSWORDS = _SECRETS[:2]
# of somebody else, or of the user in Windows' short spelling (ZHANGS~1)
_HOMES = re.compile(r"""(?i)([\\/](?:users|home|documents and settings)[\\/]+)"""
                    r"""(?!(?:public|default|all users)\b|<)[^\\/\s"'<>:|*?,;()]+""")  # fmt: skip


def this_user(env: Mapping[str, str] = os.environ) -> Mask:
    """For the user that the program runs as, on this computer."""
    names = [env.get(name, "") for name in ("USERNAME", "USER", "LOGNAME")]
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user id without a name
        names.append(getpass.getuser())
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        home = None
    computers = [socket.gethostname(), env.get("COMPUTERNAME", ""), env.get("USERDOMAIN", "")]
    secrets = [value for name, value in env.items() if _SECRET_NAME.search(name)]
    return Mask(names, home, [name for name in computers if name.lower() != "localhost"], secrets)


def without_password(url: str) -> str:
    """An address without the name and the password in it."""
    for pattern, instead in _PASSWORDS:
        url = pattern.sub(instead, url)
    return url


class Mask:
    """``names`` of the user, ``computers`` likewise, ``secrets``: words that are taken out wherever they stand."""

    def __init__(
        self,
        names: Iterable[str] = (),
        home: PurePath | None = None,
        computers: Iterable[str] = (),
        secrets: Iterable[str] = (),
    ):
        people = {*names, home.name if home else ""} - {""}
        self._secrets = sorted({text for text in secrets if len(text) >= _SHORTEST_SECRET}, key=len, reverse=True)
        self._home = _as_folder(home) if home and home.name else None
        named = [(name, "<user>") for name in people] + [(name, "<computer>") for name in {*computers} - {"", *people}]
        self._names = [(_as_name(name), instead) for name, instead in sorted(named, key=lambda pair: -len(pair[0]))]

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
        text = _HOMES.sub(r"\1<user>", self._home.sub("<home>", text) if self._home else text)
        for pattern, instead in self._names:
            text = pattern.sub(instead, text)
        return text

    def everything(self, value: Any) -> Any:
        """The same value with every text in it masked, the keys of mappings too."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self.everything(key): self.everything(item) for key, item in value.items()}
        return [self.everything(item) for item in value] if isinstance(value, (list, tuple)) else value


def _spellings(name: str) -> str:
    """A pattern of the name as it is, as part of an address, and as JSON and Python escape it."""
    found = {name, quote(name, errors="replace"), json.dumps(name)[1:-1], ascii(name)[1:-1]}
    with contextlib.suppress(UnicodeEncodeError):
        found.add(quote(name.encode("gbk")))
    return "(?:" + "|".join(re.escape(text) for text in sorted(found, key=len, reverse=True)) + ")"


def _as_folder(home: PurePath) -> re.Pattern[str]:
    r"""With any separators, for a text may have \ doubled, twice doubled, or as /."""
    first, *parts = home.parts
    start = re.escape(first.rstrip("\\/"))
    return re.compile(rf"(?<![\w.-]){start}" + "".join(rf"[\\/]+{_spellings(part)}" for part in parts) + r"(?![\w.-])",
                      re.IGNORECASE)  # fmt: skip


def _as_name(name: str) -> re.Pattern[str]:
    """The name where it can only be one: a short one as a folder, a longer one as a word, a Chinese one anywhere."""
    plain = _spellings(name)
    if not name.isascii():
        return re.compile(plain, re.IGNORECASE)
    before, after = "(?<![A-Za-z0-9<])", "(?![A-Za-z0-9])"  # <: what was put in here, for the user "user" too
    if len(name) < 4:
        return re.compile(rf"(?<=[\\/~]){plain}{after}|{before}{plain}(?=[\\/@])", re.IGNORECASE)
    return re.compile(before + plain + after, re.IGNORECASE)
