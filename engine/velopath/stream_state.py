"""The sampler's state as a JSON-able dict: written, and checked against the sampler that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from velopath.domains import DomainTable, MixtureWeights, check_weights
from velopath.errors import ConfigError
from velopath.stream_options import RowChoice
from velopath.stream_order import Order

_FORMAT = "velopath.sampler"
_VERSION = 1
_MAX_ERROR = 1 << 40  # rows asked - given times 2^32; pushes keep it within a few rows


@dataclass(frozen=True)
class Identity:
    """Everything but the cursor and the weights that decides what a step reads."""

    seed: int
    start_step: int
    rows: int
    world: int
    row_tokens: int
    eos: int | None
    exhaustion: str
    domain_key_salt: str
    table: DomainTable
    documents: tuple[int, ...]
    fingerprints: tuple[str, ...]
    choice: RowChoice
    bins: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()
    quarantined: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def global_rows(self) -> int:
        """Rows of a step on all ranks together."""
        return self.rows * self.world

    @property
    def order(self) -> Order:
        """The order of rows."""
        return Order(
            tokens=dict(zip(self.table.names, self.table.tokens, strict=True)),
            seed=self.seed,
            global_rows=self.global_rows,
            row_tokens=self.row_tokens,
            exhaustion=self.exhaustion,
            salt=self.domain_key_salt,
            start_step=self.start_step,
            bins=dict(zip(self.table.names, self.bins, strict=True)) if self.bins else None,
            window=self.choice.window_parts,
            shards=dict(zip(self.table.names, self.parts, strict=True)) if self.parts else None,
        )


def write_state(
    identity: Identity, step: int, drawn: Sequence[int], error: Sequence[int], mixes: Sequence[MixtureWeights]
) -> dict[str, Any]:
    """The state before `step`; `mixes` are the weights in force there and then the pending ones."""
    left_out = {name: list(shards) for name, shards in identity.quarantined.items()}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "seed": identity.seed,
        "start_step": identity.start_step,
        "rows": identity.rows,
        "world": identity.world,
        "row_tokens": identity.row_tokens,
        "eos": identity.eos,
        "exhaustion": identity.exhaustion,
        "domain_key_salt": identity.domain_key_salt,
        **identity.choice._asdict(),
        **({"quarantined": left_out} if left_out else {}),
        "domains": {
            name: {
                "tokens": identity.table.tokens[k],
                "documents": identity.documents[k],
                "fingerprint": identity.fingerprints[k],
                "drawn": drawn[k],
                "error": error[k],
            }
            for k, name in enumerate(identity.table.names)
        },
        "weights": [{"id": m.id, "from_step": m.from_step, "shares": dict(m)} for m in mixes],
    }


def read_state(
    identity: Identity, state: Mapping[str, Any]
) -> tuple[int, list[int], list[int], list[MixtureWeights]]:
    """Step, rows drawn, errors and weights of `state`.

    Raises `ConfigError` naming both values where the state is of another stream than `identity`, and naming the
    field where it is damaged.
    """
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT or state.get("version") != _VERSION:
        raise ConfigError(f"not a sampler state of version {_VERSION}")
    try:
        _compare(identity, state)
        return _values(identity, state)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"the sampler state is damaged: {error!r}") from error


def _compare(identity: Identity, state: Mapping[str, Any]) -> None:
    shape = state["rows"] * state["world"]
    if shape != identity.global_rows:
        raise ConfigError(
            f"the state has {state['rows']} rows x {state['world']} ranks = {shape} rows a step, this sampler "
            f"{identity.rows} x {identity.world} = {identity.global_rows}; choose rows so that the products agree"
        )
    names = list(identity.table.names)
    if sorted(state["domains"]) != names:
        raise ConfigError(f"the state has the domains {sorted(state['domains'])}, this sampler {names}")
    for key in ("seed", "start_step", "row_tokens", "eos", "exhaustion", "domain_key_salt"):
        ours = getattr(identity, key)
        if state[key] != ours:
            raise ConfigError(f"{key} of the state is {state[key]!r}, of this sampler {ours!r}")
    for key, before in RowChoice("concat", 0, 0)._asdict().items():  # what a state from before these had
        ours, theirs = getattr(identity.choice, key), state.get(key, before)
        if theirs != ours:
            raise ConfigError(f"{key} of the state is {theirs!r}, of this sampler {ours!r}")
    left_out = state.get("quarantined", {})
    for name in sorted({*left_out, *identity.quarantined}):
        theirs, here = (list(parts.get(name, ())) for parts in (left_out, identity.quarantined))
        if theirs != here:
            raise ConfigError(
                f"the state was made without the shards {theirs} of domain {name!r}, this sampler leaves out {here}; "
                "other shards are other rows: put the files back as they were (the log of the run names them), or "
                "begin a new run"
            )
    for k, name in enumerate(names):
        theirs = state["domains"][name]
        for key, mine in (
            ("tokens", identity.table.tokens[k]),
            ("documents", identity.documents[k]),
            ("fingerprint", identity.fingerprints[k]),
        ):
            if theirs[key] != mine:
                raise ConfigError(
                    f"the data of domain {name!r} differ: {key} of the state is {theirs[key]!r}, here {mine!r}"
                )


def _values(
    identity: Identity, state: Mapping[str, Any]
) -> tuple[int, list[int], list[int], list[MixtureWeights]]:
    names = identity.table.names
    step = _whole("step", state["step"], identity.start_step)
    drawn = [_whole(f"drawn of {n!r}", state["domains"][n]["drawn"], 0) for n in names]
    error = [_whole(f"error of {n!r}", state["domains"][n]["error"], -_MAX_ERROR, _MAX_ERROR) for n in names]
    if sum(error) != 0:
        raise ConfigError(f"the errors of the state sum to {sum(error)}; expected 0")
    if sum(drawn) != (step - identity.start_step) * identity.global_rows:
        raise ConfigError(
            f"the state counts {sum(drawn)} rows; expected {step - identity.start_step} steps x {identity.global_rows}"
        )
    mixes = []
    for given in state["weights"]:
        check_weights(given["shares"], names)
        shares = tuple(float(given["shares"][n]) for n in names)
        mixes.append(
            MixtureWeights(
                names, shares, _whole("id", given["id"], 0), _whole("from_step", given["from_step"], 0)
            )
        )
    if not mixes or mixes[0].from_step > step:
        raise ConfigError(f"the state has no weights for its step {step}")
    for before, after in zip(mixes[:-1], mixes[1:], strict=True):
        if after.id <= before.id or after.from_step <= max(before.from_step, step):
            raise ConfigError(f"the pending weights {after.id} of the state do not follow {before.id}")
    return step, drawn, error, mixes


def _whole(name: str, value: object, least: int, most: int = (1 << 63) - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} of the state is {value!r}; expected a whole number from {least} to {most}")
    return value
