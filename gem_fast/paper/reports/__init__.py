"""What is shown and written: progress, results, tables beside the published numbers, pictures."""
