"""OpenCV, hidden from a test."""

import sys

import pytest

from unclip_jax.data.resampling import opencv


@pytest.fixture
def without_opencv(monkeypatch):
    """without_opencv() → until the test ends, OpenCV is not installed."""

    def hide():
        monkeypatch.setitem(sys.modules, "cv2", None)
        opencv.cache_clear()

    pytest.importorskip("cv2")
    yield hide
    monkeypatch.undo()
    opencv.cache_clear()
