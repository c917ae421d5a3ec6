"""What `python tests/mutations.py` takes out is there, and so are the tests that are to notice."""

from __future__ import annotations

import re

import pytest

from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m.row} {m.mechanism}" for m in MUTATIONS])
def test_a_mutation_fits_the_code(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    file, _, name = mutation.test.partition("::")
    assert re.search(rf"^def {name.partition('[')[0]}\(" if name else "", (ROOT / file).read_text(), re.M)
    assert f"| {mutation.row} |" in (ROOT / "docs" / "reliability.md").read_text()
