from __future__ import annotations

import pytest

from tests.reference import FOLDER, PAGES, is_stale


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_the_code_says(name: str) -> None:
    assert not is_stale(name), f"{FOLDER.name}/{name} is stale: make reference writes it"
