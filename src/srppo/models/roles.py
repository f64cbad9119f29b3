"""The roles a language model plays in a run: base, sft, policy, critic, and any other that is given a name.

One object owns them all. How they share memory is the store's affair (full_roles.py, lora_roles.py); what they mean is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srppo.config import ModelConfig, RunConfig
from srppo.errors import ConfigError, ModelError
from srppo.models.compiled import FOLLOWS_ADAPTERS, compile_layers, compiles_adapters
from srppo.models.critic import token_values, value_head
from srppo.models.flat import flat_row
from srppo.models.forward import autocasting, token_scores
from srppo.models.full_roles import FullRoles, refuse_adapter
from srppo.models.least_squares import LeastSquaresValues
from srppo.models.load import load_model, resolve_device
from srppo.models.lora_roles import LoraRoles
from srppo.models.plan import plan
from srppo.models.prefix import run_prefix
from srppo.models.saving import atomic_folder, model_card, valid_generation_config
from srppo.models.sharding import run_on, sharding_of
from srppo.models.source import Source, find_source, is_adapter, model_source, read_json
from srppo.models.tokens import (
    SpecialTokens,
    check_fit,
    check_own_vocabulary,
    check_same_vocabulary,
    load_tokenizer,
    mend_gguf_ends,
    special_tokens,
)
from srppo.models.weights import copy_into, fingerprint, sketch, snapshot
from srppo.records import Features, TokenBatch, TokenScores
from srppo.world import world

CRITIC = "critic"


class Store(Protocol):
    """Where the roles' weights live. "base" is always there and always frozen; the role "critic" is a trunk (with or without a head)."""

    kind: str

    def names(self) -> set[str]: ...
    def create(self, role: str, source: str) -> None: ...
    def create_critic(self, source: str) -> None: ...
    def extrapolate(self, role: str, source: str, alpha: float) -> None: ...
    def load(self, role: str, place: str) -> None: ...
    def drop(self, role: str) -> None: ...
    def freeze(self, role: str) -> None: ...
    def frozen(self, role: str) -> bool: ...
    def use(self, role: str, train: bool) -> AbstractContextManager[PreTrainedModel]: ...
    def parameters(self, role: str) -> dict[str, nn.Parameter]: ...
    def tensors(self, role: str) -> dict[str, Tensor]: ...
    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None: ...
    def vocabulary_rows(self, role: str) -> int: ...
    def gather(self, role: str) -> dict[str, Tensor] | None: ...
    def write(self, role: str, folder: str, weights: dict[str, Tensor] | None) -> None: ...
    def prefix_depth(self) -> int: ...
    def model(self, role: str) -> PreTrainedModel: ...


