"""Decide who may call: callers with a valid API key or, without a key file, callers on this machine.

The rules are the same for both protocols. `tinylm.serving.keys` reads the key file.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from functools import lru_cache
from pathlib import Path

import grpc

from tinylm.serving.calls import Refused
from tinylm.serving.keys import Key, KeyFile
from tinylm.serving.ray.internals import http_host

HAPROXY_MODE = "RAY_SERVE_ENABLE_HA_PROXY"  # Serve's own variable: "1" selects HAProxy


class Access:
    """Admit calls, or refuse them with UNAUTHENTICATED."""

    def __init__(self, key_file: Path | None, allow_anonymous: bool) -> None:
        """Raise KeyFileError for an unusable key file, ValueError if everybody could call by mistake."""
        self._keys = None if key_file is None else KeyFile(key_file)
        self._open = key_file is None and allow_anonymous
        if self._keys is None and not self._open and os.environ.get(HAPROXY_MODE) == "1":
            # Every call comes from HAProxy, so a caller's address is unknown. HAProxy itself must listen on loopback.
            host = http_host()
            if host is not None and not is_loopback(host):
                raise ValueError(
                    f"http_options.host is {host!r}, which other machines can reach, and there are no API keys: "
                    "set api_keys in the application's args, or allow_anonymous: true"
                )

    def check(self, address: str | None, authorization: str | None, host: str | None = None) -> Key | None:
        """Return the caller's key, or None without keys. Raise Refused.

        address: the caller's IP address. None means a local caller without one (a Unix socket).
        authorization: the header of that name, "Bearer KEY". host: HTTP's Host header, None over gRPC.
        """
        if self._open:
            return None
        if self._keys is None:
            if address is not None and not is_local(address):
                why = "only callers on this machine are served"
            elif host is not None and not is_own_name(host):
                why = f"the HTTP host must be localhost, this machine's name or an IP address, got {host[:256]!r}"
            else:
                return None
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, f"without API keys, {why}")
        if authorization is None:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "no API key: send 'authorization: Bearer KEY'")
        scheme, _, secret = authorization.partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "the API key is not valid")
        return key


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a service that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own_name(host: str) -> bool:
    """Return whether a Host header is localhost, this machine's name, or an IP address, with or without a port.

    This stops DNS rebinding: a foreign page lets its own name point to this machine, and the browser then lets the page
    read the answers. The browser sends that foreign name as the Host header.
    """
    name = re.sub(r":\d*$", "", host).lower()
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1024)
def is_local(caller: str) -> bool:
    """Return whether an address belongs to this machine: a socket can bind to it.

    Return False for the unspecified addresses (0.0.0.0, ::) and for text that is not an IP address.
    """
    if is_loopback(caller):
        return True
    try:
        address = ipaddress.ip_address(caller)
    except ValueError:
        return False
    if address.is_unspecified:
        return False
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
