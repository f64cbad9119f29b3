"""vLLM inside the training process, as a rollout engine: token ids in and out, the trainer's live weights in it.

vLLM is imported when the engine is first used. It is made from the model's configuration alone; every weight comes from the live
model, so any model that transformers has loaded (from GGUF too) can be sampled, and nothing is read from disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from srppo.errors import ConfigError, ModelError
from srppo.records import Rollout
from srppo.rollout.decode import unwrapped
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.record import check_lengths, gathered, position_limit
from srppo.rollout.vllm_weights import Adapter, Mark, TiedAdapter, active_adapter, named_weights, plain_tensors, write_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.models.load import SpecialTokens

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be asked for
CPU_BLOCK = 128  # tokens in a block of vLLM's key-value cache on a CPU
IRRELEVANT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
IRRELEVANT |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # we say ourselves where a response ends


class VLLMEngine:
    """A RolloutEngine that samples with vLLM.

    special: its EOS ids end a response, and nothing else does. rows: sequences decoded at once. dtype: vLLM's precision, the model's
    own by default. memory: share of the GPU that vLLM may take, weights included; of the machine's memory at most, on a CPU, for keys
    and values. lora_rank: the rank that adapters have; 0 for none. merge: whether an adapter is handed over merged into the weights
    (always possible) or beside them; by default merged in float32, where that rounds nothing away. max_tokens: length of the longest
    prompt and its response together, where it is known: vLLM reserves for it (it is started again if a longer one comes).
    """

    def __init__(
        self,
        special: SpecialTokens,
        rows: int,
        *,
        dtype: str | None = None,
        memory: float = 0.3,
        lora_rank: int = 0,
        merge: bool | None = None,
        max_tokens: int = 0,
    ):
        if rows < 1:
            raise ConfigError(f"rollout.batch_size is {rows}; at least one row is decoded at once")
        self.special, self.rows, self.dtype, self.memory, self.lora_rank, self.merge = special, rows, dtype, memory, lora_rank, merge
        self.syncs = 0  # how often weights or an adapter were handed over
        self._max_tokens = max_tokens
        self._llm: Any = None
        self._made_for: object = None
        self._lora = False  # whether the running vLLM takes adapters
        self._weights: Mark | None = None  # what it holds
        self._adapter: Mark | None = None
        self._request: Any = None  # vLLM's LoRARequest of the adapter it holds
        self._adapters = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

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

        Weights are handed over first if they are not the ones of last time. The model and the global random state are left alone.
        Raises DataError for an empty prompt or one that leaves no room within the model's positions, ModelError when the model gives
        NaN or infinite logits or vLLM cannot run it, ConfigError without vLLM.
        """
        assert len(prompts) == len(seeds) and (prompt_index is None or len(prompt_index) == len(prompts))
        model, limit = unwrapped(model), sampling.max_new_tokens
        rows = [tuple(p) for p in prompts]
        check_lengths([len(p) for p in rows], limit, position_limit(model.config))
        if not rows:
            return gathered([], rows, prompt_index, limit, self.special.eos_ids, None)
        with _undisturbed(model.device):
            self._start(model, max(len(p) for p in rows) + limit)
            self._sync(model)
            return gathered(self._decode(rows, seeds, sampling), rows, prompt_index, limit, self.special.eos_ids, on_progress)

    def close(self) -> None:
        """Stop vLLM and free its memory. The next use starts it again."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._weights = self._adapter = self._request = None
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _decode(
        self, rows: list[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """Rows as they end: number, tokens with the EOS, log-probabilities. What is unfinished is dropped if the caller stops."""
        engine = self._llm.llm_engine
        waiting: set[str] = set()
        try:
            for row, (prompt, seed) in enumerate(zip(rows, seeds, strict=True)):
                name = str(row)
                engine.add_request(name, {"prompt_token_ids": list(prompt)}, self._params(sampling, seed), lora_request=self._request)
                waiting.add(name)
            while waiting:
                for output in engine.step():
                    if output.finished:
                        waiting.discard(output.request_id)
                        said = output.outputs[0]
                        ids = list(said.token_ids)
                        yield int(output.request_id), ids, [scores[i].logprob for i, scores in zip(ids, said.logprobs, strict=True)]
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0 if sampling.deterministic else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=list(self.special.eos_ids),
            ignore_eos=True,  # of the model's own configuration
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    # --- the running vLLM

    def _start(self, model: PreTrainedModel, tokens: int) -> None:
        """A vLLM for models of this configuration and sequences of so many tokens, unless it is running already."""
        config = {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT}
        made_for = (type(model).__name__, config)
        if self._llm is not None and self._made_for == made_for and tokens <= self._max_tokens:
            return
        self.close()
        self._max_tokens = max(self._max_tokens, tokens)
        limit = position_limit(model.config)
        if limit is not None:
            self._max_tokens = min(self._max_tokens, limit)
        vllm = import_vllm()
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",  # every weight is handed over
            "dtype": self.dtype or str(model.dtype).removeprefix("torch."),
            "max_model_len": self._max_tokens,
            "max_num_seqs": self.rows,
            "generation_config": "vllm",  # no sampling defaults of the model's
            "logprobs_mode": "raw_logprobs",  # of the untempered, unfiltered distribution
            "disable_log_stats": True,
            "seed": 0,
        }
        if model.device.type == "cpu":
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": self._cpu_cache(model)}
        else:
            options["gpu_memory_utilization"] = self.memory
        merge = options["dtype"] == "float32" if self.merge is None else self.merge
        self._lora = not merge and 0 < self.lora_rank <= RANKS[-1] and takes_lora(type(model).__name__)
        if self._lora:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= self.lora_rank)}
        with tempfile.TemporaryDirectory() as folder:
            write_config(model, Path(folder))
            try:
                self._llm = vllm.LLM(model=folder, **options)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"vLLM cannot run this model ({type(model).__name__}): {_first_line(error)}. Use rollout.engine: torch, "
                    "or see docs/vllm.md for what vLLM needs"
                ) from error
        self._made_for = made_for

    def _cpu_cache(self, model: PreTrainedModel) -> int:
        """Bytes for the keys and values of `rows` of the longest sequences, within the share of memory."""
        text: Any = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = 4 if (self.dtype or str(model.dtype)).endswith("float32") else 2
        blocks = self.rows * -(-self._max_tokens // CPU_BLOCK) + 1
        wanted = 2 * text.num_hidden_layers * heads * size * width * blocks * CPU_BLOCK
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(min(wanted, self.memory * memory))

    def _sync(self, model: PreTrainedModel) -> None:
        """The running vLLM holds this model's weights and its active adapter when this returns."""
        adapter = active_adapter(model)
        servable = adapter is not None and self._lora and adapter.servable and adapter.rank <= self.lora_rank
        beside, merge = (adapter, None) if servable else (None, adapter)
        tensors, note = list(plain_tensors(model).values()), None
        if merge is not None:
            tensors, note = tensors + merge.tensors, (merge.names, merge.scales)
        if self._weights is None or not self._weights.holds(tensors, note):
            self._weights = None  # until it is done
            self._load(model, merge)
            self._weights = Mark(tensors, note)
            self.syncs += 1
        if beside is None:
            self._drop_adapter()
        elif self._adapter is None or not self._adapter.holds(beside.tensors, (beside.names, beside.scales)):
            self._drop_adapter()
            self._add(beside)
            self._adapter = Mark(beside.tensors, (beside.names, beside.scales))
            self.syncs += 1

    def _load(self, model: PreTrainedModel, merge: Adapter | None) -> None:
        try:
            weights = named_weights(model, merge)
        except TiedAdapter:
            raise ModelError(
                "tuning.lora_targets names the embedding or the output head of a model that ties them: vLLM stores them as one. "
                "Use rollout.engine: torch, or other targets"
            ) from None
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if not self._llm.reset_prefix_cache():
            raise ModelError("vLLM did not forget the keys and values of the weights before; this is a fault of srppo or vLLM")

    def _add(self, adapter: Adapter) -> None:
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name) / "adapter"
        adapter.write(folder)
        # a new id each time: vLLM's cached keys and values of the adapter before are then never taken for this one's
        request = LoRARequest(f"adapter-{self._adapters}", self._adapters, str(folder))
        self._llm.llm_engine.add_lora(request)
        self._request = request

    def _drop_adapter(self) -> None:
        if self._request is not None:
            self._llm.llm_engine.remove_lora(self._request.lora_int_id)
        if self._folder is not None:
            self._folder.cleanup()
        self._request = self._adapter = self._folder = None


def import_vllm() -> Any:
    """The package. Raises ConfigError if it is not there or the process is one of several that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError("rollout.engine: vllm runs inside one process; in distributed training give servers with rollout.server")
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm import LLM  # noqa: F401  # what it needs itself is imported with this
    except ImportError as error:
        raise ConfigError(f"rollout.engine: vllm needs vLLM, which cannot be imported ({error}). {INSTALL}") from error
    return vllm


INSTALL = "On a CPU `make vllm` installs it, on a GPU `pip install 'srppo[vllm]'`; or use rollout.engine: torch"


def takes_lora(architecture: str) -> bool:
    """Whether vLLM's implementation of a transformers class can apply adapters."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    known = ModelRegistry.models.get(architecture)
    return known is not None and supports_lora(known.load_model_cls())


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """The global random states and torch.set_num_threads are after the block what they were before: vLLM seeds and replaces them."""
    threads, numbers, arrays = torch.set_num_threads, random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            torch.set_num_threads = threads
            random.setstate(numbers)
            np.random.set_state(arrays)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
