"""One vLLM server: what it holds, how it is brought to hold what is wanted, and asking it for a response."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

from srppo.errors import DataError
from srppo.rollout.vllm_http import CONTROL_TIMEOUT, START, Connection, Gone, Refused, ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srppo.rollout.engine import Sampling
    from srppo.rollout.vllm_handover import Wanted


class AdapterRefused(Exception):
    """A server that takes no adapters at all. Never leaves the engine."""


class Server:
    """What is known of one server. One at a time hands weights over; everybody may ask."""

    def __init__(self, url: str):
        """Raises ConfigError for what is no server's address."""
        self.url = Connection(url).url
        self.model = ""  # the name its weights are served under
        self.adapters: set[str] = set()  # loaded by us
        self.loads = 0  # how often it was given weights
        self._lock = threading.Lock()

    def bring(self, wanted: Wanted, line: Connection, tokens: int) -> None:
        """Ask the server what it holds, and hand over what it lacks.

        tokens: of the longest prompt with its response. Raises Gone, ServerError, AdapterRefused, and DataError where that does not fit.
        """
        with self._lock:
            models, limit = self._served(line)
            if limit is not None and tokens > limit:
                raise DataError(
                    f"a prompt and its response may have {tokens} tokens, but {self.url} takes {limit}; "
                    "start it with a larger --max-model-len, or lower rollout.max_new_tokens or data.max_prompt_tokens"
                )
            try:
                held = _field(line, line.ask("/weight_info", timeout=CONTROL_TIMEOUT), "weight_version")
            except Refused as error:
                raise ServerError(
                    f"{self.url} cannot take new weights (its development endpoints are off). Start it with: {START}"
                ) from error
            if held != wanted.version:
                self._load(wanted, line)
            for name in self.adapters & models:
                if wanted.adapter is None or name != wanted.adapter.name:
                    line.ask("/v1/unload_lora_adapter", {"lora_name": name})
            self.adapters &= {wanted.adapter.name} if wanted.adapter else set()
            if wanted.adapter is not None and wanted.adapter.name not in models:
                try:
                    line.ask("/v1/load_lora_adapter", {"lora_name": wanted.adapter.name, "lora_path": str(wanted.adapter)})
                except Refused as error:
                    if error.status != 404 or _has_lora(line):
                        raise
                    raise AdapterRefused from error
                self.adapters.add(wanted.adapter.name)

    def _served(self, line: Connection) -> tuple[set[str], int | None]:
        """The names of the models and adapters it serves, and the most tokens of a sequence; notes its own model."""
        listed = _field(line, line.ask("/v1/models", timeout=CONTROL_TIMEOUT), "data")
        entries = [e for e in listed if isinstance(e, dict) and isinstance(e.get("id"), str)] if isinstance(listed, list) else []
        own = next((entry for entry in entries if not entry.get("parent")), None)
        if own is None:
            raise Gone("its list of models names none")
        self.model, limit = own["id"], own.get("max_model_len")
        return {entry["id"] for entry in entries}, limit if isinstance(limit, int) else None

    def _load(self, wanted: Wanted, line: Connection) -> None:
        # Whatever ends this half-way, the server does not claim weights that it no longer has.
        line.ask("/update_weight_version", {"new_version": f"{wanted.version}-unfinished"})
        try:
            line.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(wanted.weights)}})
        except Gone as error:
            if error.status == 500:  # it tried, and could not
                raise ServerError(
                    f"{self.url} cannot load the weights from {wanted.weights} ({error}). It must serve a model of the same architecture "
                    "and see that folder under the same path (rollout.shared_folder)"
                ) from error
            raise
        said = line.ask("/reset_prefix_cache", {})
        if isinstance(said, dict) and not said.get("success", True):
            raise Gone("the keys and values of the weights before are still in use")
        line.ask("/update_weight_version", {"new_version": wanted.version})
        self.loads += 1

    def ask(
        self, wanted: Wanted, line: Connection, tokens: int, prompt: Sequence[int], seed: int, sampling: Sampling, ends: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """A response and its tokens' log-probabilities. ends: the ids that end it. tokens: as for bring.

        Raises Gone where there is no answer, or one that is none.
        """
        if not line.open:  # a restart cuts all connections: whoever makes a new one looks at what the server holds
            self.bring(wanted, line, tokens)
        body = {
            "model": wanted.adapter.name if wanted.adapter else self.model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.deterministic else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # of the model's own configuration
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            # said, lest the server has other defaults from the model's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        loads = self.loads
        try:
            answer = line.ask("/v1/completions", body)
        except Refused as error:
            if error.status == 404:  # the adapter is unknown to it
                line.close()
                raise Gone(str(error)) from error
            raise
        if self.loads != loads:  # another row found it restarted
            raise Gone("it was restarted")
        return _response(line, answer, sampling.max_new_tokens)


def _response(line: Connection, answer: Any, limit: int) -> tuple[list[int], list[float]]:
    """What an answer to /v1/completions holds. Raises Gone for one that is no such answer, ServerError for a server too old."""
    choices = _field(line, answer, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _nonsense(line, "a completion without choices")
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if ids is None or logprobs is None:
        raise ServerError(f"{line.url} returns no token ids; srppo needs vLLM 0.20 or newer there")
    scores = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(ids, list) or not isinstance(scores, list) or not all(map(_token, ids)) or not all(map(_score, scores)):
        raise _nonsense(line, "token ids or log-probabilities that are no numbers")
    if not len(ids) == len(scores) <= limit or not ids:
        raise _nonsense(line, f"{len(ids)} tokens with {len(scores)} log-probabilities, where at most {limit} were asked for")
    return ids, [math.nan if score is None else float(score) for score in scores]  # JSON has no NaN


def _score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30)


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _field(line: Connection, answer: Any, name: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise _nonsense(line, f"an answer without {name!r}")
    return answer[name]


def _nonsense(line: Connection, what: str) -> Gone:
    """An answer that vLLM does not give: a proxy's page, say, or a server that is coming up. The next one may be right."""
    line.close()
    return Gone(f"it sent {what}")


def _has_lora(line: Connection) -> bool:
    """Whether the server has the endpoint that loads adapters (an adapter may be unknown there, too, which is another 404)."""
    try:
        line.ask("/v1/unload_lora_adapter", {"lora_name": "srppo-none"})
    except Refused as error:
        return "Not Found" not in str(error)
    return True
