"""An ad log with known click probabilities: simulate, population, bayes_optimal."""
