"""The folders of this checkout, for the suites."""

import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent
sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent / "tests")]
