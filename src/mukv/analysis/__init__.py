"""Who reads what: what queries of a trained model look at, by layer and head."""
