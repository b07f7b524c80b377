"""Which model versions serve: registry, loader, warmup, changes, coordination, background_thread."""
