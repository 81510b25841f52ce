"""Pictures and pages of maps: map and image in, something to look at out."""
