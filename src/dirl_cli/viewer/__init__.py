"""The trace viewer: answers of any kind as one HTML file, or one answer as a picture."""
