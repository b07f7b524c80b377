"""What comes in beside requests: events over HTTP, bulk_load from Parquet."""
