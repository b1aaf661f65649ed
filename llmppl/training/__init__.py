"""The training loop: minibatches, evaluation, regularisation, the run's folder, resuming."""
