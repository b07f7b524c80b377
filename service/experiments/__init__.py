"""Who gets which arm, and which arm is better: assignment, analysis."""
