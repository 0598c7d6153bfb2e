"""What a call reads and leaves: inputs, guards, sources, side effects and aliasing."""
