"""The long-context benchmark: which facts of a text a model retrieves, by length and cache size."""
