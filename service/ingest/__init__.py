"""What comes in beside requests: events over HTTP; from Parquet bulk_load by parquet_rows, click_log, partitions."""
