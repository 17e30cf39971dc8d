"""Live comparison with the public PyTorch libraries, where they are installed; the largest errors end the report."""

import importlib.util

import pytest

MISSING = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
ERRORS: dict[str, float] = {}


def pytest_collection_modifyitems(items):
    if MISSING:
        for item in items:
            if item.path.parent.name == "parity":
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(MISSING)}"))


@pytest.fixture(autouse=True, scope="session")
def threads():
    if not MISSING:
        import torch

        torch.set_num_threads(2)


@pytest.fixture
def seen():
    """seen(name, error): remembers the largest error of that name."""

    def remember(name, error):
        ERRORS[name] = max(ERRORS.get(name, 0.0), float(error))

    return remember


def pytest_terminal_summary(terminalreporter):
    if ERRORS:
        terminalreporter.section("largest errors, as shares of the reference's largest value")
        for name, error in sorted(ERRORS.items()):
            terminalreporter.write_line(f"{error:.1e}  {name}")
