"""Training: the only code, with data and train.py, that knows Lightning."""
