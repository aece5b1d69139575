"""What several tests use: models that they make, and what a run may leave behind."""
