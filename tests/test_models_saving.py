"""What is written loads with plain transformers and PEFT, gives the same logits, and is complete or absent."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from srppo.errors import RunFolderError
from srppo.models.roles import Roles
from srppo.models.saving import atomic_folder, valid_generation_config
from tiny_models import ARCHITECTURES, EOS, IM_END, PAD, save_tiny, tiny_roles

IDS = torch.arange(7, 37).reshape(2, 15)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {a: save_tiny(root / a, a) for a in [*ARCHITECTURES, "llama_tied", "cohere"]}


def moved(place: str, kind: str, **settings: Any) -> Roles:
    """Roles whose policy is away from base."""
    roles = tiny_roles(place, kind, **settings)  # type: ignore[arg-type]
    roles.create("policy", "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in roles.parameters("policy").values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return roles


def logits(roles: Roles, role: str) -> torch.Tensor:
    with roles.use(role) as model:
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied", "cohere"])
def test_a_saved_model_is_the_trained_one(places: dict[str, str], tmp_path: Path, architecture: str) -> None:
    roles = moved(places[architecture], "full")
    expected = logits(roles, "policy")
    roles.save("policy", tmp_path / "out")
    assert torch.equal(logits(roles, "policy"), expected)  # saving changes nothing
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, expected)
    assert not torch.equal(expected, logits(roles, "base"))
    ours, theirs = (json.loads((Path(p) / "config.json").read_text()) for p in (tmp_path / "out", places[architecture]))
    assert ours == theirs  # dropout rates and all
    roles.load("again", tmp_path / "out")
    assert torch.equal(logits(roles, "again"), expected) and roles.fingerprint("again") == roles.fingerprint("policy")
    assert len(roles.parameters("again")) == len(roles.parameters("policy"))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied", "cohere"])
def test_a_saved_adapter_is_the_trained_one(places: dict[str, str], tmp_path: Path, architecture: str) -> None:
    roles = moved(places[architecture], "lora")
    expected = logits(roles, "policy")
    roles.save("policy", tmp_path / "out")
    assert torch.equal(logits(roles, "policy"), expected)
    assert not torch.equal(expected, logits(roles, "base"))
    base = AutoModelForCausalLM.from_pretrained(places[architecture])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "out")(IDS).logits, expected)
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, expected)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == places[architecture] and written["inference_mode"] is True
    assert written["target_modules"] == sorted(written["target_modules"])  # the same whatever the process
    roles.load("again", tmp_path / "out")
    assert torch.equal(logits(roles, "again"), expected) and roles.fingerprint("again") == roles.fingerprint("policy")
    assert len(roles.parameters("again")) == len(roles.parameters("policy")) and not any(p.grad for p in roles.parameters("again").values())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_in_the_folder(places: dict[str, str], tmp_path: Path, kind: str) -> None:
    roles = moved(places["llama"], kind)
    roles.save("policy", tmp_path / "out", card="# My model\n\nTrained well.")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    weights = {"adapter_model.safetensors", "adapter_config.json"} if kind == "lora" else {"model.safetensors", "config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == weights | tokenizer | {"generation_config.json", "README.md"}
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == roles.tokenizer.get_vocab() and again.chat_template == roles.tokenizer.chat_template
    stop = GenerationConfig.from_pretrained(tmp_path / "out")
    assert stop.eos_token_id == [EOS, IM_END] and stop.pad_token_id == PAD  # so that plain generate stops where rollouts did
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: ") and "# My model\n\nTrained well." in card and "## Loading" in card
    assert (places["llama"] in card) == (kind == "lora")  # an adapter's card names its base
    for block in card.split("```python\n")[1:]:
        code = block.split("```")[0].replace("path/of/this/folder", str(tmp_path / "out"))
        found: dict[str, Any] = {}
        exec(code, found)  # the lines of the card, as a reader would paste them
        with torch.no_grad():
            assert torch.equal(found["model"](IDS).logits, logits(roles, "policy"))


def test_a_card_with_its_own_front_matter_keeps_it(places: dict[str, str], tmp_path: Path) -> None:
    moved(places["llama"], "full").save("policy", tmp_path / "out", card="---\nlicense: mit\n---\n# X")
    assert (tmp_path / "out/README.md").read_text().startswith("---\nlicense: mit\n---\n# X\n\n## Loading")


def test_bfloat16_models_stay_bfloat16(places: dict[str, str], tmp_path: Path) -> None:
    roles = moved(places["llama"], "full", dtype="bfloat16")
    roles.save("policy", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert again.dtype == torch.bfloat16 and torch.equal(again(IDS).logits, logits(roles, "policy"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_critic_can_be_rebuilt_from_its_folder(places: dict[str, str], tmp_path: Path, kind: str) -> None:
    places = places | {"qwen3": save_tiny(tmp_path / "qwen3", "qwen3", attention_dropout=0.1)}
    roles = moved(places["qwen3"], kind)
    roles.create_critic("policy")
    with torch.no_grad():
        for p in roles.critic_parameters().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    roles.save_critic(tmp_path / "critic")
    head = load_file(tmp_path / "critic/value_head.safetensors")
    if kind == "full":
        assert json.loads((tmp_path / "critic/config.json").read_text())["attention_dropout"] == 0.1
        trunk = AutoModel.from_pretrained(tmp_path / "critic")
    else:
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places["qwen3"]), tmp_path / "critic")
        trunk = whole.get_base_model().get_decoder()
    from srppo.records import TokenBatch

    target = torch.ones_like(IDS, dtype=torch.bool)
    target[:, 0] = False
    with torch.no_grad():
        states = trunk(IDS).last_hidden_state[:, :-1].flatten(0, 1)
    expected = states @ head["weight"][0] + head["bias"][0]
    torch.testing.assert_close(roles.values(TokenBatch(IDS, torch.ones_like(IDS), target)), expected, atol=1e-6, rtol=1e-5)


# --- complete or absent


def test_an_existing_folder_is_replaced_whole(places: dict[str, str], tmp_path: Path) -> None:
    roles = moved(places["llama"], "full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stale.txt").write_text("old")
    roles.save("policy", tmp_path / "out")
    assert not (tmp_path / "out/stale.txt").exists() and (tmp_path / "out/config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")])
def test_a_failed_save_leaves_the_old_folder(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failure: Exception
) -> None:
    roles = moved(places["llama"], kind)
    roles.save("policy", tmp_path / "deep/out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "deep/out").iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(type(roles.tokenizer), "save_pretrained", fail)  # after the weights were written
    with pytest.raises(RunFolderError, match=r"out: cannot be written .*No space left.*another output"):
        roles.save("policy", tmp_path / "deep/out")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "deep/out").iterdir()} == before


def test_other_errors_and_interrupts_pass_through_and_clean_up(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), ValueError("a bug")):
        with pytest.raises(type(error)), atomic_folder(tmp_path / "x") as work:
            (work / "half").write_text("written")
            raise error
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot be written"), atomic_folder(tmp_path / "file/x"):
        pass


def test_generation_configs_that_transformers_refuses_to_save(tmp_path: Path) -> None:
    """As Llama 2 was published: sampling flags with greedy decoding."""
    config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=3)
    with pytest.raises(ValueError, match="invalid"):
        config.save_pretrained(tmp_path)
    valid_generation_config(config).save_pretrained(tmp_path)
    assert config.temperature == 0.6  # ours is a copy
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=3)
    assert valid_generation_config(sampling).temperature == 0.6
    place = save_tiny(tmp_path / "m")
    settings = json.loads((Path(place) / "generation_config.json").read_text()) | {"temperature": 0.6, "do_sample": False}
    (Path(place) / "generation_config.json").write_text(json.dumps(settings))
    for kind in ("full", "lora"):
        moved(place, kind).save("policy", tmp_path / kind)
        assert GenerationConfig.from_pretrained(tmp_path / kind).temperature is None
