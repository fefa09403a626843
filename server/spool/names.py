"""File names of requests: data, never paths."""

from __future__ import annotations

import re
import unicodedata

from server.errors import BadRequest

# what a Windows program opens as a device, whatever follows the first dot
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no UTF-8, line and paragraph separators


def is_temporary(file: str) -> bool:
    """Hidden files, and what editors, Office and macOS put beside the file that they write."""
    return file.startswith((".", "~"))


def check_name(name: str) -> None:
    """Raises BadRequest for a name that is a path or a device for somebody, or that no list of names could show."""
    if "\\" in name or "/" in name or any(unicodedata.category(letter) in _CONTROLS for letter in name):
        raise BadRequest("文件名里不能有斜杠、反斜杠、换行等控制字符，也必须是正确的 UTF-8：请换一个名字。",
                         "A file's name must be UTF-8 without slashes, backslashes, line breaks and other control "
                         "characters: choose another name.")  # fmt: skip
    if _DEVICE.match(name):
        raise BadRequest("这个文件名在 Windows 上是设备的名字：请换一个名字。",
                         "On Windows this file's name means a device: choose another name.")  # fmt: skip
