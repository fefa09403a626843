"""Whether this program serves already at an address."""

from __future__ import annotations

import http.client

SERVER = "chatglm-portable"  # what the answers' header Server says: api/wsgi.py
_SECONDS = 3


def near(host: str) -> str:
    """Where on this machine a server is asked that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def find_server(host: str, port: int) -> str | None:
    """The URL of a server of ours on this machine that listens there, or None."""
    host = near(host)
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("HEAD", "/")
        ours = connection.getresponse().headers.get("Server") == SERVER
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return f"http://[{host}]:{port}" if ours and ":" in host else f"http://{host}:{port}" if ours else None
