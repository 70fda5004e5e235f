"""What a checkpoint is worth: scores on held-out data beside what no model at all would reach."""
