"""The compiled core: the streaming sampler and the CPU rows of the loss."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# path, samples, raw bytes, column names, column bytes (-1: variable), token column, plain values (no stored shape),
# type code of MDS (0: stored with each sample), length where the encoding has it
_Shard = tuple[str, int, int, Sequence[str], Sequence[int], int, bool, int, int | None]
_Mix = tuple[int, int, Sequence[int]]  # id, first step, shares summing to 2^32

class TokenStream:
    """The documents of one domain as one circular stream of tokens, each followed by `eos` if that is given."""

    def __init__(
        self, shards: Sequence[_Shard], eos: int | None, counts: Sequence[int] | None = None
    ) -> None:
        """Maps and counts every shard; with `counts`, the tokens stored in each, none is mapped before `attach`."""

    def attach(self, shard: int, file: str) -> None: ...
    def detach(self, shard: int) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each document, in index order, its end-of-text token included."""

    @property
    def shard_positions(self) -> NDArray[np.uint64]:
        """Where each shard that holds tokens begins in the stream."""

    @property
    def shard_documents(self) -> NDArray[np.uint64]:
        """The first document of each shard that holds tokens."""

    def read(self, position: int, count: int) -> NDArray[np.int32]: ...

class Packing:
    """Bins of pieces of documents: bin b holds `pieces[starts[b] : starts[b + 1]]`, (document, first token, tokens).

    The bins of a group of shards stand together; `groups` are the first bins of each, none where bins reach over all.
    """

    def __init__(
        self,
        starts: NDArray[np.uint64],
        pieces: NDArray[np.uint32],
        *,
        width: int,
        path: str,
        groups: Sequence[int] = (),
    ) -> None: ...
    @property
    def bins(self) -> int: ...
    @property
    def groups(self) -> NDArray[np.uint64]: ...

class Sampler:
    """Steps in order, assembled ahead by threads; `velopath.stream.Sampler` is its public face."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        packings: Sequence[Packing | None],
        *,
        keys: Sequence[int],
        shares: Sequence[int],
        seed: int,
        rank: int,
        world: int,
        rows: int,
        row_tokens: int,
        exhaustion: str,
        start_step: int,
        threads: int,
        prefetch: int,
        stall_seconds: float,
        window: int,
        boundaries: bool,
        padding: int,
        staged: bool,
        allocate: Callable[[tuple[int, int]], NDArray[np.int32]],
    ) -> None: ...
    def next(
        self,
    ) -> (
        tuple[
            NDArray[np.int32],
            NDArray[np.int32],
            int,
            int,
            NDArray[np.int64],
            NDArray[np.int32] | None,
            NDArray[np.int32] | None,
            NDArray[np.int32] | None,
            NDArray[np.int32] | None,
        ]
        | None
    ):
        """The fields of a `velopath.stream.TokenBatch`; None where the stream ends."""

    def close(self) -> None: ...
    @property
    def step(self) -> int: ...
    def begin_push(self, at_step: int | None) -> tuple[int, int]:
        """Step and id of the push; no step is handed out until `commit_push` or `abort_push`."""

    def commit_push(self, shares: Sequence[int]) -> None: ...
    def abort_push(self) -> None: ...
    def cursor_at(self, step: int) -> tuple[list[int], list[int]]:
        """Rows drawn, and asked - given rows times 2^32, of every domain before `step`."""

    def mixes_at(self, step: int) -> list[_Mix]: ...
    def oldest_mix(self) -> int: ...
    def count(self, steps: int) -> NDArray[np.int64]: ...
    def ids(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Domains and row ids of all ranks at `step`, as `cursor_at` knows it."""

    def exposure(self) -> list[tuple[int, int, int, int]]:
        """Rows drawn, tokens, rows of an epoch and unique tokens of every domain before the next step."""

    def scout(
        self, step: int | None, drawn: Sequence[int], error: Sequence[int], steps: int
    ) -> tuple[int, int, list[list[tuple[int, int]]], int, list[int], list[int]]:
        """Id of the plan; first step; (domain, shard) that each step from there on needs of attachable streams; the
        cursor behind them. From the next step where `step` is None, else from that cursor."""

    def release(self, until: int, plan: int) -> bool:
        """Of a staged sampler: let the steps before `until` be planned; False where the plan is another by now."""

    def fail(
        self, problem: str, path: str = "", *, plan: int | None, sample: int = -1, field: str = ""
    ) -> None:
        """What `next` raises while the next step is not released: a `DataError`, without a path a `VelopathError`."""

    @property
    def waits(self) -> bool:
        """Whether the next step is not released."""

    @property
    def released(self) -> int:
        """The first step that is not released."""

    def load(self, step: int, drawn: Sequence[int], error: Sequence[int], mixes: Sequence[_Mix]) -> None: ...

