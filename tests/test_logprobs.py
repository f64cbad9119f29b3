"""logprobs.py against torch's distributions, TRL, Hugging Face heads and finite differences; and what memory it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srppo.logprobs import Head, chunked_logprobs, token_logprobs

N, H, V = 23, 8, 31
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "multiplier": {"multiplier": 0.25},
    "all": {"bias": True, "softcap": 2.0, "multiplier": 3.0},
}


def tensors(bias: bool = False, dtype: torch.dtype = torch.float32, rows: int = N) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    out = {"hidden": torch.randn(rows, H, generator=g), "weight": torch.randn(V, H, generator=g)}
    if bias:
        out["bias"] = torch.randn(V, generator=g)
    return {k: v.to(dtype).requires_grad_() for k, v in out.items()}


def ids(rows: int = N) -> Tensor:
    drawn = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(2))
    drawn[:2] = torch.tensor([0, V - 1])  # both ends of the vocabulary
    return drawn


def reference(t: dict[str, Tensor], softcap: float | None, multiplier: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy by torch.distributions, in the precision of the tensors."""
    logits = multiplier * (t["hidden"] @ t["weight"].T + t.get("bias", torch.zeros(V, dtype=t["weight"].dtype)))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    categorical = torch.distributions.Categorical(logits=logits)
    return categorical.log_prob(ids(len(t["hidden"]))), categorical.entropy()


def gradients(t: dict[str, Tensor], logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """Of a sum with uneven weights, so that rows cannot be swapped unseen."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    loss = (weights * logprobs).sum()
    if entropy is not None:
        loss = loss + (weights.flip(0) * entropy).sum()
    return dict(zip(t, torch.autograd.grad(loss, list(t.values()))))


def close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, N, 1000])
@pytest.mark.parametrize("name", HEADS)
def test_chunked_equals_torch_distributions_forward_and_backward(name: str, chunk: int, entropy: bool) -> None:
    options: dict[str, Any] = {"softcap": None, "multiplier": 1.0, "bias": False} | HEADS[name]
    t = tensors(options["bias"])
    scores = chunked_logprobs(t["hidden"], head(t, options), ids(), chunk=chunk, entropy=entropy)
    logprobs, spread = reference(t, options["softcap"], options["multiplier"])
    close(scores.logprobs, logprobs)
    assert (scores.entropy is not None) == entropy
    if scores.entropy is not None:
        close(scores.entropy, spread)
    close(gradients(t, scores.logprobs, scores.entropy), gradients(t, logprobs, spread if entropy else None))


def test_a_second_backward_pass_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept probabilities are changed by the first one; and kept or not, forward and backward agree."""
    t = tensors()
    kept = chunked_logprobs(t["hidden"], head(t), ids(), chunk=N)
    weights = torch.linspace(-1, 2, N)
    first = torch.autograd.grad((weights * kept.logprobs).sum(), list(t.values()), retain_graph=True)
    close(torch.autograd.grad((weights * kept.logprobs).sum(), list(t.values())), first)
    monkeypatch.setattr("srppo.logprobs.KEPT_BYTES", N * V * 4 - 1)
    recomputed = chunked_logprobs(t["hidden"], head(t), ids(), chunk=N)
    close(kept.logprobs, recomputed.logprobs)
    close(torch.autograd.grad((weights * recomputed.logprobs).sum(), list(t.values())), first)


def head(t: dict[str, Tensor], options: dict[str, Any] | None = None) -> Head:
    options = options or {}
    return Head(t["weight"], t.get("bias"), options.get("softcap"), options.get("multiplier", 1.0))


@pytest.mark.parametrize("name", HEADS)
def test_gradients_by_finite_differences(name: str) -> None:
    options = HEADS[name]
    t = tensors(bool(options.get("bias")), torch.float64, rows=5)

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        scores = chunked_logprobs(args[0], head(dict(zip(t, args)), options), ids(5), chunk=2, entropy=True)
        assert scores.entropy is not None
        return scores.logprobs, scores.entropy

    assert torch.autograd.gradcheck(run, tuple(t.values()))


def test_plain_path_equals_torch_distributions_and_trl() -> None:
    utils = importlib.import_module("trl.trainer.utils")
    t = tensors(bias=True)
    scores = token_logprobs(head(t).logits(t["hidden"]), ids(), entropy=True)
    logprobs, spread = reference(t, None, 1.0)
    close((scores.logprobs, scores.entropy), (logprobs, spread))
    close(gradients(t, scores.logprobs, scores.entropy), gradients(t, logprobs, spread))
    logits = head(t).logits(t["hidden"])
    close((scores.logprobs, scores.entropy), (utils.selective_log_softmax(logits, ids()), utils.entropy_from_logits(logits)))


def test_chunked_equals_trls_chunked_head() -> None:
    """TRL goes over the vocabulary, with softcap after scale; it has no gradient for the entropy."""
    utils = importlib.import_module("trl.trainer.utils")
    t = tensors()
    theirs = utils._ChunkedLogProbFunction.apply(t["hidden"], t["weight"], ids(), 1.0, 7, 1.5, 0.5)
    ours = chunked_logprobs(t["hidden"], Head(t["weight"], softcap=1.5, multiplier=0.5), ids(), chunk=4, entropy=True)
    close((ours.logprobs, ours.entropy), theirs)
    close(gradients(t, ours.logprobs, None), gradients(t, theirs[0], None))


def test_heads_of_hugging_face_models() -> None:
    """softcap is Gemma 2's final_logit_softcapping, multiplier Cohere's logit_scale, bias that of GPT-J's head."""
    transformers = importlib.import_module("transformers")
    sizes = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes["num_key_value_heads"] = 2
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=4, final_logit_softcapping=0.02, **sizes))
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(logit_scale=0.25, **sizes))
    gptj = transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=V, n_embd=H, n_layer=1, n_head=2, rotary_dim=2, n_inner=8))
    torch.nn.init.normal_(gptj.lm_head.bias)
    heads = [
        (gemma, Head(gemma.lm_head.weight, softcap=0.02)),
        (cohere, Head(cohere.lm_head.weight, multiplier=0.25)),
        (gptj, Head(gptj.lm_head.weight, gptj.lm_head.bias)),
    ]
    row = ids(6).unsqueeze(0)
    for model, ours in heads:
        model.eval()
        with torch.no_grad():
            hidden = model.base_model(row).last_hidden_state[0]
            theirs = torch.distributions.Categorical(logits=model(row).logits[0].float())
            scores = chunked_logprobs(hidden, ours, row[0], chunk=4, entropy=True)
        close((scores.logprobs, scores.entropy), (theirs.log_prob(row[0]), theirs.entropy()), 1e-5)


