"""From a log to batches: prepare, encode, time_order, history, golden, batches."""
