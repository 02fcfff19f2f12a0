"""Reads the settings in a model's JSON files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from dsi_actors.errors import ConfigError


class Settings:
    """A JSON object in a file of the model; empty without the file. Raises ConfigError for what cannot be used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        if not file.is_file():
            return
        try:
            values = json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is no JSON ({error}): download the model again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{file} holds no JSON object: download the model again")
        self.values = values

    def within(self, key: str) -> Settings:
        """The settings in the object under `key`; empty if there is none."""
        inner = copy.copy(self)
        found = self.values.get(key)
        inner.values = found if isinstance(found, dict) else {}
        return inner

    def token(self, key: str) -> str:
        """The text of a token; empty if the file names none."""
        token = self.values.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and not isinstance(token, str):
            raise self.wrong(key, "a token's text")
        return token or ""

    def token_ids(self, key: str) -> list[int]:
        """One token id, or several, or none."""
        ids = self.values.get(key)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token) is int and 0 <= token < 1 << 32 for token in ids):
            raise self.wrong(key, "a token id, or a list of token ids")
        return ids

    def wrong(self, key: str, meant: str) -> ConfigError:
        return ConfigError(f"{self.file}: {key} must be {meant}, not {json.dumps(self.values[key])[:60]}")


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text (byte {error.start}): download the model again") from None
