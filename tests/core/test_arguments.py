"""Errors about arguments of the wrong type name the argument."""

from __future__ import annotations

import pytest

from mukv.core.arguments import require_text, strings
from mukv.core.errors import BadInput


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("a\ud800", "prompts"),
        (["a", "\udfff"], r"prompts\[1\]"),
        ([{"content": [{"text": "\udc80"}]}], r"prompts\[0\].content\[0\].text"),
        ({"\ud800": 1}, "prompts"),
    ],
)
def test_lone_surrogates_are_reported_where_they_are(given, where):
    with pytest.raises(BadInput, match=rf"^{where}: got .*; text without lone surrogates$") as told:
        require_text("prompts", given)
    str(told.value).encode()
    if not isinstance(given, dict) and not isinstance(given[0], dict):
        with pytest.raises(BadInput, match=f"^{where}: "):
            strings("prompts", given)