class Roles:
    """The models of a run by role. Made by build_roles; the attributes are for reading."""

    def __init__(
        self,
        store: Store,
        tokenizer: PreTrainedTokenizerBase,
        special: SpecialTokens,
        model_config: ModelConfig,
        source: Source,
        device: torch.device,
    ):
        self.kind, self.tokenizer, self.special, self.model_config, self.device = store.kind, tokenizer, special, model_config, device
        self._store, self._source = store, source
        self._head: nn.Linear | None = None  # of a critic with a trunk
        self._fitted: LeastSquaresValues | None = None  # a critic without one

    @property
    def flat(self) -> bool:
        """Whether batches are run as flat rows, without padding."""
        return plan(self._store.model("base")).flat

    @property
    def spread(self) -> bool:
        """Whether the weights are spread over the processes, so that all must run a model as often as each other."""
        return isinstance(self._store.model("base"), FSDPModule)

    @property
    def prefix_depth(self) -> int:
        """How many of the decoder's first layers are the same for all roles (in lora tuning, those below the first adapter), where their
        states can be kept and used again; 0 where they cannot."""
        return self._store.prefix_depth()

    def prefix_states(self, batch: TokenBatch) -> Tensor:
        """[tokens, H] of the batch's flat row: what enters layer prefix_depth."""
        with self.use("base") as model, autocasting(model.device, self.model_config.autocast):
            return run_on(model, run_prefix, flat_row(batch), self.prefix_depth)

    # --- which roles there are

    def names(self) -> set[str]:
        """The language-model roles (the critic, which is none, not among them)."""
        return self._store.names() - {CRITIC}

    def has(self, role: str) -> bool:
        return role in self._store.names()

    def create(self, role: str, source: str) -> None:
        """A new role that starts as an exact copy of the source's weights. Raises ModelError if it exists or the source does not."""
        self._check_new(role)
        self._check(source)
        self._store.create(role, source)

    def extrapolate(self, role: str, source: str, alpha: float) -> None:
        """A new role with the weights theta_source + alpha (theta_source - theta_base) (ExPO, Zheng et al. 2024, arXiv 2404.16792, eq. 1).

        alpha 0 is a copy of the source, -1 is base. In lora tuning theta are the merged weights, W + scale B A.
        Raises ModelError if the role exists, the source does not, or is base or of another architecture, or alpha is not finite.
        """
        self._check_new(role)
        self._check(source)
        if source in ("base", CRITIC):
            raise ModelError(f"{source} cannot be extrapolated: only a language model trained from base has a direction away from it")
        if not math.isfinite(alpha):
            raise ModelError(f"weights cannot be extrapolated by alpha {alpha}; it is a finite number")
        self._store.extrapolate(role, source, alpha)

    def load(self, role: str, folder: str | Path) -> None:
        """A new role from a folder or hub id: a model in full tuning, a LoRA adapter in lora tuning.

        Raises ModelError if the place holds the other kind, another vocabulary, pickled weights, or does not fit the base.
        """
        self._check_new(role)
        place = str(folder)
        source = find_source(place)
        if self.kind == "full" and source.gguf_file is None and is_adapter(source):
            raise refuse_adapter(place)
        self._store.load(role, place)
        try:
            own = load_tokenizer(self.model_config, name=place) if _has_tokenizer(source) else self.tokenizer
            check_same_vocabulary(
                self.tokenizer, own, self._store.vocabulary_rows("base"), self._store.vocabulary_rows(role), ("base", role)
            )
        except ModelError:
            self._store.drop(role)
            raise

    def drop(self, role: str) -> None:
        """Forget a role and free its memory."""
        if role == CRITIC and self._fitted is not None:
            self._fitted = None
            return
        self._check(role)
        if role == "base":
            raise ModelError("base cannot be dropped")
        self._store.drop(role)
        if role == CRITIC:
            self._head = None

    def freeze(self, role: str) -> None:
        """From now on never trained; in full tuning also converted to model.frozen_dtype. (base is frozen from the start.)"""
        self._check(role)
        self._store.freeze(role)

    # --- acting as a role

    @contextmanager
    def use(self, role: str, *, train: bool = False) -> Iterator[PreTrainedModel]:
        """The model acting as a role.

        train=False: eval mode, no gradient. train=True: train mode, gradients for this role's parameters alone.
        Uses nest. On exit, also by an exception, adapter, requires_grad flags, modes and grad mode are as before.
        Raises ModelError if there is no such role, or train is asked of a frozen one.
        """
        self._check(role)
        if train and self._store.frozen(role):
            raise ModelError(f"{role} is frozen and cannot be trained; create another role from it")
        with self._store.use(role, train) as model:
            yield model

    def score(self, role: str, batch: TokenBatch, *, entropy: bool = False, states: bool = False, train: bool = False) -> TokenScores:
        """Log-probabilities [N] float32 that the role gives the batch's target tokens (see forward.token_scores)."""

        def words(model: PreTrainedModel) -> tuple[Tensor | None, ...]:
            scores = token_scores(model, batch, entropy=entropy, states=states, autocast=self.model_config.autocast)
            return scores.logprobs, scores.entropy, scores.states

        with self.use(role, train=train) as model:
            logprobs, spread, entering = run_on(model, words)
        assert logprobs is not None
        return TokenScores(logprobs, spread, entering)

    # --- weights

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What training this role changes: all parameters in full tuning, the adapter's in lora; none of a frozen role."""
        self._check(role)
        return self._store.parameters(role)

    def weights(self, role: str) -> dict[str, Tensor]:
        """The role's own weights themselves, for a checkpoint that is written at once."""
        self._check(role)
        return self._store.tensors(role)

    def state(self, role: str) -> dict[str, Tensor]:
        """CPU clones of the role's own weights."""
        self._check(role)
        return snapshot(self._store.tensors(role))

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Put back a `state`, exactly. Raises ModelError if it is of another model, or for base."""
        self._check(role)
        if role == "base":
            raise ModelError("base is never changed")
        self._store.load_state(role, state)

    def fingerprint(self, role: str) -> str:
        """A hash of the role's own weights (in lora tuning the adapter's; base has its own)."""
        self._check(role)
        return fingerprint(self._store.tensors(role))

    def save(self, role: str, folder: str | Path, card: str | None = None) -> None:
        """Write the role as a Hugging Face model folder, or as a PEFT adapter folder in lora tuning, with tokenizer,
        generation config and README.md. The folder appears complete or not at all; one that exists is replaced.

        card: Markdown for README.md, to which the lines that load the folder are added. Raises RunFolderError, ModelError.
        """
        self._check(role)
        weights = self._store.gather(role)

        def write() -> None:
            with atomic_folder(folder) as work:
                self._write(role, work, card, weights)

        world().once(write)

    def _write(self, role: str, work: Path, card: str | None, weights: dict[str, Tensor] | None) -> None:
        self._store.write(role, str(work), weights)
        self.tokenizer.save_pretrained(str(work))
        generation = getattr(self._store.model("base"), "generation_config", None)
        if generation is not None:
            valid_generation_config(generation, self.special).save_pretrained(str(work))
        text = model_card(card, role, self._source, self.model_config.dtype, adapter=self.kind == "lora")
        (work / "README.md").write_text(text, encoding="utf-8")

    # --- the critic

    @property
    def has_critic(self) -> bool:
        return self._head is not None or self._fitted is not None

    @property
    def critic_has_trunk(self) -> bool:
        return self._head is not None

    def create_critic(self, source: str, trunk: bool = True) -> None:
        """A critic whose values start at exactly 0, with a trunk that starts as a copy of the source's, or with none: fitted by least
        squares to features that the caller hands to `values_of` and `fit_critic`: states of the source and a figure beside them."""
        self._check_new(CRITIC, critic=True)
        self._check(source)
        width = plan(self._store.model(source)).width
        if not trunk:
            self._fitted = LeastSquaresValues(width, 1, self.device)
            return
        self._store.create_critic(source)
        self._head = value_head(width, self.device)

    def values(self, batch: TokenBatch, *, train: bool = False) -> Tensor:
        """[N] float32: the critic's value of the state that predicts each target token. For a critic with a trunk."""
        head = self._value_head()
        with self._store.use(CRITIC, train) as trunk:
            return run_on(trunk, token_values, head, batch, autocast=self.model_config.autocast)

    def values_of(self, features: Features, rows: Sequence[int]) -> Tensor:
        """[N] float32: the values of the response tokens of some rows, row by row. For a critic without a trunk."""
        fitted = self._least_squares()
        return torch.cat([torch.empty(0, device=self.device), *(fitted(x) for _, x in features.parts(rows))])

    def fit_critic(self, features: Features, rows: Sequence[int], returns: Sequence[Tensor]) -> bool:
        """Fit the values to some rows of a round, with their returns B of [T_b] (least_squares.py). For a critic without a trunk.

        False, and nothing changed, where one of them is not finite.
        """
        parts = features.parts(rows)
        return self._least_squares().fit(((x, torch.cat([returns[r] for r in part])) for part, x in parts), world().sum_)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """What gradient steps change: trunk and head; of a critic without a trunk nothing."""
        if self._fitted is not None:
            return {}
        head = dict(self._value_head().named_parameters())
        return {**_prefixed("trunk.", self._store.parameters(CRITIC)), **_prefixed("value_head.", head)}

    def critic_weights(self) -> dict[str, Tensor]:
        """The critic's weights themselves, for a checkpoint that is written at once."""
        return self._critic_tensors()

    def critic_state(self) -> dict[str, Tensor]:
        """CPU clones of the critic's weights."""
        return snapshot(self._critic_tensors())

    def load_critic_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back a `critic_state`, exactly. Raises ModelError if it is of another critic."""
        copy_into(self._critic_tensors(), state, CRITIC)

    def save_critic(self, folder: str | Path, card: str | None = None) -> None:
        """Write the trunk, if it has one (a model folder, or an adapter folder), and value_head.safetensors: weight [1, H], or
        [1, H + 1] without a trunk, and bias [1]."""
        head = self._fitted.linear() if self._fitted else dict(self._value_head().named_parameters())
        inputs = "this trunk's last states" if self.critic_has_trunk else "the SFT model's last states and, last, the reward's terms so far"
        told = "" if self.critic_has_trunk else " It has no trunk of its own."
        text = card or f"# Critic\n\nThe value function of a Self-Rewarding PPO run: `value_head.safetensors` on {inputs}.{told}\n"
        weights = self._store.gather(CRITIC) if self.critic_has_trunk else None

        def write() -> None:
            with atomic_folder(folder) as work:
                if self.critic_has_trunk:
                    self._write(CRITIC, work, text, weights)
                else:
                    (work / "README.md").write_text(text, encoding="utf-8")
                save_file({n: p.detach().cpu().contiguous() for n, p in head.items()}, work / "value_head.safetensors")

        world().once(write)

    def _critic_tensors(self) -> dict[str, Tensor]:
        if self._fitted is not None:
            return self._fitted.tensors()
        head = {f"value_head.{n}": p for n, p in self._value_head().named_parameters()}
        return {**{f"trunk.{n}": t for n, t in self._store.tensors(CRITIC).items()}, **head}

    def _value_head(self) -> nn.Linear:
        if self._head is None:
            raise ModelError("there is no critic yet; create_critic makes one")
        return self._head

    def _least_squares(self) -> LeastSquaresValues:
        if self._fitted is None:
            raise ModelError("there is no critic without a trunk; create_critic(source, trunk=False) makes one")
        return self._fitted

    # --- checks

    def _check(self, role: str) -> None:
        if role not in self._store.names():
            raise ModelError(f"there is no role {role!r}; there are {', '.join(sorted(self._store.names()))}")

    def _check_new(self, role: str, critic: bool = False) -> None:
        if role in self._store.names() or (role == CRITIC and self._fitted is not None):
            raise ModelError(f"the role {role!r} exists already; drop it first")
        if not role.isidentifier() or (role == CRITIC and not critic):
            raise ModelError(f"{role!r} cannot be the name of a role (a plain word other than critic can)")


def build_roles(config: RunConfig) -> Roles:
    """Load tokenizer and base model, check that they fit, and set up the roles. Only base is there at first. Raises ModelError."""
    model, source = config.model, model_source(config.model)
    dtype, frozen_dtype = model.dtype, model.frozen_dtype or model.dtype
    device = resolve_device(model.device)
    sharding = sharding_of(config.parallel, device)
    placed = model if sharding is None else model.model_copy(update={"device": "cpu"})  # spread from there, layer by layer

    def read(name: str | None, dtype: str) -> PreTrainedModel:
        found = load_model(placed, name=name, dtype=dtype)
        plan(found)
        return found

    def load(name: str | None, dtype: str = dtype) -> PreTrainedModel:
        seen = []

        def reading() -> PreTrainedModel:
            found = read(name, dtype)
            seen.append("" if world().alone else sketch(found))
            return found

        found = world().in_turn(reading) if sharding is None else sharding.load(reading)
        world().check_alike({f"model ({name or model.name})": seen[0]})
        return found

    base = load(None, frozen_dtype if config.tuning.kind == "full" else dtype)
    tokenizer = load_tokenizer(model)
    check_fit(tokenizer, base)
    if model.tokenizer is not None and _has_tokenizer(source):
        check_own_vocabulary(tokenizer, load_tokenizer(model.model_copy(update={"tokenizer": None})))
    if source.gguf_file is not None:
        mend_gguf_ends(tokenizer, base)
    special = special_tokens(tokenizer, base)
    store: Store
    if config.tuning.kind == "full":
        precisions = getattr(torch, dtype), getattr(torch, frozen_dtype)
        offload = model.offload_frozen and device.type != "cpu"
        store = FullRoles(base, load, *precisions, offload, model.compile, sharding)
    else:
        store = LoraRoles(base, config.tuning, source, config.seed, model.allow_pickle)
        if model.compile and not compiles_adapters():
            raise ConfigError(
                f"model.compile with tuning.kind lora needs torch {'.'.join(map(str, FOLLOWS_ADAPTERS))}: the compiled layers of older "
                f"ones (this is {torch.__version__}) overlook which adapter is active. Set model.compile: false"
            )
        if model.compile:
            compile_layers(base)
    return Roles(store, tokenizer, special, model, source, device)


def _prefixed(prefix: str, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {prefix + name: p for name, p in named.items()}


def _has_tokenizer(source: Source) -> bool:
    return source.gguf_file is not None or read_json(source, "tokenizer_config.json") is not None
