"""The embedded world's tokenizer: one token a character, <pad> and <eos>, no BOS, no chat template."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " \n:=.,!"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are 0 <pad>, 1 <eos>, then CHARACTERS in order.

    A character outside CHARACTERS is dropped: the world's texts have none, and an unknown token would never be trained.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # no merges: one token a character
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, model_max_length=256, clean_up_tokenization_spaces=False
    )
