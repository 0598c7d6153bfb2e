"""A call captured and planned."""