@pytest.mark.parametrize("setting", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", HEADS)
def test_low_precision_products_with_float32_log_softmax(name: str, setting: str) -> None:
    """The model's product is in bfloat16, whatever follows in float32: what a head in bfloat16, then .float(), gives."""
    options = HEADS[name]
    t = tensors(bool(options.get("bias")), torch.bfloat16 if setting == "bfloat16" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
        product = F.linear(t["hidden"], t["weight"], t.get("bias"))
        assert product.dtype == torch.bfloat16
        logits = options.get("multiplier", 1.0) * product.float()
        cap = options.get("softcap")
        categorical = torch.distributions.Categorical(logits=logits if cap is None else cap * torch.tanh(logits / cap))
        scores = chunked_logprobs(t["hidden"], head(t, options), ids(), chunk=5, entropy=True)
    assert scores.entropy is not None
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    close((scores.logprobs, scores.entropy), (categorical.log_prob(ids()), categorical.entropy()))
    ours = gradients(t, scores.logprobs, scores.entropy)
    theirs = gradients(t, categorical.log_prob(ids()), categorical.entropy())
    for key, gradient in ours.items():
        assert gradient.dtype == t[key].dtype
        error = (gradient.float() - theirs[key].float()).norm() / theirs[key].float().norm()
        assert error < 0.01, f"{key}: relative error {error:.4f}"  # bfloat16 keeps 8 bits


def test_plain_path_takes_low_precision_logits_to_float32_first() -> None:
    logits = 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(3)).bfloat16()
    categorical = torch.distributions.Categorical(logits=logits.float())
    scores = token_logprobs(logits, ids(), entropy=True)
    close((scores.logprobs, scores.entropy), (categorical.log_prob(ids()), categorical.entropy()))


def test_many_chunks_lose_no_precision_in_bfloat16() -> None:
    """Against the float32 gradients at the same values, the smallest chunks are no further off than one product over all."""
    t = tensors(dtype=torch.bfloat16)
    exact = {k: v.detach().float().requires_grad_() for k, v in t.items()}
    truth = gradients(exact, reference(exact, None, 1.0)[0], None)

    def error(chunk: int) -> dict[str, float]:
        ours = gradients(t, chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=chunk).logprobs, None)
        return {k: ((ours[k].float() - truth[k]).norm() / truth[k].norm()).item() for k in t}

    whole, parts = error(N), error(1)
    assert all(parts[k] < 1.3 * whole[k] < 0.02 for k in t), (parts, whole)


