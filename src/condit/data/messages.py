"""Errors that beginners meet, in English or Chinese: by CONDIT_LANG, else by the language of the system."""

import locale
import os
import tomllib
from pathlib import Path

_VARIABLES = ("CONDIT_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


def text(key: str, **values: object) -> str:
    """The message of this name in messages.toml with its values."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return rows[key]["zh" if is_chinese() else "en"].format(**values)


def is_chinese() -> bool:
    language = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), locale.getlocale()[0] or "")
    return language.lower().startswith(("zh", "chinese"))
