"""The systems that moec brings along, one TOML file each."""
