"""What a checkpoint is worth: scores on held-out data next to what no model at all would reach."""
