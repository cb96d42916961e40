"""An option of the browser's tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/serving --screenshots FOLDER`` keeps what the browser showed."""
    parser.addoption("--screenshots", help="folder for pictures of the web page")
