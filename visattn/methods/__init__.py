"""Records to maps: one file per family of methods."""
