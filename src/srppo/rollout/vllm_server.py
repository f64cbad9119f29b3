"""vLLM servers as a rollout engine: rows go to one or several servers over HTTP, weights and adapters through a folder all of them see.

A server is kept running. It loads new weights in place (vLLM's collective_rpc "reload_weights"), or a new LoRA adapter, and is asked
before each use which weights it has, so one that was restarted gets them again.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from srppo.errors import ConfigError, DataError, ModelError
from srppo.records import Rollout
from srppo.rollout.decode import unwrapped
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.record import check_lengths, gathered, position_limit
from srppo.rollout.vllm_http import START, Connection, Gone, Refused, ServerError, patiently
from srppo.rollout.vllm_weights import Adapter, Mark, active_adapter, named_weights, plain_tensors, write_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.models.load import SpecialTokens


@dataclass(frozen=True)
class Wanted:
    """What every server has to hold: the version of its weights, and the adapter asked for beside them."""

    version: str
    weights: Path
    adapter: Path | None = None  # its name is the folder's


@dataclass
class Server:
    """What is known of one server."""

    url: str
    model: str = ""  # the name its weights are served under
    limit: int | None = None  # tokens a sequence may have there
    adapters: set[str] = field(default_factory=set)  # loaded by us
    loads: int = 0  # how often it was given weights
    lock: threading.Lock = field(default_factory=threading.Lock)


class VLLMServerEngine:
    """A RolloutEngine that asks vLLM servers.

    special: its EOS ids end a response, and nothing else does. urls: one server or several, which share the rows. rows: requests at
    once for each. folder: where weights are handed over, under the same path on every server's machine. patience: seconds that a
    server may be gone.
    """

    def __init__(self, special: SpecialTokens, urls: Sequence[str], rows: int, folder: str | Path, patience: float = 120.0):
        if rows < 1:
            raise ConfigError(f"rollout.batch_size is {rows}; at least one row is decoded at once")
        if not urls:
            raise ConfigError("rollout.server names no server; it looks like http://host:8000")
        self.special, self.rows, self.patience = special, rows, patience
        self.servers = [Server(Connection(url).url) for url in urls]
        self.syncs = 0  # how often weights or an adapter were handed over
        self._place = Path(folder).absolute()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._run = uuid.uuid4().hex[:8]
        self._wanted: Wanted | None = None
        self._weights: Mark | None = None
        self._adapter: Mark | None = None
        self._count = 0
        self._lora = True  # until a server refuses an adapter

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """One response a row, in the order of the rows (see RolloutEngine). The record's tensors are on the CPU.

        Raises DataError for an empty prompt or one that leaves no room, ModelError for NaN or infinite logits, ServerError for a
        server that is gone or refuses.
        """
        assert len(prompts) == len(seeds) and (prompt_index is None or len(prompt_index) == len(prompts))
        model, limit = unwrapped(model), sampling.max_new_tokens
        rows = [tuple(p) for p in prompts]
        check_lengths([len(p) for p in rows], limit, position_limit(model.config))
        if not rows:
            return gathered([], rows, prompt_index, limit, self.special.eos_ids, None)
        self._sync(model)
        self._check_room(max(len(p) for p in rows) + limit)
        return gathered(self._ask_all(rows, seeds, sampling), rows, prompt_index, limit, self.special.eos_ids, on_progress)

    def close(self) -> None:
        """Remove the weights handed over. The servers keep what they hold."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = self._wanted = self._weights = self._adapter = None

    # --- asking for responses

    def _ask_all(
        self, rows: list[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """Rows as they are answered. Every server has its threads, which take the next row when they are free."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, list[int], list[float]] | BaseException] = queue.SimpleQueue()
        for row in range(len(rows)):
            waiting.put(row)
        stop, lines = threading.Event(), []

        def work(server: Server, line: Connection) -> None:
            try:
                while not stop.is_set():
                    try:
                        row = waiting.get_nowait()
                    except queue.Empty:
                        break
                    answers.put((row, *self._ask(server, line, rows[row], seeds[row], sampling, stop)))
            except BaseException as error:  # shown by the main thread
                answers.put(error)
            finally:
                line.close()

        each = min(self.rows, -(-len(rows) // len(self.servers)))
        for server in self.servers:
            for _ in range(each):
                lines.append(Connection(server.url))
                threading.Thread(target=work, args=(server, lines[-1]), daemon=True).start()
        try:
            for _ in rows:
                answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            stop.set()
            for line in lines:
                line.close()

    def _ask(
        self, server: Server, line: Connection, prompt: tuple[int, ...], seed: int, sampling: Sampling, stop: threading.Event
    ) -> tuple[list[int], list[float]]:
        wanted = self._wanted
        assert wanted is not None
        body = {
            "model": wanted.adapter.name if wanted.adapter else server.model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.deterministic else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": list(self.special.eos_ids),
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

        def attempt() -> Any:
            if not line.open:  # a restart cuts all connections: whoever makes a new one looks at what the server holds
                self._bring(server, wanted, line)
            loads = server.loads
            try:
                answer = line.ask("/v1/completions", body)
            except Refused as error:
                if error.status == 404:  # the adapter is unknown to it
                    line.close()
                    raise Gone(str(error)) from error
                raise
            if server.loads != loads:  # another row found it restarted
                raise Gone("it was restarted")
            return answer

        choice = patiently(attempt, server.url, self.patience, stop)["choices"][0]
        ids = choice.get("token_ids")
        if ids is None or choice.get("logprobs") is None:
            raise ServerError(f"{server.url} returns no token ids; srppo needs vLLM 0.20 or newer there")
        return ids, [float("nan") if score is None else score for score in choice["logprobs"]["token_logprobs"]]  # JSON has no NaN

    def _check_room(self, tokens: int) -> None:
        for server in self.servers:
            if server.limit is not None and tokens > server.limit:
                raise DataError(
                    f"a prompt and its response may have {tokens} tokens, but {server.url} takes {server.limit}; "
                    "start it with a larger --max-model-len, or lower rollout.max_new_tokens or data.max_prompt_tokens"
                )

    # --- handing over weights

    def _sync(self, model: PreTrainedModel) -> None:
        """Every server holds this model's weights and its active adapter when this returns."""
        adapter = active_adapter(model)
        beside = adapter if adapter is not None and self._lora and adapter.servable else None
        old = self._wanted
        wanted = self._written(model, beside, None if beside else adapter)
        try:
            self._bring_all(wanted)
        except AdapterRefused:
            self._lora = False  # from now on merged
            self._bring_all(wanted := self._written(model, None, adapter))
        if old is not None:
            for path in {old.weights, old.adapter} - {wanted.weights, wanted.adapter}:
                if path is not None:  # no server needs it any more; what cannot be removed now goes with the whole folder
                    shutil.rmtree(path, ignore_errors=True)

    def _written(self, model: PreTrainedModel, beside: Adapter | None, merge: Adapter | None) -> Wanted:
        """The folders with what the model holds now; written anew only where that has changed."""
        tensors, note = list(plain_tensors(model).values()), None
        if merge is not None:
            tensors, note = tensors + merge.tensors, (merge.names, merge.scales)
        wanted = self._wanted
        if wanted is None or self._weights is None or not self._weights.holds(tensors, note):
            self._weights = None
            path = self._new("weights")
            write_weights(model, merge, path)
            self._weights = Mark(tensors, note)
            wanted = Wanted(path.name, path)
        if beside is None:
            self._adapter, wanted = None, Wanted(wanted.version, wanted.weights)
        else:
            note = (beside.names, beside.scales)
            if wanted.adapter is None or self._adapter is None or not self._adapter.holds(beside.tensors, note):
                path = self._new("adapter")
                beside.write(path)
                self._adapter = Mark(beside.tensors, note)
                wanted = Wanted(wanted.version, wanted.weights, path)
        self._wanted = wanted
        return wanted

    def _new(self, kind: str) -> Path:
        """A path no other run and no earlier sync has used."""
        if self._folder is None:
            try:
                self._place.mkdir(parents=True, exist_ok=True)
                self._folder = tempfile.TemporaryDirectory(prefix="srppo-", dir=self._place)
            except OSError as error:
                raise ConfigError(f"rollout.shared_folder: {self._place} cannot be written ({error}); name another folder") from error
            Path(self._folder.name).chmod(0o755)  # the server may be another user's
        self._count += 1
        self.syncs += 1
        return Path(self._folder.name) / f"{kind}-{self._run}-{self._count}"

    def _bring_all(self, wanted: Wanted) -> None:
        errors: list[BaseException] = []

        def bring(server: Server) -> None:
            line = Connection(server.url)
            try:
                patiently(lambda: self._bring(server, wanted, line), server.url, self.patience)
            except BaseException as error:  # raised again below
                errors.append(error)
            finally:
                line.close()

        threads = [threading.Thread(target=bring, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _bring(self, server: Server, wanted: Wanted, line: Connection) -> None:
        """Ask the server what it holds, and hand over what it lacks. Raises Gone."""
        with server.lock:
            models = self._served(server, line)
            try:
                held = line.ask("/weight_info")["weight_version"]
            except Refused as error:
                raise ServerError(
                    f"{server.url} cannot take new weights (its development endpoints are off). Start it with: {START}"
                ) from error
            if held != wanted.version:
                self._load(server, wanted, line)
            for name in server.adapters & models:
                if wanted.adapter is None or name != wanted.adapter.name:
                    line.ask("/v1/unload_lora_adapter", {"lora_name": name})
            server.adapters &= {wanted.adapter.name} if wanted.adapter else set()
            if wanted.adapter is not None and wanted.adapter.name not in models:
                try:
                    line.ask("/v1/load_lora_adapter", {"lora_name": wanted.adapter.name, "lora_path": str(wanted.adapter)})
                except Refused as error:
                    if error.status != 404 or _has_lora(line):
                        raise
                    raise AdapterRefused from error
                server.adapters.add(wanted.adapter.name)

    def _served(self, server: Server, line: Connection) -> set[str]:
        """The names of the models and adapters it serves; notes its own."""
        listed = line.ask("/v1/models")["data"]
        own = next(entry for entry in listed if not entry.get("parent"))
        server.model, server.limit = own["id"], own.get("max_model_len")
        return {entry["id"] for entry in listed}

    def _load(self, server: Server, wanted: Wanted, line: Connection) -> None:
        try:
            line.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(wanted.weights)}})
        except Gone as error:
            if "status 500" in str(error):  # it tried, and could not
                raise ServerError(
                    f"{server.url} cannot load the weights from {wanted.weights} ({error}). It must serve a model of the same architecture "
                    "and see that folder under the same path (rollout.shared_folder)"
                ) from error
            raise
        said = line.ask("/reset_prefix_cache", {})
        if said is not None and not said.get("success", True):
            raise Gone("the keys and values of the weights before are still in use")
        line.ask("/update_weight_version", {"new_version": wanted.version})
        server.loads += 1


class AdapterRefused(Exception):
    """A server that takes no adapters at all. Never leaves the engine."""


def _has_lora(line: Connection) -> bool:
    """Whether the server has the endpoint that loads adapters (an adapter may be unknown there, too, which is another 404)."""
    try:
        line.ask("/v1/unload_lora_adapter", {"lora_name": "srppo-none"})
    except Refused as error:
        return "Not Found" not in str(error)
    return True


def write_weights(model: PreTrainedModel, merge: Adapter | None, folder: Path) -> None:
    """config.json and model.safetensors, a tied weight once."""
    folder.mkdir(parents=True)
    try:
        weights, seen = {}, set()
        for name, tensor in named_weights(model, merge).items():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in seen:
                weights[name] = _plain(tensor)
            seen.add(key)
    except ValueError as error:
        raise ModelError(str(error)) from error
    write_config(model, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
