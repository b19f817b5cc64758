"""Build configuration objects from YAML, presets and overrides, with strict types."""
