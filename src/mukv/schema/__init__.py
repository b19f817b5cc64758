"""Configuration: strict objects from YAML, presets and overrides."""
