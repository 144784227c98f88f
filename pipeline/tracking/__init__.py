"""Tracking with MLflow, behind a journal on disk.

The training process only appends lines to a journal in the run directory. A process of its own
carries them to MLflow, so that a slow or dead server neither stops nor slows the training; what
could not be sent is sent when the run is started again or `reprise ui` is called.
"""

from pipeline.tracking.tracker import (
    Announcer,
    Status,
    Tracker,
    announcer,
    history,
    replay,
    store_uri,
    ui_command,
)

__all__ = [
    "Announcer",
    "Status",
    "Tracker",
    "announcer",
    "history",
    "replay",
    "store_uri",
    "ui_command",
]
