"""`python -m pipeline.tracking RUN_DIR PARENT_PID MODE`: the sender's process."""

import sys
from pathlib import Path

from pipeline.loading import end_quickly
from pipeline.tracking.sender import main

if __name__ == "__main__":
    end_quickly()
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
