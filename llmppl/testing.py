"""Test doubles: a language model small enough to enumerate.

Programs written for a real model can be tried on it, and their exact posterior computed.
"""

from __future__ import annotations

import string

import torch

from llmppl.language_model import LM
from llmppl.text.declared import declared


@declared
def tiny_lm(vocabulary: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> LM:
    """A Llama with random weights over a vocabulary of single characters: ``.``, ``a``, ``b``, ...

    :param vocabulary: number of tokens, 2 to 27; token 0 is the full stop, a natural
        ``stop="."``, and the end token of grammars.
    :param seed: of the weights; torch's global random state is left alone.
    :param dtype: ``torch.float64`` for comparisons to many digits.

    Example::

        lm = tiny_lm()
        lm("ab", max_tokens=3, stop=".").enumerate_support().shape   # (156, 3)
    """
    if not 2 <= vocabulary <= 27:
        raise ValueError(f"vocabulary must lie between 2 and 27, got {vocabulary}.")
    # Wide enough that the laws of different contexts differ by whole nats.
    return character_model(("." + string.ascii_lowercase)[:vocabulary], ".", seed, dtype, spread=0.35, length=64)


def character_model(characters: str, end: str | None, seed: int, dtype: torch.dtype, spread: float, length: int) -> LM:
    """A Llama with random weights whose tokens are single characters, digits, spaces and newlines among them.

    :param characters: the tokens in their order; repetitions do not count.
    :param end: the end token, which grammars need.
    :param spread: standard deviation of the weights.
    :param length: most tokens that it reads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = {" ": "Ġ", "\n": "Ċ"}  # as byte-level vocabularies write them
    alphabet = {names.get(c, c): n for n, c in enumerate(dict.fromkeys(characters))}
    backend = Tokenizer(models.BPE(alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    return LM(model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end))
