"""What training hands to serving: folder, manifest, golden, calibration, explanation. No torch."""
