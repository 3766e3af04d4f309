"""What a run tells: a line a step, curves, progress on the screen."""
