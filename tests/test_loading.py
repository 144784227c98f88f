"""Nothing is collected while libraries load, and what they made is not looked at again."""

import gc
import io
import subprocess
import sys
from contextlib import redirect_stdout

from pipeline.loading import loading
from tests.conftest import ROOT

CYCLE = """
class Cycle:
    def __init__(self): self.itself = self
    def __del__(self): print("collected")
Cycle()
"""


def test_collecting_pauses_for_the_block_alone_and_spares_what_it_made() -> None:
    before = gc.get_freeze_count()
    try:
        with loading():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() == before  # nothing was loaded
        sys.modules.pop("this", None)
        with loading(), redirect_stdout(io.StringIO()):
            import this  # noqa: F401

            kept = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def ended(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_a_process_ends_without_collecting() -> None:
    assert ended(CYCLE) == "collected\n"
    assert ended(f"from pipeline.loading import end_quickly; end_quickly(){CYCLE}") == ""
