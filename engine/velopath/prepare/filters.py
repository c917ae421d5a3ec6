"""Filters of `prepare`: which documents are left out for their length or language, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from velopath.errors import ConfigError

REASONS = ("duplicates", "near_duplicates", "empty", "short", "long", "language")
"""Why a document is left out: what domains.json counts under `dropped`."""
WORDS = {
    "duplicates": "exact copies",
    "near_duplicates": "near-duplicates",
    "empty": "empty",
    "short": "too short",
    "long": "too long",
    "language": "of another language",
}
LANGUAGE_CHARACTERS = 2000
"""Characters from the start of a document that its language is told from."""


@dataclass(frozen=True)
class Filters:
    """Which documents stay: their characters (bounds included), and their language where `languages` names some.

    Languages are ISO 639-1 codes, told apart by py3langid. Raises `ConfigError` on bounds that admit nothing,
    an unknown language, and when the package is not installed.
    """

    min_chars: int = 0
    max_chars: int | None = None
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_chars < 0:
            raise ConfigError(f"min_chars is {self.min_chars}; expected 0 or more")
        if self.max_chars is not None and self.max_chars < max(1, self.min_chars):
            raise ConfigError(
                f"max_chars is {self.max_chars}; expected {max(1, self.min_chars)} or more, or nothing"
            )
        if self.languages:
            _, known = _language_teller()
            unknown = [code for code in self.languages if code not in known]
            if unknown:
                raise ConfigError(
                    f"unknown language {unknown[0]!r}; expected some of {', '.join(sorted(known))}"
                )

    @property
    def needs_text(self) -> bool:
        """Whether anything but the emptiness of a document is looked at."""
        return bool(self.min_chars or self.max_chars is not None or self.languages)

    def reason(self, text: str) -> str | None:
        """Why the document is left out, the first of `REASONS` that holds; None where it stays."""
        if not text.strip():
            return "empty"
        if len(text) < self.min_chars:
            return "short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "long"
        if self.languages:
            tell, _ = _language_teller()
            if tell(text[:LANGUAGE_CHARACTERS]) not in self.languages:
                return "language"
        return None


@lru_cache(maxsize=1)
def _language_teller() -> tuple[Callable[[str], str], frozenset[str]]:
    """The function that tells a text's language, and the languages it knows."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "telling languages apart needs py3langid: pip install 'velopath[corpora]'"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    return (lambda text: str(identifier.classify(text)[0])), frozenset(map(str, identifier.labels))
