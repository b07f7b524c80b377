"""The contract between training and serving: what a model eats, what it is, how it is handed over."""
