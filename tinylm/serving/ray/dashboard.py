"""Serve's REST API on Ray's dashboard. Requests to it carry Ray's token, and ignore the environment's proxies.

Ray finds its token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token:
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinylm.system.files import can_create
from tinylm.system.proxies import DIRECT

LIMIT_S = 5.0  # of a request
MODES = ("token", "disabled")
WHAT_TO_DO = "run `ray get-auth-token --generate`, or set RAY_AUTH_TOKEN_PATH to a file with the token"


class TokenRefused(ValueError):
    """The dashboard does not accept Ray's token, or got none."""


def mode_of(environment: Mapping[str, str]) -> str | None:
    """Return the value of RAY_AUTH_MODE, None if it is not set. Then Ray decides by whether it finds a token.

    Raise ValueError for an unknown value: Ray would treat it as `disabled`.
    """
    mode = environment.get("RAY_AUTH_MODE")
    if mode and mode.lower() not in MODES:
        raise ValueError(f"RAY_AUTH_MODE is {mode!r}: it must be one of {', '.join(MODES)}")
    return mode and mode.lower()


def token_of(environment: Mapping[str, str]) -> str | None:
    """Return Ray's token, None if Ray needs none or there is none.

    Raise ValueError for an unknown mode, and for a variable that names no token.
    """
    if mode_of(environment) not in ("token", None):
        return None
    if text := environment.get("RAY_AUTH_TOKEN"):
        source, token = "RAY_AUTH_TOKEN", text.strip()
    elif path := environment.get("RAY_AUTH_TOKEN_PATH"):
        source, token = f"{path}, which RAY_AUTH_TOKEN_PATH names,", _first_line(Path(path))
    elif not (token := _first_line(path_of_token(environment))):
        return None
    else:
        source = str(path_of_token(environment))
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"{source} has no token of Ray: {WHAT_TO_DO}")
    return token


def path_of_token(environment: Mapping[str, str]) -> Path:
    """Return the file in which Ray looks for its token if no variable names one."""
    return Path(environment.get("HOME") or ".", ".ray", "auth_token")


def check_token(environment: Mapping[str, str], joins_cluster: bool) -> None:
    """Raise ValueError if Ray needs a token and has none. For a cluster of its own, Ray makes one in ~/.ray."""
    mode = mode_of(environment)
    if mode is None and not joins_cluster:
        return  # Ray gets `disabled`
    if token_of(environment) is not None or mode != "token":
        return
    path = path_of_token(environment)
    if joins_cluster or not environment.get("HOME") or not can_create(path.parent):
        raise ValueError(f"RAY_AUTH_MODE is token, but there is no token in {path}: {WHAT_TO_DO}")


def applications(url: str, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what Serve says of each application. Raise OSError, or ValueError for an answer of another form.

    url: the dashboard's. environment: that of Ray. Raise TokenRefused.
    """
    try:
        return list(json.loads(_call(url, environment))["applications"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the dashboard's answer has another form: {error!r}") from None


def deploy(url: str, environment: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Let Serve deploy the applications of a config, and remove all others. Raise OSError or TokenRefused."""
    _call(url, environment, json.dumps(config).encode())


def _call(url: str, environment: Mapping[str, str], data: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"{url}/api/serve/applications/", data, method="GET" if data is None else "PUT")
    request.add_header("Content-Type", "application/json")
    if (token := token_of(environment)) is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with DIRECT.open(request, timeout=LIMIT_S) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise
        said = error.read().decode(errors="replace").strip()
        raise TokenRefused(
            f"Ray's dashboard at {url} refuses requests ({error.code}, {said!r}): {WHAT_TO_DO}"
        ) from None


def _first_line(path: Path) -> str:
    """Return the first line of a file without the whitespace around it, or nothing if the file cannot be read."""
    with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
        return file.readline().strip()
    return ""
