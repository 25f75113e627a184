"""The committed table says what the tests cover."""

import re

from avar_lightning.families import FAMILIES as TABLE
from tests.families.matrix import CAPABILITIES, DOCUMENT, NOTES
from tests.families.small import FAMILIES, SIZE


def test_the_table_has_a_row_a_family_and_a_column_a_capability():
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert NOTES in DOCUMENT.read_text()
    assert rows[0] == ["family", *CAPABILITIES]
    assert [row[0] for row in rows[2:]] == list(FAMILIES)
    assert all(re.match(r"yes\b", cell) for row in rows[2:] for cell in row[1:])


def test_every_family_of_the_adapter_table_is_tried():
    text = SIZE | {"vocab_size": 300, "pad_token_id": 0}
    tried = {family.config(text, lambda token: 299).model_type for family in FAMILIES.values()}
    assert tried == TABLE.keys()
