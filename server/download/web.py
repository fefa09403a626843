"""HTTP as downloads need it: one client for everything, and what can go wrong as a ``SourceError``."""

from __future__ import annotations

import contextlib
import email.utils
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from server.config import VERSION
from server.errors import StartupError

if TYPE_CHECKING:
    import httpx2


class Patience(NamedTuple):
    """How long what is waited for; seconds unless it says otherwise."""

    connect: float = 10.0
    silence: float = 20.0  # a connection without a byte for so long has stalled
    window: float = 30.0  # so has one that was slower than ``slowest`` for so long
    slowest: float = 5_000.0  # bytes per second
    probe: float = 4.0  # measuring a source's speed ends after so long
    grace: float = 6.0  # once one source has answered, the others get so much longer
    # waits before a source that failed is asked again: a network that is gone for two minutes ends no download
    retries: tuple[float, ...] = (1.0, 4.0, 15.0, 30.0, 60.0)
    longest: float = 120.0  # a source that asks for a longer pause is given up


PATIENCE = Patience()
_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)")  # of a Content-Range header


class SourceError(Exception):
    """A source does not give what was asked of it; ``zh`` and ``en`` say why, as the end of a sentence.

    ``lasting``: it is not asked for this again. ``wait``: seconds after which it wants to be asked again, if it says
    so. ``status``: of the answer, where there was one.
    """

    def __init__(self, zh: str, en: str, *, lasting: bool = False, wait: float | None = None, status: int = 0):
        super().__init__(en)
        self.zh = zh
        self.en = en
        self.lasting = lasting
        self.wait = wait
        self.status = status


def unreachable() -> SourceError:
    return SourceError("连不上或连接断了", "no connection, or it broke off")


def distrusted() -> SourceError:
    return SourceError("的证书不可信（请检查系统时间，以及拦截 https 的代理或加速软件）",
                       "its certificate is not trusted (check the system's clock, and proxies that look into https)",
                       lasting=True)  # fmt: skip


def stalled() -> SourceError:
    return SourceError("停住了", "stalled")


def senseless() -> SourceError:
    return SourceError("的应答看不懂", "gives answers that make no sense", lasting=True)


def refusal(status: int, headers: Mapping[str, str], *, redirected: bool = False) -> SourceError:
    """What an answer that is not a success means; ``redirected``: it is that of an address that the source gave."""
    if status in (404, 410):
        return SourceError("没有这个文件", "does not have it", lasting=True, status=status)
    if status == 429 or status >= 500:
        wait = _seconds(headers.get("Retry-After", ""))
        return SourceError(f"忙或出错（{status}）", f"is busy or broken ({status})", wait=wait, status=status)
    # signed addresses expire: the source gives another one when it is asked again
    return SourceError(f"不让下载（{status}）", f"refuses ({status})", lasting=not redirected, status=status)


def _seconds(retry_after: str) -> float | None:
    """The value of a Retry-After header, which is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"[0-9]+", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):  # OSError: a date before 1970 on Windows
        return None


def open_client() -> httpx2.Client:
    """Takes proxies and certificates from the environment and the system. Raises StartupError for unusable ones."""
    import httpx2

    timeout = httpx2.Timeout(PATIENCE.silence, connect=PATIENCE.connect)
    # compressed answers have neither the size of the file nor byte ranges in it
    headers = {"User-Agent": f"chatglm-portable/{VERSION}", "Accept-Encoding": "identity"}
    try:
        return httpx2.Client(timeout=timeout, headers=headers, follow_redirects=True)
    except (ImportError, ValueError) as error:  # ImportError: SOCKS needs one more package
        raise bad_proxy() from error
    except OSError as error:
        raise StartupError("环境变量 SSL_CERT_FILE 或 SSL_CERT_DIR 指向的证书用不了：请去掉它，或改成正确的路径。",
                           "The certificates that SSL_CERT_FILE or SSL_CERT_DIR in the environment names cannot be "
                           "used: unset it, or correct its path.") from error  # fmt: skip


def bad_proxy() -> StartupError:
    return StartupError(
        "环境变量里的代理（ALL_PROXY、HTTPS_PROXY、HTTP_PROXY）用不了：请改成 http:// 开头的代理地址；"
        "SOCKS 代理要先执行 pip install socksio。",
        "The proxy in the environment (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) cannot be used: give one that starts with "
        "http://; SOCKS needs pip install socksio first.",
    )


@contextlib.contextmanager
def as_source_errors() -> Iterator[None]:
    """Turns what httpx2 raises into SourceErrors."""
    import httpx2

    try:
        yield
    except httpx2.ReadTimeout as error:
        raise stalled() from error
    except (httpx2.TooManyRedirects, httpx2.UnsupportedProtocol) as error:
        raise SourceError("的重定向没有尽头或看不懂", "redirects in circles or to nowhere", lasting=True) from error
    except httpx2.ProxyError as error:
        raise SourceError("通过代理连不上", "cannot be reached through the proxy") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, UnicodeError) as error:  # that: of host names
        raise (distrusted() if _is_of_certificate(error) else unreachable()) from error


def _is_of_certificate(error: BaseException | None) -> bool:
    while error and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


class Body(NamedTuple):
    """The bytes of an answer, of which the first ``skip`` come before those that were asked for."""

    response: httpx2.Response
    skip: int

    def chunks(self) -> Iterator[bytes]:
        """What was asked for, as it arrives: nothing of a chunk that comes before."""
        skip = self.skip
        for chunk in self.response.iter_raw():
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))

    def received(self) -> int:
        """Bytes that have come, whether asked for or not."""
        return self.response.num_bytes_downloaded


@contextlib.contextmanager
def open_range(
    client: httpx2.Client, url: str, headers: Mapping[str, str], start: int, size: int, end: int | None = None
) -> Iterator[Body]:
    """The bytes of a file of ``size`` bytes from ``start`` up to ``end`` (exclusive; None: its end).

    Raises SourceError, also where the answer belongs to a file of another size.
    """
    asked = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
    with as_source_errors(), client.stream("GET", url, headers={**headers, **asked}) as response:
        if response.url.scheme == "http" and any(step.url.scheme == "https" for step in response.history):
            raise SourceError("从 https 转到了不加密的 http", "redirects from https to plain http", lasting=True)
        if response.status_code not in (200, 206, 416):
            raise refusal(response.status_code, response.headers, redirected=bool(response.history))
        yield Body(response, _skip(response, start, size))


def _skip(response: httpx2.Response, start: int, size: int) -> int:
    """How many bytes an answer starts too early."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError("不给原样的文件（压缩了）", "does not give the file as it is (compressed)", lasting=True)
    if response.status_code == 200:  # Range was ignored, or nothing but the whole file was asked for
        begin, total = 0, response.headers.get("Content-Length", str(size))
    else:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found:
            raise senseless()
        begin, total = int(found[1] or -1), found[2].replace("*", str(size))
    if int(total) != size:
        raise SourceError(f"的文件大小不对（{total}，应为 {size} 字节）",
                          f"has a file of another size ({total} instead of {size} bytes)", lasting=True)  # fmt: skip
    if response.status_code == 416 or not 0 <= begin <= start:
        raise SourceError("给的不是要的那一段", "does not give the part that was asked for", lasting=True)
    return start - begin
