"""Metrics and logs: metrics, instruments, exposition, multiprocess, json_log."""
