"""Who serves already at an address, and what is written to go there."""

from __future__ import annotations

import http.client

SERVER = "chatglm-portable"  # what the answers' header Server says: api/wsgi.py
_SECONDS = 3


def near(host: str) -> str:
    """Where on this machine a server is asked that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def authority(host: str, port: int) -> str:
    """As it stands in a URL: with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_name(host: str, port: int) -> str | None:
    """What the server that listens there calls itself; "" for another protocol than HTTP, or nobody, None for silence.
    """
    connection = http.client.HTTPConnection(near(host), port, timeout=_SECONDS)
    try:
        connection.request("HEAD", "/")
        return connection.getresponse().headers.get("Server", "")
    except TimeoutError:
        return None
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def find_server(host: str, port: int) -> str | None:
    """The URL of a server of ours on this machine that listens there, or None."""
    return f"http://{authority(near(host), port)}" if server_name(host, port) == SERVER else None
