"""`python -m pipeline.tracking MODE PARENT_PID [RUN_DIR]`: the sender's process."""

import sys
from pathlib import Path

from pipeline.loading import end_quickly
from pipeline.tracking.sender import main

if __name__ == "__main__":
    end_quickly()
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:])))
