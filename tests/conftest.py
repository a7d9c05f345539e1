"""Options of the test run."""


def pytest_addoption(parser):
    """Add `--update`."""
    parser.addoption("--update", action="store_true", help="write the expected halves of tests/files anew")
