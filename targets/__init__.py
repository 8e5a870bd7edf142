"""Where an artifact goes: bundle layout, store limits, and how to measure there. One file each."""
