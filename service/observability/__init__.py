"""What operators see: metrics, multiprocess, json_log."""
