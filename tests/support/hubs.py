"""The hub's client as in a process that has just begun, with an empty cache and no way out but what a test opens."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from rlfusion.common import hub, notices


def begin_anew(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """What was tried and said before is forgotten, and files are kept in ``cache``."""
    monkeypatch.setattr(hub, "_tried", {})
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
