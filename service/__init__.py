"""From a request to a score."""
