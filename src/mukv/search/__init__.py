"""Searching for numbers: many runs of one configuration, in one program or in many processes."""
