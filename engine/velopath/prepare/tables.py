"""Tables as input of `prepare`: Parquet files, and the Arrow files of a saved Hugging Face `datasets` folder.

Read with pyarrow, which is imported only where such a file is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from velopath.errors import ConfigError, DataError

_BATCH_ROWS = 64  # rows may be long: this many are in memory as text at a time
_BUFFER_BYTES = 1 << 20


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow to be read: pip install 'velopath[corpora]'") from error
    return pyarrow


def parquet_cuts(path: Path, field: str, piece_bytes: int) -> list[tuple[int, int, int]]:
    """(first row group, end, bytes) of runs of about `piece_bytes` of the text column before compression."""
    with _open_parquet(path) as file:
        column = _text_column(file.schema_arrow, field, path)
        groups = file.metadata.num_row_groups
        flat = (
            [file.metadata.row_group(0).column(c) for c in range(file.metadata.num_columns)] if groups else []
        )
        leaf = next((c for c, info in enumerate(flat) if info.path_in_schema == field), column)
        sizes = [file.metadata.row_group(g).column(leaf).total_uncompressed_size for g in range(groups)]
    return _runs(sizes, piece_bytes)


def arrow_cuts(path: Path, field: str, piece_bytes: int) -> list[tuple[int, int, int]]:
    """(first batch, end, bytes) of runs of about `piece_bytes`."""
    sizes = []
    for batch in _arrow_batches(path):
        _text_column(batch.schema, field, path)
        sizes.append(int(batch.nbytes))
    return _runs(sizes, piece_bytes)


def _runs(sizes: list[int], piece_bytes: int) -> list[tuple[int, int, int]]:
    runs, first, held = [], 0, 0
    for number, size in enumerate(sizes, 1):
        held += size
        if held >= piece_bytes or number == len(sizes):
            runs.append((first, number, held))
            first, held = number, 0
    return runs


def parquet_texts(path: Path, field: str, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield (row number in the file, text) of row groups `first` to `last` (left out), one group in memory at a time.

    Raises `DataError` naming the row where a text is missing, and on a damaged file.
    """
    arrow = _arrow(path)
    with _open_parquet(path) as file:
        row = sum(file.metadata.row_group(g).num_rows for g in range(first))
        try:
            for group in range(first, last):  # one after the other, or several are held
                for batch in file.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False
                ):
                    yield from _texts(batch.column(0), row, field, path)
                    row += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"not a sound Parquet file: {error}", path=path) from error


def arrow_texts(path: Path, field: str, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield (row number in the file, text) of batches `first` to `last` (left out) of an Arrow stream file."""
    row = 0
    for number, batch in enumerate(_arrow_batches(path)):
        if number >= last:
            return
        if number >= first:
            column = batch.column(_text_column(batch.schema, field, path))
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _texts(column.slice(begin, _BATCH_ROWS), row + begin, field, path)
        row += batch.num_rows


def _open_parquet(path: Path) -> Any:
    arrow = _arrow(path)
    try:
        return arrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"not a sound Parquet file: {error}", path=path) from error


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an Arrow file, in the stream format that `datasets` writes or the file format; mapped, not read."""
    arrow = _arrow(path)
    try:
        with arrow.memory_map(str(path)) as mapped:
            try:
                opened: Any = arrow.ipc.open_stream(mapped)
            except arrow.ArrowInvalid:
                opened = arrow.ipc.open_file(mapped)
                for number in range(opened.num_record_batches):
                    yield opened.get_batch(number)
                return
            yield from opened
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"not a sound Arrow file: {error}", path=path) from error


def _text_column(schema: Any, field: str, path: Path) -> int:
    """Number of the column `field`, which must be of text."""
    number = schema.get_field_index(field)
    if number < 0:
        names = ", ".join(sorted(schema.names)[:12]) or "none"
        raise DataError(f"no such column; the columns are: {names}", path=path, field=field)
    kind = schema.field(number).type
    if str(getattr(kind, "value_type", kind)) not in ("string", "large_string", "string_view"):
        raise DataError(f"the column is of type {kind}; expected text", path=path, field=field)
    return int(number)


def _texts(column: Any, row: int, field: str, path: Path) -> Iterator[tuple[int, str]]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error})", path=path, sample=row, field=field) from error
    for number, value in enumerate(values, row):
        if not isinstance(value, str):
            problem = f"the value is of type {type(value).__name__}; expected text"
            raise DataError(problem, path=path, sample=number, field=field)
        yield number, value
