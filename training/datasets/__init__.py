"""One file per source: raw files in, a `training.log.Log` out."""
