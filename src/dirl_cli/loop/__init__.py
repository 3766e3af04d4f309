"""What the training loops of the commands are made of, put together from the rooms below."""