class Watch(TorchDispatchMode):
    """Records the shape of everything any operation returns, and calls a hook with each."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.shapes.append(tuple(x.shape))
        return out


def watched_backward(t: dict[str, Tensor], run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    with Watch() as watch:
        loss = run()
        loss.backward()
    return watch.shapes


@pytest.mark.parametrize("entropy", [False, True])
def test_never_holds_all_logits(entropy: bool) -> None:
    t, chunk = tensors(), 4

    def chunked() -> Tensor:
        scores = chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=chunk, entropy=entropy)
        return scores.logprobs.sum() if scores.entropy is None else (scores.logprobs + scores.entropy).sum()

    def plain() -> Tensor:
        return token_logprobs(Head(t["weight"]).logits(t["hidden"]), ids()).logprobs.sum()

    largest = max(chunk * V, V * H, N * H)
    assert max(torch.Size(s).numel() for s in watched_backward(t, chunked)) <= largest < N * V
    assert max(torch.Size(s).numel() for s in watched_backward(t, plain)) == N * V  # the watch sees what it should


def test_weight_gradient_has_no_second_buffer() -> None:
    t = tensors()
    shapes = watched_backward(t, lambda: chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=4).logprobs.sum())
    buffers = [s for s in shapes if s == (V, H)]
    # The identity cast of the weight, the gradient, and autograd's detached view of it at the leaf: no sum over chunks.
    assert len(buffers) <= 3, buffers


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_only_what_asks_gets_a_gradient(name: str) -> None:
    t = tensors(bias=True)
    for key, x in t.items():
        x.requires_grad_(key == name)
    everything = tensors(bias=True)
    expected = gradients(everything, reference(everything, None, 1.0)[0], None)
    shapes = watched_backward(t, lambda: (torch.linspace(-1, 2, N) * chunked_logprobs(t["hidden"], head(t), ids(), chunk=4).logprobs).sum())
    for key, x in t.items():
        assert (x.grad is not None) == (key == name)
    close(t[name].grad, expected[name])
    if name != "weight":
        assert (V, H) not in shapes  # a frozen head costs nothing


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_a_loss_on_one_of_the_two_results(used: str) -> None:
    t = tensors()
    scores = chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=4, entropy=True)
    logprobs, spread = reference(t, None, 1.0)
    ours, theirs = (scores.logprobs, logprobs) if used == "logprobs" else (scores.entropy, spread)
    assert ours is not None
    close(gradients(t, ours, None), gradients(t, theirs, None))


def test_no_grad_and_empty() -> None:
    t = tensors()
    with torch.no_grad():
        scores = chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=4, entropy=True)
    assert not scores.logprobs.requires_grad
    close((scores.logprobs, scores.entropy), reference(t, None, 1.0))
    empty = chunked_logprobs(t["hidden"][:0], Head(t["weight"]), ids()[:0], entropy=True)
    assert empty.logprobs.shape == (0,)
    empty.logprobs.sum().backward()
    assert t["weight"].grad is not None
    assert not t["weight"].grad.any()


def test_huge_logits_and_ruled_out_tokens_stay_finite() -> None:
    t = tensors(bias=True)
    with torch.no_grad():
        t["hidden"] *= 1e4
        t["bias"][5:9] = -float("inf")  # tokens the head rules out
    chosen = torch.full((N,), 2)
    plain = token_logprobs(head(t).logits(t["hidden"]), chosen, entropy=True)
    chunked = chunked_logprobs(t["hidden"], head(t), chosen, chunk=4, entropy=True)
    close((chunked.logprobs, chunked.entropy), (plain.logprobs, plain.entropy), 1e-4)
    for scores in (plain, chunked):
        assert scores.entropy is not None
        assert scores.logprobs.isfinite().all()
        assert scores.entropy.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(t, scores.logprobs, scores.entropy).values())


def test_chunk_below_one_is_refused() -> None:
    t = tensors()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chunked_logprobs(t["hidden"], Head(t["weight"]), ids(), chunk=0)
