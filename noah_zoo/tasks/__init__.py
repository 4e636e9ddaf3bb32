"""What a model is trained for: one class per image, several, or re-identification."""
