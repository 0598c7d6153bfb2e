"""What a tile does, recorded once as bytecode and replayed outside of Python."""
