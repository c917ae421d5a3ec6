"""One record of `metrics.jsonl`: which fields its kind must have, and of what form; the table is in `runfolder`.

Whoever reads the file may then index these fields: a record that lacks one is damage and is named, not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class _Form(NamedTuple):
    """What a value must be, in words and as a check."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """A number that JSON knows, or null, which stands for one that was not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


_TEXT = _Form("a text", lambda v: isinstance(v, str))
_TEXT_OR_NULL = _Form("a text or null", lambda v: v is None or isinstance(v, str))
_COUNT = _Form("a whole number from 0 on", _is_count)
_NUMBER = _Form("a number or null", _is_number)
_BY_DOMAIN = _Form(
    "an object of numbers by domain", lambda v: isinstance(v, dict) and all(map(_is_number, v.values()))
)
_BY_DOMAIN_OR_NULL = _Form(
    "an object of numbers by domain, or null", lambda v: v is None or _BY_DOMAIN.fits(v)
)
_COUNTS_BY_DOMAIN = _Form(
    "an object of token counts by domain", lambda v: isinstance(v, dict) and all(map(_is_count, v.values()))
)
_NAMES = _Form("a list of domain names", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v))
_OBJECTS = _Form("a list of objects", lambda v: isinstance(v, list) and all(isinstance(x, dict) for x in v))
_BY_DOMAIN_AND_KIND = _Form(
    "an object of numbers by domain and by what is told of it",
    lambda v: isinstance(v, dict) and all(map(_BY_DOMAIN.fits, v.values())),
)

_ALWAYS = {"kind": _TEXT, "segment": _TEXT, "step": _COUNT}
_REQUIRED: dict[str, dict[str, _Form]] = {
    "step": {"loss": _NUMBER, "tokens": _NUMBER},
    "eval": {"loss": _BY_DOMAIN},
    "version": {"loss": _BY_DOMAIN},
    "control": {"weights": _BY_DOMAIN, "velocity": _BY_DOMAIN_OR_NULL},
    "exposure": {"domains": _BY_DOMAIN_AND_KIND},
    "alarm": {"alarms": _OBJECTS},
    "sampler": {"tokens_per_second": _NUMBER},
}
_WHERE_THERE: dict[str, dict[str, _Form]] = {
    "step": dict.fromkeys(
        ("rate", "tokens_per_second", "grad_norm", "data_wait_share", "seconds", "mfu"), _NUMBER
    )
    | {"phase_seconds": _BY_DOMAIN, "stream": _TEXT_OR_NULL},
    "eval": {"tokens": _COUNTS_BY_DOMAIN, "stderr": _BY_DOMAIN},
    "version": {"tokens": _COUNTS_BY_DOMAIN, "stderr": _BY_DOMAIN},
    "control": dict.fromkeys(
        ("initial", "target", "losses", "stderr", "proposed", "fitted"), _BY_DOMAIN_OR_NULL
    )
    | {"filtered": _BY_DOMAIN_AND_KIND, "flagged": _NAMES, "clipped": _NAMES, "reason": _TEXT},
}


def misfit(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field that does not fit and what was expected of it; None where all fit.

    Kinds that are not known have only `kind`, `segment`, `step` and `slice` to fit.
    """
    kind = record.get("kind")
    required = _ALWAYS | _REQUIRED.get(kind if isinstance(kind, str) else "", {})
    for field, form in required.items():
        if field not in record or not form.fits(record[field]):
            return field, _expected(record, field, form)
    for field, form in (_WHERE_THERE.get(str(kind), {}) | {"slice": _TEXT_OR_NULL}).items():
        if field in record and not form.fits(record[field]):
            return field, _expected(record, field, form)
    return None


def _expected(record: Mapping[str, Any], field: str, form: _Form) -> str:
    found = f"{str(record[field])[:40]!r}" if field in record else "nothing"
    return f"expected {form.words}, got {found}"
