"""The papers' figures and the report, from a finished run."""
