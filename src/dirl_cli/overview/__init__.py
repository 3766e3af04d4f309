"""What the runs on the disk are and how far they came: lists, summaries, comparisons and pages of them."""
