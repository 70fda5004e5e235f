"""What the field judges protein models by: mutation effects (ProteinGym), contacts, secondary structure."""
