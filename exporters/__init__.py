"""Back ends: a checkpoint in, one artifact out, opened again in its own runtime. One file each."""
