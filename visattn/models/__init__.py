"""Whole networks: the vision transformer, the convolutional host, the recurrent glimpse model."""
