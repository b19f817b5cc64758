"""The long-context benchmark: what of a text a model still knows, at which length and price."""
