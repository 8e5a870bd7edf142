"""From a checkpoint to a torch module, and the parts that back ends make their own way."""
