"""The compilers that are at hand, and how what they make is loaded."""
