"""Where models can be had: ModelScope, the Hugging Face Hub and its mirrors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from server.config import VERSION
from server.download import web
from server.download.folder import Repositories
from server.download.web import SourceError

if TYPE_CHECKING:
    import httpx2

HUGGING_FACE = "https://huggingface.co"
HF_MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn"

T = TypeVar("T")


class RemoteFile(NamedTuple):
    """A file as a source lists it."""

    name: str
    size: int  # bytes
    sha256: str | None  # None: the source does not say


class Listing(NamedTuple):
    """One state of a repository."""

    repository: str
    revision: str
    files: Sequence[RemoteFile]


class Source(Protocol):
    """A place that has models. Its methods raise SourceError."""

    base: str  # address of the site, without a slash at the end

    def names(self, repositories: Repositories) -> Sequence[str]:
        """What the model may be called here."""

    def list_files(self, client: httpx2.Client, repository: str) -> Listing:
        """What is in a repository."""

    def address(self, listing: Listing, file: str) -> str:
        """The URL of a file."""

    def headers(self) -> Mapping[str, str]:
        """What requests for files need."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face Hub, or a mirror that speaks its protocol. ``trusted``: it may see the user's token."""

    base: str
    trusted: bool = True

    def names(self, repositories: Repositories) -> Sequence[str]:
        return repositories.hub

    def list_files(self, client: httpx2.Client, repository: str) -> Listing:
        _prepare_hub()
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.base, token=None if self.trusted else False)
        with _as_source_errors():
            info = api.model_info(repository, files_metadata=True, timeout=web.PATIENCE.silence)
        files = [(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None)
                 for entry in info.siblings or ()]  # fmt: skip
        return _listing(repository, info.sha or "main", files)

    def address(self, listing: Listing, file: str) -> str:
        return f"{self.base}/{listing.repository}/resolve/{quote(listing.revision, safe='')}/{quote(file)}"

    def headers(self) -> Mapping[str, str]:
        _prepare_hub()
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(
            token=None if self.trusted else False, library_name="chatglm-portable", library_version=VERSION
        )


@dataclass(frozen=True)
class ModelScope:
    """ModelScope: the requests that its own library makes (modelscope 1.40, hub/api.py and hub/file_download.py)."""

    base: str = MODELSCOPE

    def names(self, repositories: Repositories) -> Sequence[str]:
        return repositories.modelscope

    def list_files(self, client: httpx2.Client, repository: str) -> Listing:
        url = f"{self.base}/api/v1/models/{repository}/repo/files?Revision=master&Recursive=true"
        with web.as_source_errors():
            response = client.get(url)
        if response.status_code != 200:
            raise web.refusal(response.status_code, response.headers)
        try:
            entries = response.json()["Data"]["Files"]
            files = [(entry["Path"], entry["Size"], entry.get("Sha256"))
                     for entry in entries if entry.get("Type") != "tree"]  # fmt: skip
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise web.senseless() from error
        return _listing(repository, "master", files)

    def address(self, listing: Listing, file: str) -> str:
        where = f"Revision={quote(listing.revision, safe='')}&FilePath={quote(file, safe='')}"
        return f"{self.base}/api/v1/models/{listing.repository}/repo?{where}"

    def headers(self) -> Mapping[str, str]:
        return {}


def _listing(repository: str, revision: str, files: Iterable[tuple[Any, Any, Any]]) -> Listing:
    """Of (name, size, SHA-256) as a site gives them, those that name a file of a known size in the folder itself."""
    found = []
    for name, size, sha256 in files:
        # no path: also not one that only Windows takes for one
        if isinstance(size, int) and size > 0 and re.fullmatch(r"[\w.-]+", str(name)):
            is_hash = re.fullmatch(r"[0-9a-f]{64}", str(sha256))
            found.append(RemoteFile(name, size, sha256 if is_hash else None))
    return Listing(repository, revision, found)


SOURCES = {"modelscope": ModelScope(), "hf-mirror": Hub(HF_MIRROR, trusted=False), "huggingface": Hub(HUGGING_FACE)}


def choose_sources(names: Sequence[str] | None, endpoint: str | None) -> list[Source]:
    """Those that the user names (``server.option_types.SOURCES`` says how), else the endpoint alone, else all."""
    if names is None:
        return [Hub(endpoint.rstrip("/"))] if endpoint else list(SOURCES.values())
    return [_named(name) for name in names]


def _named(written: str) -> Source:
    """A known name, an address of a hub, or modelscope=ADDRESS."""
    if written.startswith("modelscope="):
        return ModelScope(written.removeprefix("modelscope=").rstrip("/"))
    return SOURCES[written] if written in SOURCES else Hub(written.rstrip("/"))


def title(source: Source) -> str:
    """What the user is told of it: the address as they gave it, but without a password in it."""
    parts = urlsplit(source.base)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def find_listing(source: Source, client: httpx2.Client, repositories: Repositories) -> Listing:
    """What the source has of the model; asked again, a little later, while it says that it is busy."""
    for name in source.names(repositories):
        try:
            return _patiently(lambda name=name: source.list_files(client, name))
        except SourceError as error:
            if error.status != 404:
                raise
    raise absent()


def absent() -> SourceError:
    return SourceError("没有这个模型", "does not have the model", lasting=True, status=404)


def _patiently(call: Callable[[], T]) -> T:
    for seconds in web.PATIENCE.retries[:2]:
        try:
            return call()
        except SourceError as error:
            if error.status != 429 and error.status < 500:
                raise
            wait = error.wait if error.wait is not None else seconds
            if wait > web.PATIENCE.longest:
                raise
            time.sleep(wait)
    return call()


def _prepare_hub() -> None:
    """Must come before huggingface_hub is imported: it reads the environment only then."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request


@contextlib.contextmanager
def _as_source_errors() -> Iterator[None]:
    """Turns what huggingface_hub raises into SourceErrors."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    with web.as_source_errors():
        try:
            yield
        except GatedRepoError as error:  # a subclass of the next one
            raise web.refusal(403, {}) from error
        except RepositoryNotFoundError as error:
            raise web.refusal(404, {}) from error
        except HfHubHTTPError as error:
            raise web.refusal(error.response.status_code, error.response.headers) from error
        except ImportError as error:
            raise web.bad_proxy() from error
        except UnicodeError as error:
            if getattr(error, "encoding", "") != "ascii":  # of the host's name
                raise
            zh, en = "用不了：令牌里有不是 ASCII 的字符", "the token has characters that are not ASCII"
            raise SourceError(zh, en, lasting=True, status=401) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise web.senseless() from error
        except OSError as error:
            raise web.unreachable() from error
