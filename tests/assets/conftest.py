"""Small SentencePiece models, trained once for a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sentencepiece_models import train


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With InternLM's flags."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With pieces that chats give names to."""
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    path.write_bytes(train(user_defined_symbols=["[U0]", "[U1]", "[U2]", "[U3]", "<eoh>", "<eoa>"]))
    return path
