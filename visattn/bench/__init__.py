"""What each block, pair, model and map costs here: ratios in one run."""
