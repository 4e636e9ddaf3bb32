"""What a trained model is used for: classify, look at, show, export."""
