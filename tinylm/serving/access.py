"""Who may ask: callers with a key of the key file, or, where there is none, callers on this machine.

Knows callers by their address and by the key that they send, over whatever protocol. How keys are kept is
`tinylm.serving.keys`' business.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache
from pathlib import Path

import grpc
from ray import serve
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

from tinylm.serving.calls import Refused
from tinylm.serving.keys import KeyFile


class Access:
    """Lets calls in, or refuses them with UNAUTHENTICATED."""

    def __init__(self, key_file: Path | None, allow_anonymous: bool) -> None:
        """Raises KeyFileError for an unusable key file, ValueError for a service open to all by oversight."""
        self._keys = None if key_file is None else KeyFile(key_file)
        self._open = key_file is None and allow_anonymous
        if self._keys is None and not self._open and RAY_SERVE_ENABLE_HA_PROXY:
            # Calls come from HAProxy, which is local, wherever their callers are: its address must be local too.
            client = serve.context._get_global_client()
            host = client.http_config.host if client is not None else None
            if host is not None and not is_loopback(host):
                raise ValueError(
                    f"http_options.host is {host!r}, which others can reach, and there are no API keys: "
                    "set api_keys in the application's args, or allow_anonymous: true"
                )

    def check(self, address: str | None, authorization: str | None, host: str | None = None) -> str | None:
        """The name of the caller's key, None without keys; raises Refused.

        address: the caller's IP address, None for one that has none and so is on this machine.
        authorization: what it sent under that name, "Bearer KEY". host: HTTP's header of that name, None over gRPC.
        """
        if self._open:
            return None
        if self._keys is None:
            if address is not None and not is_local(address):
                why = "only callers on this machine are served"
            elif host is not None and not is_own_name(host):
                why = f"HTTP is answered under localhost, this machine's name and addresses, not {host[:256]!r}"
            else:
                return None
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, f"without API keys, {why}")
        if authorization is None:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "no API key: send 'authorization: Bearer KEY'")
        scheme, _, key = authorization.partition(" ")
        name = self._keys.name_of(key) if scheme.lower() == "bearer" else None
        if name is None:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "the API key is not valid")
        return name


def is_loopback(host: str) -> bool:
    """Whether a service that listens there can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own_name(host: str) -> bool:
    """Whether a Host header is localhost, this machine's name, or an address, with a port or without.

    Browsers send the name that a page was loaded from. One from elsewhere, whose name is made to lead to this machine
    (DNS rebinding), would be of the page's own origin otherwise, and could read what is answered.
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
    """Whether a caller's address is this machine's: one can bind to it. 0.0.0.0 and what is no address are nobody's."""
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
