"""Compile a trained small language model into verified mobile artifacts."""

__version__ = "0.1.0"
