"""Images from folders, zip files, torchvision and a synthetic set, as a LightningDataModule."""
