"""Talking to one vLLM server over HTTP, with the standard library alone: requests, and what an answer means."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from srppo.errors import ConfigError, SrppoError
from srppo.text import clean

BUSY = (500, 502, 503, 504)  # answers of a server that may be well again in a moment
TIMEOUT = 1800.0  # seconds a single answer may take: one long response, or loading all weights
CONTROL_TIMEOUT = 120.0  # of the questions that a server answers at once, unless it is busy
LONGEST = 1 << 28  # bytes of an answer
START = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --generation-config vllm "
    "[--enable-lora --max-lora-rank RANK]"
)


_PLAIN = re.compile(r"[!-~]+")  # an address is written in printable ASCII


class ServerError(SrppoError):
    """A vLLM server that cannot be reached, or that refuses what it is asked."""


class Refused(ServerError):
    """An answer that no retry would change."""

    def __init__(self, message: str, status: int = 0):  # the default is for pickle, which sends it to other processes
        self.status = status
        super().__init__(message)


class Gone(Exception):
    """No answer this time. Never leaves the engine. status: of an answer that says so, else None."""

    def __init__(self, message: str, status: int | None = None):
        self.status = status
        super().__init__(message)


class Connection:
    """One kept-open connection to a server; not for use by two threads at once, but `close` may come from any.

    Redirections are not followed: prompts and the API key go to the named server alone.
    """

    def __init__(self, url: str):
        """url: http://host:port, with or without /v1. Raises ConfigError for what is no such address."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:  # a port that is no number, brackets that do not close
            raise ConfigError(f"rollout.server: {url!r} is no server's address ({error}); it looks like http://host:8000") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not _PLAIN.fullmatch(url):
            raise ConfigError(f"rollout.server: {url!r} is no server's address; it looks like http://host:8000")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("rollout.server: an address takes no user and password; set VLLM_API_KEY for a server with --api-key")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._prefix = urlsplit(self.url).path
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(host, port, timeout=TIMEOUT)
        self._over = False

    @property
    def open(self) -> bool:
        """Whether the next request goes over the connection of the one before."""
        return self._http.sock is not None

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = TIMEOUT) -> Any:
        """The JSON that a GET, or with a body a POST, is answered with; None for an empty answer. timeout: seconds.

        Raises Gone: no answer, one that says to come again, or one that is no JSON. Raises Refused for the other errors.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body)
        if self._over:
            raise Gone("hung up")
        try:
            self._http.timeout = timeout
            if self._http.sock is None:
                self._http.connect()
                _keep_alive(self._http.sock)
            self._http.sock.settimeout(timeout)
            self._http.request("GET" if body is None else "POST", self._prefix + path, content, headers)
            answer = self._http.getresponse()
            raw = answer.read(LONGEST + 1)
        except (OSError, http.client.HTTPException, AttributeError) as error:  # AttributeError: closed by another thread meanwhile
            self.close()
            raise Gone(str(error) or type(error).__name__) from error
        except ValueError:  # http.client's, of a header that no request may hold
            raise ConfigError("VLLM_API_KEY holds characters that no HTTP header can") from None
        if len(raw) > LONGEST:
            self.close()
            raise Gone(f"it sent an answer of more than {LONGEST >> 20} MiB")
        text = raw.decode("utf-8", "replace")
        if answer.status in BUSY:
            raise Gone(f"status {answer.status}: {_said(text)}", answer.status)
        if answer.status >= 300:
            raise Refused(f"{self.url}{path} answered with status {answer.status}: {_said(text)}", answer.status)
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if path == "/v1/load_lora_adapter" or path == "/v1/unload_lora_adapter":
                return None  # a sentence
            self.close()
            raise Gone(f"it sent what is no JSON: {_said(text)[:80]!r}") from None

    def close(self) -> None:
        """Hang up, also in the middle of an answer: the server then drops the request."""
        sock = self._http.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._http.close()

    def hang_up(self) -> None:
        """Close for good. A thread that still holds the connection can ask nothing more, such as to load weights of a while ago."""
        self._over = True
        self.close()


def _keep_alive(sock: Any) -> None:
    """Let the kernel ask whether the other machine is still there: one that lost its network is then noticed in a minute and a half, not
    after the longest answer's time."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):  # seconds, seconds, unanswered ones
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _said(text: str) -> str:
    """The words of an error's answer."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
        content = json.loads(text)
        inner = content.get("error") or content.get("message") or content.get("detail")
        text = str(inner.get("message") if isinstance(inner, dict) else inner)
    return clean(" ".join(text.split())[:300])
