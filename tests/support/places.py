"""Where the tests find the repository, the example, and the files that lie beside them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
FILES = TESTS / "files"
CONFIGS = TESTS / "configs"
BENCH = TESTS / "bench"
TINY = ROOT / "examples" / "tiny-moe"
