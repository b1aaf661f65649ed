"""The tokenizer of a Hugging Face folder, without transformers (which would bring torch in)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class FolderTokenizer:
    """What :class:`llmppl.text.tokenization.Codec` asks of a tokenizer: its backend, its length, its special tokens.

    :raises FileNotFoundError: no ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json. Save the tokenizer there in the fast format: "
                "AutoTokenizer.from_pretrained(name).save_pretrained(folder)."
            )
        self.backend_tokenizer = Tokenizer.from_file(str(path))
        # Older folders have the special tokens in a file of their own.
        self._config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")

    def _id(self, name: str) -> int | None:
        token: Any = self._config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
