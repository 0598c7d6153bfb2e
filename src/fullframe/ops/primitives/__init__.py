"""The primitives: for each, which region of its inputs an output's region reads, and how it runs on windows."""
