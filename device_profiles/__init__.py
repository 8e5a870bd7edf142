"""Device profiles: data only, one TOML file a device, every figure with its source."""
