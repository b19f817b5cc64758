"""Run directories: their configuration and files, training in them, loading models from them."""
