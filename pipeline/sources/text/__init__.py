"""Sources of lines of text: CSV and JSON Lines, planned and read by byte ranges."""
