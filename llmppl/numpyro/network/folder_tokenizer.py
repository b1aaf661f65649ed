"""The tokenizer of a Hugging Face folder, without transformers (which would bring torch in)."""

from __future__ import annotations

import datetime
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
        self.unk_token_id = self._id("unk_token")
        file = folder / "chat_template.jinja"
        self.chat_template: str | None = file.read_text() if file.is_file() else self._config.get("chat_template")

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, in the environment that ``transformers`` gives to templates.

        :raises ModuleNotFoundError: no jinja2.
        """
        assert self.chat_template is not None
        assert not tokenize
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError:
            raise ModuleNotFoundError("chat templates need jinja2: pip install jinja2.") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = datetime.datetime.now().strftime
        names = {n: self._name(n) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return environment.from_string(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **{n: v for n, v in names.items() if v}
        )

    def _name(self, name: str) -> str | None:
        token: Any = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _id(self, name: str) -> int | None:
        token = self._name(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
