"""Images of folders, zips, tar shards, other libraries and a synthetic set as batches."""
