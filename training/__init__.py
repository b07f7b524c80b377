"""From raw files to an artifact."""
