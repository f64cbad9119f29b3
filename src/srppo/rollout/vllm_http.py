"""Talking to one vLLM server over HTTP, with the standard library alone: requests, retries with back-off, errors that say what to do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from srppo.errors import ConfigError, SrppoError

BUSY = (500, 502, 503, 504)  # answers of a server that may be well again in a moment
TIMEOUT = 1800.0  # seconds a single answer may take: one long response, or loading all weights
START = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --generation-config vllm "
    "[--enable-lora --max-lora-rank RANK]"
)


class ServerError(SrppoError):
    """A vLLM server that cannot be reached, or that refuses what it is asked."""


class Refused(ServerError):
    """An answer that no retry would change."""

    def __init__(self, message: str, status: int):
        self.status = status
        super().__init__(message)


class Gone(Exception):
    """No answer this time. Never leaves the engine."""


class Connection:
    """One kept-open connection to a server; not for use by two threads at once, but `close` may come from any."""

    def __init__(self, url: str, timeout: float = TIMEOUT):
        """url: http://host:port, with or without /v1. Raises ConfigError for what is no such address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"rollout.server: {url!r} is no server's address; it looks like http://host:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._prefix = urlsplit(self.url).path
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(parts.hostname, parts.port, timeout=timeout)

    @property
    def open(self) -> bool:
        """Whether the next request goes over the connection of the one before."""
        return self._http.sock is not None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a GET, or with a body a POST, is answered with; None for an empty answer. Raises Gone and Refused."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body)
        try:
            self._http.request("GET" if body is None else "POST", self._prefix + path, content, headers)
            answer = self._http.getresponse()
            text = answer.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Gone(str(error) or type(error).__name__) from error
        if answer.status in BUSY:
            raise Gone(f"status {answer.status}: {_said(text)}")
        if answer.status >= 400:
            raise Refused(f"{self.url}{path} answered with status {answer.status}: {_said(text)}", answer.status)
        try:
            return json.loads(text)
        except ValueError:
            return None

    def close(self) -> None:
        """Hang up, also in the middle of an answer: the server then drops the request."""
        if self._http.sock is not None:
            with contextlib.suppress(OSError):
                self._http.sock.shutdown(socket.SHUT_RDWR)
        self._http.close()


def patiently(attempt: Callable[[], Any], url: str, patience: float, stop: threading.Event | None = None) -> Any:
    """What `attempt` returns, tried again after 0.25, 0.5, 1 ... 15 seconds while it raises Gone.

    Raises ServerError when the server did not answer for `patience` seconds, and Gone when `stop` is set meanwhile.
    """
    began, pause = time.monotonic(), 0.25
    while True:
        try:
            return attempt()
        except Gone as error:
            left = patience - (time.monotonic() - began)
            if left <= 0:
                raise ServerError(
                    f"the vLLM server at {url} has not answered for {patience:g} s ({error}). Is it running? It is started with: {START}. "
                    "What was trained is saved up to the last checkpoint: continue with --resume"
                ) from error
            wait = min(pause, left)
            if stop is not None and stop.wait(wait):
                raise
            if stop is None:
                time.sleep(wait)
            pause = min(2 * pause, 15.0)


def _said(text: str) -> str:
    """The words of an error's answer."""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        content = json.loads(text)
        inner = content.get("error") or content.get("message") or content.get("detail")
        text = str(inner.get("message") if isinstance(inner, dict) else inner)
    return " ".join(text.split())[:300]
