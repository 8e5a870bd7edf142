"""Saved ML Programs without Core ML: read from disk (`package`), and executed operator by operator (`evaluator`).

Knows the file formats and the published specification of MIL, nothing of how a package is made.
"""
