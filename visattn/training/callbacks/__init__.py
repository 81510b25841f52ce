"""What is attached to a training besides reports: progress, speed, freezing, stopping."""
