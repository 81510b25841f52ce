"""What a run leaves to look at: pictures, tables and pages."""
