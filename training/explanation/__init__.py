"""What a model attends to: explain, heatmaps."""
