"""The models that the papers compare with (models.md section 7), one family per file."""
