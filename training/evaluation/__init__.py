"""What a run is worth: metrics, significance, run_report."""