def plan_rows(
    keys: Sequence[int],
    tokens: Sequence[int],
    shares: Sequence[int],
    *,
    seed: int,
    global_rows: int,
    row_tokens: int,
    exhaustion: str,
    step: int,
    drawn: Sequence[int],
    error: Sequence[int],
    steps: int,
    bins: Sequence[int],
    window: int,
    shards: Sequence[Sequence[int]],
) -> tuple[NDArray[np.int32], NDArray[np.int64], list[int], list[int]]:
    """Domains and row ids, (steps, global_rows) each, of `steps` steps from `step` on; then the cursor behind them.

    The plan of `Sampler` without its data: `drawn` and `error` as `Sampler.cursor_at(step)` gives them. Fewer steps
    where the stream ends. `bins` are the rows of an epoch where they are not floor(tokens / row_tokens), else empty;
    `shards` where each shard begins, or each group of shards in the bins, if `window`, which counts them, is not 0.
    """

def windowed_order(
    tokens: int,
    row_tokens: int,
    offset: int,
    shards: Sequence[int],
    window: int,
    key: int,
    items: Sequence[int],
) -> NDArray[np.int64]:
    """The rows that come as the `items`-th of an epoch in windows of `window` shards, which begin at `shards`."""

def permute(items: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Images of `items` under the bijection on [0, n) that `key` selects."""

def give_rows(shares: Sequence[int], error: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
    """Domains of the next `rows` rows by chairman assignment, and the errors after them."""

def cross_entropy_rows(
    logits: NDArray[np.float32] | NDArray[np.uint16],
    targets: NDArray[np.int64],
    nats: NDArray[np.float32],
    *,
    scale: float,
    ignore_index: int,
    gradient: bool,
    threads: int,
    instruction_set: str = "",
    scales: NDArray[np.float32] | None = None,
    lse: NDArray[np.float32] | None = None,
    losses: NDArray[np.float32] | None = None,
    correct: NDArray[np.float32] | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write each row's loss in nats and, with `gradient`, scale * (softmax - one hot) over the logits.

    `logits` is (N, V) with contiguous columns, uint16 standing for the bits of bf16; a row whose target is
    `ignore_index` has loss and gradient 0. `instruction_set` is one of `instruction_sets()`, "" the best.
    `scales` (N,) takes the place of scale; with it `lse` and `losses` (scaled, with the options of
    `velopath.loss.options`) are written, and `correct`, where given: 1 where the target is the first largest.
    Raises ValueError where an argument does not fit. Runs without the GIL.
    """

def shard_statistics(
    logits: NDArray[np.float32] | NDArray[np.uint16],
    targets: NDArray[np.int64],
    out: NDArray[np.float64],
    *,
    logit_scale: float,
    softcap: float,
    threads: int,
    instruction_set: str = "",
) -> None:
    """Write the (7, N) statistics of a shard's columns; `velopath.loss.backends.statistics` says of what."""

def shard_gradient(
    logits: NDArray[np.float32] | NDArray[np.uint16],
    targets: NDArray[np.int64],
    factors: NDArray[np.float64],
    *,
    logit_scale: float,
    softcap: float,
    threads: int,
    instruction_set: str = "",
) -> None:
    """Write a shard's gradient over its logits; `velopath.loss.backends.write_gradient` has the formula."""

def instruction_sets() -> str:
    """Instruction sets that this build has and this machine runs, best first, separated by spaces."""
