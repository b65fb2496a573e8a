"""From a question to tokens and back, with what a checkpoint directory says about it: tokenizer, template, end tokens.

Only the light packages that ``transformers`` itself stands on are used: importing all of it takes seconds.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightwire.errors import ConfigError
from weightwire.types import Json

TOKENIZER = "tokenizer.json"
_REMEDY = "use the tokenizer files that belong to the model"


class Chat:
    """The chat side of one model.

    Args:
        directory: with ``tokenizer.json``; a chat template and end tokens are used where the directory has them.

    Raises:
        ConfigError: there is no tokenizer, it cannot be read, or a package is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tokenizer = _tokenizer(directory / TOKENIZER)
        self._config = _object(directory / "tokenizer_config.json")
        self._template = _template(directory, self._config)
        self.ends = self._end_tokens()
        """Tokens that end an answer; may be empty."""

    def encode(self, question: str) -> list[int]:
        """The tokens that ask ``question``, up to where the answer begins."""
        if not self._template:
            return list(self._tokenizer.encode(question).ids)
        text = self._render(question)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, up to its end token, without special tokens."""
        stop = next((at for at, token in enumerate(tokens) if token in self.ends), len(tokens))
        return str(self._tokenizer.decode(list(tokens[:stop]), skip_special_tokens=True)).strip()

    def _render(self, question: str) -> str:
        # A template comes with a download: it is run in a sandbox, as transformers does.
        sandbox = importlib.import_module("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        specials = {name: _text(self._config.get(name)) for name in ("bos_token", "eos_token")}
        messages = [{"role": "user", "content": question}]
        try:
            template = environment.from_string(self._template)
            return str(template.render(messages=messages, add_generation_prompt=True, **specials))
        except importlib.import_module("jinja2").TemplateError as error:
            raise ConfigError(f"the chat template of {self.directory} cannot be used: {error}", _REMEDY) from error

    def _end_tokens(self) -> frozenset[int]:
        found = {self._tokenizer.token_to_id(_text(self._config.get("eos_token")))}
        for name in ("config.json", "generation_config.json"):
            value = _object(self.directory / name).get("eos_token_id")
            found |= set(value) if isinstance(value, list) else {value}
        return frozenset(token for token in found if isinstance(token, int))


def _tokenizer(path: Path) -> Any:
    try:
        package = importlib.import_module("tokenizers")
        importlib.import_module("jinja2")
    except ImportError as error:
        raise ConfigError(f"package {error.name} is not installed", "pip install 'weightwire[models]'") from error
    if not path.exists():
        raise ConfigError(f"{path.parent} has no {TOKENIZER}", "put the model's tokenizer there, or give no prompt")
    try:
        return package.Tokenizer.from_file(str(path))
    except Exception as error:  # its errors have no class of their own
        raise ConfigError(f"{path} cannot be read: {error}", _REMEDY) from error


def _object(path: Path) -> dict[str, Json]:
    """A JSON object; empty where the file does not exist."""
    if not path.exists():
        return {}
    try:
        value: Json = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", _REMEDY) from error
    return value if isinstance(value, dict) else {}


def _template(directory: Path, config: dict[str, Json]) -> str:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    value = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {str(each.get("name")): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""


def _text(token: Json) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
