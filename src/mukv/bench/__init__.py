"""The long-context benchmark: test which facts of a text a model retrieves, by length and cache."""
