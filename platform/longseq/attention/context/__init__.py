"""Context parallelism: slices of one sequence on several ranks."""
