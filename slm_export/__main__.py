"""``python -m slm_export`` is the same program as ``slm-export``."""

from slm_export.cli import main

main()
