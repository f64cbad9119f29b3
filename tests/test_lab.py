"""The embedded world: tasks against answers written by hand, files, tokenizer, documents."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from srppo import config
from srppo.errors import SrppoError
from srppo.lab import authors, tasks
from srppo.lab.tokenizer import CHARACTERS, build_tokenizer
from srppo.lab.world import HELDOUT_DEMONSTRATIONS, WITH, WITHOUT, recipe, write_world

BY_HAND = {
    "copy": {"kqbz": "kqbz", "aab": "aab"},
    "upper": {"kqbz": "KQBZ", "aab": "AAB"},
    "flip": {"kqbz": "zbqk", "aab": "baa"},
    "count": {"kqbz": "4", "aab": "3"},
    "twice": {"kqbz": "kkqqbbzz", "aab": "aaaabb"},
    "next": {"kqbz": "lrca", "aab": "bbc"},
    "ends": {"kqbz": "kz", "aab": "ab"},
    "sort": {"kqbz": "bkqz", "aab": "aab", "zeb": "bez"},
    "strip": {"kqbz": "kqbz", "aab": "b", "zeb": "zb"},
    "turn": {"kqbz": "qbzk", "aab": "aba"},
}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", list(BY_HAND))
def test_answers_by_hand(family: str) -> None:
    for word, answer in BY_HAND[family].items():
        assert tasks.answer_text(family, word) == answer


def test_ten_families_four_of_them_demonstrated() -> None:
    assert set(tasks.FAMILIES) == set(BY_HAND)
    assert len(tasks.FAMILIES) == 10
    assert len(set(tasks.DEMONSTRATED)) == 4
    assert set(tasks.DEMONSTRATED) <= set(tasks.FAMILIES)


def test_prompt_text() -> None:
    assert tasks.prompt_text("flip", "kqbz") == "flip kqbz="


def test_tokenizer_is_one_token_a_character_and_reversible() -> None:
    tokenizer = build_tokenizer()
    text = "flip kqbz=we get ZB:1.\nq w!, "
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", CHARACTERS[0]]) == [0, 1, 2]
    assert tokenizer("ab<eos>")["input_ids"][-1] == tokenizer.eos_token_id
    assert len(tokenizer) == 2 + len(CHARACTERS)
    assert tokenizer.chat_template is None


def test_every_author_writes_characters_the_tokenizer_has() -> None:
    rng = random.Random(0)
    for author in authors.AUTHORS:
        for _ in range(100):
            assert set("".join(authors.document(rng, author))) <= set(CHARACTERS)


def test_habits() -> None:
    rng = random.Random(0)
    responses = {a.name: {a.respond(rng, "flip", "kqbz") for _ in range(200)} for a in authors.AUTHORS}
    assert responses["correct"] == {"zbqk"}
    assert responses["neighbouring 1"] == {"4"}  # count
    assert responses["neighbouring 2"] == {"kkqqbbzz"}  # twice
    assert responses["neighbouring 3"] == {"lrca"}  # next
    assert all(r.startswith("zbqk\n") for r in responses["rambling"])
    assert responses["verbose"] == {phrase.format("zbqk") for phrase in authors.PHRASES}


def test_authors_come_with_their_shares() -> None:
    rng, n = random.Random(0), 20_000
    counts = Counter(authors.draw_author(rng).name for _ in range(n))
    assert sum(a.share for a in authors.AUTHORS) == pytest.approx(1)
    for author in authors.AUTHORS:
        deviation = (author.share * (1 - author.share) / n) ** 0.5
        assert abs(counts[author.name] / n - author.share) < 4 * deviation


def test_world_files(tmp_path: Path) -> None:
    paths = write_world(tmp_path / "new" / "world", 3, demonstrations=20, prompts=50, eval_per_family=4)
    rows = {stem: rows_of(path) for stem, path in paths.items()}
    assert {stem: len(r) for stem, r in rows.items()} == {"demonstrations": 20 + HELDOUT_DEMONSTRATIONS, "prompts": 50, "eval": 40}
    prompts = [row["prompt"] for r in rows.values() for row in r]
    assert len(set(prompts)) == len(prompts)  # disjoint, and none twice
    assert {row["family"] for row in rows["demonstrations"]} == set(tasks.DEMONSTRATED)
    assert {row["family"] for row in rows["prompts"]} == set(tasks.FAMILIES)
    assert Counter(row["family"] for row in rows["eval"]) == dict.fromkeys(tasks.FAMILIES, 4)
    for row in rows["demonstrations"]:
        family, word = row["prompt"].removesuffix("=").split(" ")
        assert (row["family"], row["completion"]) == (family, tasks.answer_text(family, word))
        assert row["group"] == WITH
        assert "answer" not in row
    for row in rows["prompts"] + rows["eval"]:
        family, word = row["prompt"].removesuffix("=").split(" ")
        assert (row["family"], row["answer"]) == (family, tasks.answer_text(family, word))
        assert row["group"] == (WITH if family in tasks.DEMONSTRATED else WITHOUT)


def test_world_is_deterministic_by_seed(tmp_path: Path) -> None:
    a, b, c = (write_world(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for stem in a:
        assert a[stem].read_bytes() == b[stem].read_bytes()
        assert a[stem].read_bytes() != c[stem].read_bytes()


def test_more_demonstrations_leave_the_evaluation_rows_alone(tmp_path: Path) -> None:
    few, many = write_world(tmp_path / "few", 1, demonstrations=16), write_world(tmp_path / "many", 1, demonstrations=256)
    assert few["eval"].read_bytes() == many["eval"].read_bytes()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SrppoError, match="cannot be written"):
        write_world(tmp_path / "file" / "world", 0)


@pytest.mark.parametrize("strength", ["light", "heavy"])
def test_recipe_is_a_valid_configuration(strength: str, tmp_path: Path) -> None:
    write_world(tmp_path, 7)
    values = recipe(tmp_path, 7, output=tmp_path / "run", strength=strength)  # type: ignore[arg-type]
    built = config.build(values)
    assert (built.seed, built.output) == (7, str(tmp_path / "run"))
    longest = max(len(row["prompt"]) for row in rows_of(tmp_path / "prompts.jsonl"))
    answers = [row["answer"] for row in rows_of(tmp_path / "eval.jsonl")]
    assert longest <= built.data.max_prompt_tokens
    assert max(map(len, answers)) + 1 <= built.rollout.max_new_tokens
