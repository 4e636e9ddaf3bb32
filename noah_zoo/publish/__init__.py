"""Publishing on the Hub, and the model cards."""
