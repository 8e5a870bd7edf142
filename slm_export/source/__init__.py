"""From a MODEL argument to a checkpoint: found, checked, recognised."""
