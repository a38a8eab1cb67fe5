"""Pages that show what a teacher teaches: one HTML file each, which needs no network."""
