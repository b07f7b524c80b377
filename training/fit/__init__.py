"""One training run: loop, optimizers, checkpoint, calibration, run_folder."""
