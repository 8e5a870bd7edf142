"""Passes over a checkpoint: a checkpoint in, a new checkpoint out. One file each."""
