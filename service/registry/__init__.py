"""Which model versions serve: registry, loader, warmup, background_thread; control, follower, changes, local_copy."""
