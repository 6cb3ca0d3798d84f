"""The settings of a connection to the service, checked once: address, API key, TLS, timeout, retries.

`tinylm.client.sync` and `tinylm.client.aio` send the calls. `tinylm.client.attempts` decides about retries.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from tinylm.client.attempts import Attempts, ServiceError

API_KEY_VARIABLE = "TINYLM_API_KEY"
METADATA: tuple[tuple[str, str], ...] = (("application", "tinylm"),)
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is meant for web pages
    ("grpc.initial_reconnect_backoff_ms", 100),  # a proxy is back in seconds; gRPC's own pauses grow to two minutes
    ("grpc.max_reconnect_backoff_ms", 1000),
    # With these settings the client detects a silent peer before the deadline of the call. In the first minute of a
    # silent call gRPC sends at most two such pings. Servers accept two.
    ("grpc.min_reconnect_backoff_ms", 5000),  # gRPC uses it as the time limit of a connection attempt
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.http2.bdp_probe", 0),  # its pings count as the two above; it only helps messages larger than ours
)
MAX_API_KEY_LENGTH = 4096
MAX_TIMEOUT_S = 1e9  # gRPC's clock overflows at about nine times as much; a longer timeout means no limit


class Connection:
    """The base of both clients: where to send calls, and how."""

    _closed: threading.Event | asyncio.Event

    def __init__(
        self,
        address: str = "localhost:9000",
        timeout_s: float | None = 60.0,
        retries: int = 6,
        api_key: str | None = None,
        tls: bool | Path = False,
    ) -> None:
        """Raise ValueError for a setting that cannot be used, OSError for a PEM file that cannot be read.

        address: host:port. Several addresses are `ipv4:10.0.0.1:9000,10.0.0.2:9000`: the first that answers is used.
        timeout_s: the most seconds that a call may take, with its retries. None or infinity sets no limit.
        retries: how often to retry a call that failed before it produced anything. The default retries for about 5
        seconds: in that time Serve replaces a dead proxy.
        api_key: by default the value of TINYLM_API_KEY in the environment. Whitespace around a key does not count.
        tls: True trusts the authorities that this machine trusts. A PEM file trusts the authorities in the file.
        """
        key = checked_api_key("api_key", api_key)
        self._metadata = call_metadata(key or checked_api_key(API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE)))
        if not isinstance(address, str) or not address or not address.isprintable() or " " in address:
            raise ValueError(f"address must be HOST:PORT without spaces, got {address!r}")
        self.address = address
        self._timeout_s = _checked_timeout_s(timeout_s)
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a whole number of at least 0, got {retries!r}")
        self._retries = retries
        self._credentials = _credentials(tls)
        self._prepare()

    def _prepare(self) -> None:
        """Create `_closed` and the other attributes of a client."""
        raise NotImplementedError

    def _open(self, module: ModuleType) -> Any:
        """Return a channel of `module`, which is `grpc` or `grpc.aio`."""
        options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
        scheme, _, addresses = self.address.partition(":")
        if scheme in ("ipv4", "ipv6") and "," in addresses:
            # Without this, gRPC sends the whole list as the host name, and HAProxy refuses such a name.
            options.append(("grpc.default_authority", addresses.split(",")[0]))
        if self._credentials is None:
            return module.insecure_channel(self.address, options=options)
        return module.secure_channel(self.address, self._credentials, options=options)

    def _attempts(self) -> Attempts:
        return Attempts(self.address, self._timeout_s, self._retries)

    def _require_open(self, attempts: Attempts) -> None:
        """Raise ServiceError if this client has been closed, before the call or during it."""
        if self._closed.is_set():
            raise ServiceError(grpc.StatusCode.CANCELLED, "this client has been closed", attempts.n) from None


def checked_api_key(field: str, key: str | None) -> str | None:
    """Return the key without the whitespace around it, None for no key or a blank one.

    Raise ValueError, which names the field but does not hold the key, for a key that a header cannot carry.
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise ValueError(f"{field} must be a string, got {type(key).__name__}")
    key = key.strip()
    if len(key) > MAX_API_KEY_LENGTH:
        raise ValueError(f"{field} must have at most {MAX_API_KEY_LENGTH} characters, got {len(key)}")
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise ValueError(
                f"{field} must have only ASCII letters, digits and signs: character {place} of {len(key)} is another"
            )
    return key or None


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a key from `checked_api_key`, or with none."""
    return METADATA if api_key is None else (*METADATA, ("authorization", f"Bearer {api_key}"))


def _checked_timeout_s(timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:  # NaN is not
        raise ValueError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
    return None if timeout_s > MAX_TIMEOUT_S else timeout_s


def _credentials(tls: bool | Path) -> grpc.ChannelCredentials | None:
    if tls is False:
        return None
    authorities = None if tls is True else Path(tls).read_bytes()
    if authorities is not None and b"-----BEGIN CERTIFICATE-----" not in authorities:
        raise ValueError(f"tls must name a file with certificates, got {tls}: it has no PEM certificate")
    return grpc.ssl_channel_credentials(authorities)
