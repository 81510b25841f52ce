"""Images from folders, zips, tar shards, others' libraries and a synthetic set, as a LightningDataModule."""
