"""``slm-export matrix``: models by devices by formats by recipes, exported side by side."""
