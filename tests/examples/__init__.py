"""Each example of docs/examples, run as its reader would."""
