"""Where chat templates are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgevlm.errors import IntegrityError, PromptError
from edgevlm.prompt import ChatTemplate


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "processor_config.json").write_text('{"chat_template": "P"}')
    assert ChatTemplate.from_folder(tmp_path).render(()) == "P"  # type: ignore[union-attr]
    named = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T{{ bos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path, {"bos_token": "<s>"}).render(()) == "T<s>"  # type: ignore[union-attr]
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert ChatTemplate.from_folder(tmp_path).render(()) == "J"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("X")
    assert ChatTemplate.from_folder(tmp_path).render(()) == "X"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"chat_template\.json"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(PromptError, match="tool_use"):
        ChatTemplate.from_folder(tmp_path)
