"""Whether an address is this machine's own: it needs no proxy, and text sent there does not leave."""

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit


def is_here(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
