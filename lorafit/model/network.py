"""Whether the Hub is reached: tried once, before its libraries try again and again."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 5.0  # to wait for a connection


@cache
def hub_reached() -> bool:
    """Whether there is a connection to the Hub. Where there is none, its libraries are put into offline mode: they
    answer from the local cache at once, and do not try again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if _connects(constants.ENDPOINT):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
    constants.HF_HUB_OFFLINE = True
    hub_reached.offline = True  # type: ignore[attr-defined]
    return False


def why_offline() -> str:
    """Why the Hub was not contacted; empty if it can be reached."""
    from huggingface_hub import constants

    if getattr(hub_reached, "offline", False):
        return "the Hub was not reached"
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""


def _connects(address: str) -> bool:
    """Whether a connection to an address, or to the proxy for it, can be opened."""
    target = urlsplit(address)
    with suppress(OSError):
        if not proxy_bypass(target.hostname or ""):
            proxies = getproxies()
            proxy = proxies.get(target.scheme) or proxies.get("all") or address
            target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (80 if target.scheme == "http" else 443)
    try:
        socket.create_connection((target.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True
